"""Reads from captured graphs the sizes of the tensors that forward saves, and of those that backward makes."""

from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from smet_compile.tracing import Captured
from tests.passes.compiled import dense_sizes


def returned(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yields the tensors that the graph returns."""
    for node in graph.output_node().all_input_nodes:
        if isinstance(node.meta["val"], torch.Tensor):
            yield node


def of_size(nodes: Iterable[fx.Node], sizes: set[int]) -> list[str]:
    made = [node for node in nodes if node.op != "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)]
    counts = [(str(node), node.meta["val"].numel()) for node in made]
    return [name for name, count in counts if isinstance(count, int) and count in sizes]


def saves_no_dense_weight(captured: Captured, model: nn.Module) -> None:
    """Checks that forward returns no tensor as large as a weight. A model's outputs must have other sizes."""
    assert captured.forward is not None
    assert of_size(returned(captured.forward.graph), dense_sizes(model)) == []


def makes_no_dense_gradient(captured: Captured, model: nn.Module) -> None:
    assert captured.backward is not None
    assert of_size(captured.backward.graph.nodes, dense_sizes(model)) == []
