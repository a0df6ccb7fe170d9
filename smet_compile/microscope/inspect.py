"""Looks into the topology of a model, and into what it makes of the paths from input to output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from smet_compile.format import Layout, arguments
from smet_compile.microscope import elementwise_rules, movement_rules, product_rules
from smet_compile.microscope.flow import Flow
from smet_compile.microscope.inspection import Inspection, SiteInspection
from smet_compile.microscope.live_paths import ActiveMatrix, reach_of_sites
from smet_compile.microscope.per_site import check_has_data, dead_units, history_of
from smet_compile.microscope.reading import Reading, Rule, read_forward
from smet_compile.microscope.recording import Recording, record_forward
from smet_compile.ops import Site, find_sites
from smet_compile.ops.optimizers import find_optimizers, optimizer_that_steps
from smet_compile.ops.plain_copy import without_data
from smet_compile.ops.sites import CONVOLUTIONS, check_sparsified, without_wrappers
from smet_compile.runtime import TopologyManager
from smet_compile.shards import reshard

if TYPE_CHECKING:
    import networkx

RULES: dict[str, Rule] = {**elementwise_rules.RULES, **movement_rules.RULES, **product_rules.RULES}
"""Maps each op to the rule that reads it. Any other is taken to mix everything, and the inspection names it."""


def inspect(
    model: nn.Module,
    *example: Any,
    manager: TopologyManager | None = None,
    optimizer: Any = None,
    **inputs: Any,
) -> Inspection:
    """Finds dead units, live paths and the history of every compact weight of ``model``; changes nothing.

    What feeds what is found by one forward on tensors without data, in the mode the model is in (forward hooks run)::

        print(smet.inspect(model, **batch, manager=manager))

    A unit is one feature: a row of a matrix, a column where it comes in, an entry of the input; tokens and batches
    are left out. Elementwise ops, residual sums, norms, gates, softmax, reshapes and attention (v to its output, q
    and k in pairs) keep units apart, and dead ones are followed through them. Norms and softmax make every unit
    depend on all, by a mean and a scale; no path is followed through those. Where an op mixes units in a way that is
    not known, everything is taken to reach everything, so that nothing is called dead that may be alive. Per site:

    - dead in, dead out: inputs (columns) and outputs (rows) without active weight.
    - starved in: inputs with active weights to which nothing comes that depends on the model's input, since all
      that feeds them is dead. unread out: outputs with active weights of which nothing arrives at the model's
      output, since all that they feed ignores them, or a factor they are multiplied with is zero.
    - effective density: weights on a path from input to output all of which is active, of all weights
      (Vysogorets and Kempe 2023).

    The share of paths alive is the number of such paths from the units of the input to those of the output, over
    their number in the dense model: what SynFlow (Tanaka et al. 2020) computes for weights that are all one, summed.
    Time and memory are linear in the number of units and blocks.

    Of a sharded model the forward is that of the plain one, on no rank's data: where it cannot run without data, only
    what holds of each weight alone is found. Every rank has to call where an optimizer is given, and under tensor
    parallelism.

    Args:
        model: with compact weights, compiled or not. On the meta device the topologies must have data.
        example: the arguments of its forward; without any, only what holds of each weight alone is found.
        manager: the topology manager, whose history says churn, survival and exploration.
        optimizer: the one that knows ages, or several; default: those of the manager.
        inputs: the keyword arguments of its forward.

    Raises:
        ValueError: a model without compact weights; a topology without data.
    """
    arguments.module("inspect", model)
    owner: nn.Module = without_wrappers(model)
    if manager is not None and not isinstance(manager, TopologyManager):
        raise ValueError(
            f"manager: expected a TopologyManager or None, got {arguments.described(manager)}; give an input of "
            "the model that has this name by its place"
        )
    if optimizer is not None and not find_optimizers(optimizer, owner.parameters()):
        arguments.optimizer("optimizer", optimizer)
    check_sparsified("inspect", owner)
    sites = find_sites(owner)
    optimizer = optimizer or (manager.optimizers if manager else None)
    for site in sites.values():
        check_has_data(site)
    is_in_parts = any(site.part is not None for site in sites.values())
    shown = without_data(owner) if is_in_parts or ((example or inputs) and reshard(owner)) else owner
    whole = find_sites(shown) if is_in_parts else sites
    matrices = {name: ActiveMatrix.of(site.compact.topology, site.layout) for name, site in whole.items()}
    if example or inputs:
        recording = record_forward(shown, example, inputs)
    else:
        recording = Recording(warning="no example was given, so what feeds what is not known")
    reading = _read(shown, find_sites(shown), recording) if recording.is_complete else None
    rows_are_inputs = {node.weight: node.transposed for *_, node in reading.flow.uses} if reading else {}
    dead = {name: dead_units(site, rows_are_inputs.get(name)) for name, site in whole.items()}
    reaches, share = reach_of_sites(reading, matrices, dead) if reading else ({}, None)
    events, step = (manager.history, manager.num_steps) if manager else ([], _num_steps(sites.values(), optimizer))
    rows = tuple(
        SiteInspection(
            name=name,
            shape=site.whole.shape,
            block_shape=site.whole.block_shape,
            num_blocks=site.whole.num_blocks,
            num_active=matrices[name].num_active,
            num_weights=site.whole.num_weights,
            num_active_weights=matrices[name].num_active_weights,
            dead=dead[name],
            history=history_of(site, optimizer, events, step),
            reach=reaches.get(name),
        )
        for name, site in sites.items()
    )
    graph = _graph(reading.flow if reading else Flow(), {row.name: row.density for row in rows})
    return Inspection(rows, graph, share, tuple(_notes(recording, reading, rows)))


def _num_steps(sites: Iterable[Site], optimizer: Any) -> int:
    """Returns how many steps the optimizer has taken, by its own count."""
    stepping = ((site.values, optimizer_that_steps(optimizer, site.values)) for site in sites)
    counts = [found.state.get(values, {}).get("step", 0) for values, found in stepping if found is not None]
    return max((int(count) for count in counts), default=0)


def _read(model: nn.Module, sites: dict[str, Site], recording: Recording) -> Reading:
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    values = {named[id(site.values)]: name for name, site in sites.items()}
    layouts = {name: site.layout for name, site in sites.items()} | _dense_layouts(model, values)
    return read_forward(recording, layouts, values, RULES)


def _dense_layouts(model: nn.Module, compact: dict[str, str]) -> dict[str, Layout]:
    """Returns the layouts that the matrices which are not sparse would have; one without entries has none."""
    layouts = {}
    for prefix, module in model.named_modules():
        for tensor, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() > 1 and parameter.numel() > 0 and tensor not in compact:
                layouts[tensor] = Layout.of(parameter.shape, (1, 1), flatten=isinstance(module, CONVOLUTIONS))
    return layouts


def _graph(flow: Flow, densities: dict[str, float]) -> networkx.DiGraph[str]:
    """Returns which weight feeds which: the sites, whose densities are given, and what lies between them."""
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(((name, {"kind": "site", "density": density}) for name, density in densities.items()))
    graph.add_edges_from(sorted(_feeds(flow)))
    for name in graph:
        if name not in densities:
            graph.nodes[name]["kind"] = name if name in ("input", "output") else "dense"
    return graph


def _feeds(flow: Flow) -> set[tuple[str, str]]:
    """Returns (weight, weight) where the first feeds the second with none between; "input" and "output" as well."""
    names = ["input", *dict.fromkeys(node.weight for node in flow.nodes if node.weight)]
    bit = {name: 1 << i for i, name in enumerate(names)}
    feeds: set[tuple[str, str]] = set()
    sources: list[int] = []  # of each node: bits of the weights that feed it
    for number, node in enumerate(flow.nodes):
        bits = bit["input"] if node.kind == "input" else 0
        for link in node.links:
            bits |= sources[link.source]
        target = "output" if number == flow.output else node.weight
        if target:
            feeds |= {(name, target) for name in names if bits & bit[name]}
        sources.append(bit[node.weight] if node.weight else bits)
    return feeds


def _notes(recording: Recording, reading: Reading | None, rows: tuple[SiteInspection, ...]) -> list[str]:
    notes = [recording.warning] if recording.warning else []
    for op, weights in sorted(reading.unknown.items()) if reading else ():
        read = f" with {', '.join(sorted(weights))}" if weights else ""
        notes.append(f"{op}{read} mixes units in a way that is not known: all are taken to reach all")
    if reading:
        unused = [row.name for row in rows if row.reach is None]
        notes += [f"{name}: nothing of the example passes through it" for name in unused]
    return notes
