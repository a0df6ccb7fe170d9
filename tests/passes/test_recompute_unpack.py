"""After recompute_unpack neither an unpacked weight nor a tensor made from it alone is saved."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import smet_compile as smet
from smet_compile.passes.graph import MM, UNPACK, calls
from smet_compile.passes.recompute_unpack import recompute_unpack
from smet_compile.tracing import Capture, Captured
from tests.passes.compiled import assert_idempotent, capture, dense_sizes, matched, randn, reads, targets
from tests.passes.memory_facts import of_size, returned, saves_no_dense_weight

ONLY = (recompute_unpack,)
W = (24, 16)
READS: dict[str, Callable[..., Any]] = {
    "as it is": lambda x, w: F.linear(x, w),
    "scaled": lambda x, w: F.linear(x, w * 0.5),
    "squared": lambda x, w: F.linear(x, w.square()),
    "normalized": lambda x, w: F.linear(x, F.normalize(w, dim=-1)),
    "standardized": lambda x, w: F.linear(x, (w - w.mean(-1, keepdim=True)) / w.var(-1, keepdim=True)),
    "softmax": lambda x, w: F.linear(x, w.softmax(-1)),
    "flipped": lambda x, w: F.linear(x, w.flip(0)),
    "converted": lambda x, w: F.linear(x.float(), w.float()),
    "convolution": lambda x, w: F.conv1d(x[:, :, None], w[:, :, None]),
}


def in_checkpoint(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: checkpoint(apply, x, w, use_reentrant=False)


def marked(captured: Captured) -> list[fx.Node]:
    assert captured.joint is not None
    nodes = captured.joint.graph.nodes
    return [node for node in nodes if node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE]


@pytest.mark.parametrize("name", READS)
def test_what_is_made_from_a_weight_alone_is_not_saved(name: str) -> None:
    model = reads(W, READS[name])
    graph = capture(model, randn(5, 16), passes=ONLY)
    assert graph.backward is not None
    assert matched(graph, "recompute_unpack") == 1
    assert UNPACK in targets(graph.backward.graph)
    saves_no_dense_weight(graph, model)


def test_without_the_pass_it_is_saved() -> None:
    model = reads(W, READS["as it is"])
    graph = capture(model, randn(5, 16), passes=())
    assert graph.forward is not None
    assert of_size(returned(graph.forward.graph), dense_sizes(model)) != []


@pytest.mark.parametrize("name", ["as it is", "scaled"])
def test_in_a_checkpointed_region_it_is_not_saved(name: str) -> None:
    model = reads(W, in_checkpoint(READS[name]))
    saves_no_dense_weight(capture(model, randn(5, 16), passes=ONLY), model)


def test_read_by_several_checkpointed_regions_it_is_not_saved() -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        hidden = in_checkpoint(lambda x, w: F.linear(x, w).tanh())(x, w)
        return in_checkpoint(lambda x, w: (x @ w).tanh())(hidden, w)

    model = reads(W, apply)
    saves_no_dense_weight(capture(model, randn(5, 16), passes=ONLY), model)


def test_what_an_activation_goes_into_is_left_to_the_partitioner() -> None:
    graph = capture(reads(W, lambda a, b, w: (w * (a @ b)).sin()), randn(24, 4), randn(4, 16), passes=ONLY)
    assert {node.target for node in marked(graph)} == {UNPACK}


class Shifted(nn.Module):
    """Subtracts from its weight a running mean, which each call moves after it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(W, dtype=torch.float64))
        self.register_buffer("scale", torch.full(W, 0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, (self.weight - self.mean) * self.scale)
        self.mean.lerp_(self.weight.detach(), 0.5)
        return y.tanh()


@pytest.mark.parametrize("calls_before_backward", [1, 2])
def test_what_an_input_goes_into_that_the_graph_changes_is_saved(calls_before_backward: int) -> None:
    model = smet.sparsify(Shifted(), 0.5, block_shape=8, include="*")
    backend = Capture(ONLY)
    runs = []
    for call in (copy.deepcopy(model), torch.compile(model, backend=backend, fullgraph=True)):
        x = torch.linspace(-1, 1, 5 * 16, dtype=torch.float64).view(5, 16).requires_grad_()
        outputs = [call(x * (1 + i)) for i in range(calls_before_backward)]
        torch.stack(outputs).prod(0).sum().backward()
        runs.append([x.grad, *(p.grad for p in call.parameters()), *call.buffers()])
    for expected, actual in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected)
    assert {node.target for node in marked(backend.graphs[0])} == {UNPACK, torch.ops.aten.alias.default}


def test_what_a_gradient_goes_into_is_left_alone() -> None:
    graph = capture(reads(W, lambda x, w: x.sin() * w.cos()), randn(24, 16), passes=ONLY)
    backward = [node for node in marked(graph) if any("tangents" in str(each) for each in node.all_input_nodes)]
    assert backward == []


def test_a_random_mask_is_not_drawn_twice() -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w * (torch.rand_like(w) > 0.5))

    def call(x: Tensor) -> Tensor:
        return model(x)

    torch._dynamo.reset()
    model = reads(W, apply)
    x = randn(5, 16)
    graph = capture(model, x, call=call, passes=ONLY, check=lambda actual, expected: None)
    assert graph.backward is not None
    random = [op for op in targets(graph.backward.graph) if "rand" in str(op)]
    assert random == []


def test_a_product_with_another_weight_is_not_computed_twice() -> None:
    graph = capture(reads((16, 16), lambda x, w: x @ (w @ w.sin()).cos()), randn(5, 16), passes=ONLY)
    assert MM not in {node.target for node in marked(graph)}


def test_warning_and_sinks_are_taken_off() -> None:
    graph = capture(reads(W, READS["as it is"]), randn(5, 16), passes=ONLY)
    assert graph.joint is not None
    (unpack,) = calls(graph.joint.graph, UNPACK)
    assert unpack.args[4:] == (None, None, False, False)


def test_idempotent() -> None:
    assert_idempotent(recompute_unpack, capture(reads(W, READS["normalized"]), randn(5, 16), passes=ONLY))
