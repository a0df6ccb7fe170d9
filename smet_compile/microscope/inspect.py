"""inspect: looks into the topology of a model, and into what it makes of the paths from input to output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from smet_compile.format import Layout, arguments
from smet_compile.microscope.capture import Capture, capture
from smet_compile.microscope.dead import DeadUnits, dead_units, matrix_of
from smet_compile.microscope.flow import Flow
from smet_compile.microscope.graph import graph_of
from smet_compile.microscope.history import history_of
from smet_compile.microscope.inspection import Inspection, SiteInspection
from smet_compile.microscope.matrices import ActiveMatrix
from smet_compile.microscope.reading import Reading, read
from smet_compile.microscope.rules import RULES
from smet_compile.microscope.site_reach import Reach, sites_in
from smet_compile.ops import Site, find_sites
from smet_compile.ops.sites import check_sparsified
from smet_compile.runtime import TopologyManager


def inspect(
    model: nn.Module,
    *example: Any,
    manager: TopologyManager | None = None,
    optimizer: Optimizer | None = None,
    **inputs: Any,
) -> Inspection:
    """Dead units, live paths and the history of every compact weight of ``model``; changes nothing.

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

    Args:
        model: with compact weights, compiled or not. On the meta device the topologies must have data.
        example, inputs: what it is called with; without any, only what holds of each weight alone is found.
        manager: whose history says churn, survival and exploration. optimizer: which knows ages; the manager's.

    Raises:
        ValueError: a model without compact weights; a topology without data.
    """
    arguments.module("inspect", model)
    owner: nn.Module = getattr(model, "_orig_mod", model)
    if manager is not None and not isinstance(manager, TopologyManager):
        raise ValueError(
            f"manager: expected a TopologyManager or None, got {arguments.described(manager)}; give an input of "
            "the model that has this name by its place"
        )
    if optimizer is not None:
        arguments.optimizer("optimizer", optimizer)
    check_sparsified("inspect", owner)
    sites = find_sites(owner)
    optimizer = optimizer or (manager.optimizer if manager else None)
    matrices = {name: matrix_of(site) for name, site in sites.items()}
    if example or inputs:
        captured = capture(owner, example, inputs)
    else:
        captured = Capture(not_captured="no example was given, so what feeds what is not known")
    reading = _read(owner, sites, captured) if captured.complete else None
    turned = {node.weight: node.transposed for *_, node in reading.flow.uses} if reading else {}
    dead = {name: dead_units(site, turned.get(name)) for name, site in sites.items()}
    found, share = sites_in(reading, matrices, dead) if reading else ({}, None)
    events, step = (manager.history, manager.num_steps) if manager else ([], _steps(sites.values(), optimizer))
    rows = tuple(
        _row(site, matrices[name], dead[name], found.get(name), history_of(site, optimizer, events, step))
        for name, site in sites.items()
    )
    graph = graph_of(reading.flow if reading else Flow(), {row.name: row.density for row in rows})
    return Inspection(rows, graph, share, tuple(_notes(captured, reading, rows)))


def _steps(sites: Iterable[Site], optimizer: Optimizer | None) -> int:
    """What the optimizer has taken, by its own count."""
    counts = [optimizer.state[site.values].get("step", 0) for site in sites] if optimizer else []
    return max((int(count) for count in counts), default=0)


def _read(model: nn.Module, sites: dict[str, Site], captured: Capture) -> Reading:
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    values = {named[id(site.values)]: name for name, site in sites.items()}
    return read(captured, {name: site.layout for name, site in sites.items()} | _dense(model, values), values, RULES)


def _dense(model: nn.Module, compact: dict[str, str]) -> dict[str, Layout]:
    """The matrices that are not sparse, laid out as they would be."""
    found = {}
    for prefix, module in model.named_modules():
        for tensor, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() > 1 and tensor not in compact:
                found[tensor] = Layout.of(parameter.shape, (1, 1), flatten=isinstance(module, _ConvNd))
    return found


def _row(site: Site, matrix: ActiveMatrix, dead: DeadUnits, found: Reach | None, history: Any) -> SiteInspection:
    layout = site.layout
    assert matrix.positions_N is not None
    return SiteInspection(
        name=site.name,
        shape=layout.shape,
        block_shape=layout.block_shape,
        num_blocks=layout.num_blocks,
        num_active=matrix.positions_N.numel(),
        num_weights=layout.num_weights,
        num_active_weights=matrix.num_active_weights,
        dead=dead,
        history=history,
        reach=found,
    )


def _notes(captured: Capture, reading: Reading | None, rows: tuple[SiteInspection, ...]) -> list[str]:
    notes = [captured.not_captured] if captured.not_captured else []
    for op, weights in sorted(reading.unknown.items()) if reading else ():
        of = f" with {', '.join(sorted(weights))}" if weights else ""
        notes.append(f"{op}{of} mixes units in a way that is not known: all are taken to reach all")
    if reading:
        unused = [row.name for row in rows if row.reach is None]
        notes += [f"{name}: nothing of the example passes through it" for name in unused]
    return notes
