"""Checks which parts of a model's sites are fused, and whether anything has the size of a dense weight."""

from collections.abc import Iterable

from torch import Tensor, fx, nn

from smet_compile.ops import find_sites
from smet_compile.passes.verify import FORWARD, FUSED, INPUT_GRADIENT, UPDATE, WEIGHT_GRADIENT, outcomes
from smet_compile.tracing import Capture, Captured
from tests.models.compiled import Trained

PARTS = {FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT}


def graphs_with_sites(model: nn.Module, capture: Capture) -> list[Captured]:
    """Returns the graphs that read sites. One that Dynamo gave up, since a number was dynamic, has no joint graph."""
    return [graph for graph in capture.graphs if graph.joint is not None and outcomes_by_site(model, graph)]


def outcomes_by_site(model: nn.Module, graph: Captured) -> dict[str, dict[str, list[str]]]:
    """Returns site → part → "fused" or why not, for the sites that ``graph`` reads."""
    names = {id(site.compact.topology): name for name, site in find_sites(model).items()}
    assert graph.joint is not None
    return {names[id(graph.input_of(node))]: out.parts for node, out in outcomes(graph.joint.graph).items()}


def assert_fused(trained: Trained, capture: Capture, *, update: bool | None = None) -> None:
    """Checks that one graph holds every site, fused in all parts, and makes nothing of a dense weight's size.

    ``update``: whether updates are among the parts; default: in a compiled train step.
    """
    (graph,) = graphs_with_sites(trained.model, capture)
    update = trained.how == "step" if update is None else update
    expected = {part: [FUSED] for part in (PARTS | {UPDATE} if update else PARTS)}
    assert outcomes_by_site(trained.model, graph) == dict.fromkeys(find_sites(trained.model), expected)
    assert graph.forward is not None and graph.backward is not None
    assert not weight_sized(trained.model, [*graph.forward.graph.nodes, *graph.backward.graph.nodes])


def assert_parts_fused(trained: Trained, capture: Capture) -> None:
    """Checks that several graphs of a model together hold every site, and that in each of them all is fused."""
    graphs = graphs_with_sites(trained.model, capture)
    found = [outcomes_by_site(trained.model, graph) for graph in graphs]
    assert len(graphs) > 1 and set().union(*found) == set(find_sites(trained.model))
    assert all(results == [FUSED] for sites in found for parts in sites.values() for results in parts.values())


def outputs(half: fx.GraphModule | None) -> list[fx.Node]:
    """Returns the outputs of a forward graph: its results and the tensors that it saves for backward."""
    assert half is not None
    return half.graph.output_node().all_input_nodes


def weight_sized(model: nn.Module, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Returns the nodes that compute as many entries as some site's dense weight has, or one matrix of it."""
    layouts = [site.layout for site in find_sites(model).values()]
    sizes = {x.rows * x.cols * count for x in layouts for count in (1, x.num_matrices)}
    found = []
    for node in nodes:
        made = node.meta.get("val") if node.op == "call_function" else None
        if isinstance(made, Tensor) and isinstance(made.numel(), int) and made.numel() in sizes:
            found.append(node)
    return found
