"""After fuse_sampled_matmul a packed product of two activations is computed where the weight is active."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from smet_compile.passes.fuse_sampled_matmul import fuse_sampled_matmul
from smet_compile.passes.graph import PACK, SAMPLED, calls
from smet_compile.tracing import Captured
from tests.passes.compiled import assert_close, assert_idempotent, capture, matched, randn, reads, targets, upto

W, S = (24, 16), (3, 24, 16)
OFFSETS = 6
"""Position of an argument of sampled_matmul."""


def fused(model: Any, *inputs: Any, **options: Any) -> Captured:
    return capture(model, *inputs, passes=upto(fuse_sampled_matmul), **options)


def products(captured: Captured) -> list[fx.Node]:
    assert captured.joint is not None
    return calls(captured.joint.graph, SAMPLED)


FIRES: dict[str, tuple[tuple[int, ...], Callable[..., Any], list[tuple[int, ...]], int]] = {
    "linear": (W, lambda x, w: F.linear(x, w), [(5, 16)], 1),
    "conv1d": (W, lambda x, b, w: torch.addmm(b, x, w), [(5, 24), (16,)], 1),
    "weight left": (W, lambda x, w: w @ x, [(16, 5)], 1),
    "experts": (S, lambda x, w: torch.bmm(x, w.mT), [(3, 5, 16)], 1),
    "twice": (W, lambda x, w: F.linear(x, w) + F.linear(x.sin(), w), [(5, 16)], 2),
    "some rows": (W, lambda x, w: F.linear(x, w[3:11]), [(5, 16)], 1),
    "in parts": (W, lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1), [(5, 16)], 3),
    "summed over a batch": (W, lambda x, w: torch.bmm(x, w.t().expand(2, 16, 24)), [(2, 3, 16)], 1),
    "detached once": (W, lambda x, w: F.linear(x, w.detach()) + F.linear(x.sin(), w), [(5, 16)], 1),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str) -> None:
    shape, apply, inputs, count = FIRES[name]
    graph = fused(reads(shape, apply), *(randn(*each) for each in inputs))
    assert matched(graph, "fuse_sampled_matmul") == count == len(products(graph))
    assert graph.joint is not None
    assert PACK not in targets(graph.joint.graph)


def test_sorted_tokens_keep_their_offsets() -> None:
    offsets = torch.tensor([3, 3, 12], dtype=torch.int32)
    model = reads(S, lambda x, w: torch._grouped_mm(x, w.mT, offs=offsets), 1, torch.bfloat16)
    (product,) = products(fused(model, randn(12, 16, dtype=torch.bfloat16)))
    assert product.args[OFFSETS] is not None


NEAR_MISSES: dict[str, tuple[tuple[int, ...], Callable[..., Any], list[tuple[int, ...]]]] = {
    "scaled": (W, lambda x, w: x @ (w * 2).t(), [(5, 16)]),
    "every other row": (W, lambda x, w: F.linear(x, w[::2]), [(5, 16)]),
    "every third row from one": (W, lambda x, w: F.linear(x, w[1::3]), [(5, 16)]),
    "some columns": (W, lambda x, w: F.linear(x, w[:, :8]), [(5, 8)]),
    "a term that is no product": (W, lambda x, w: (F.linear(x, w), w.sin()), [(5, 16)]),
    "convolution": ((8, 4, 3), lambda x, w: F.conv1d(x, w), [(1, 4, 7)]),
    "elementwise": (W, lambda x, w: w * x, [(24, 16)]),
    "scaled by rows": (W, lambda s, x, w: F.linear(x, s * w), [(24, 1), (5, 16)]),
    "sum of rows and columns": (W, lambda x, w: w * x, [(24, 1)]),
    "reshaped": (W, lambda x, w: F.linear(x, w.reshape(16, 24)), [(5, 24)]),
    "matrices exchanged with rows": (S, lambda x, w: torch.bmm(x, w.permute(1, 0, 2)), [(24, 5, 3)]),
    "repeated": (W, lambda x, w: F.linear(x, torch.cat([w, w])), [(5, 16)]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name: str) -> None:
    shape, apply, inputs = NEAR_MISSES[name]
    assert products(fused(reads(shape, apply), *(randn(*each) for each in inputs))) == []


@pytest.mark.parametrize("transposed", [True, False])
def test_gradient_read_by_somebody_else_is_left_alone(transposed: bool) -> None:
    """A dense gradient that something else needs is made anyway: here that of another leaf of the same size."""

    def apply(x: Tensor, d: Tensor, w: Tensor) -> Tensor:
        return x @ (w + d).t() if transposed else x @ (w + d)

    graph = fused(reads(W, apply), randn(5, 16 if transposed else 24), randn(24, 16))
    assert products(graph) == []


def test_sum_in_another_dtype_is_left_alone() -> None:
    class Wide(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return gy @ w, torch.bmm(gy.mT, x).sum(0, dtype=torch.float64).to(w.dtype)

    model = reads(W, lambda x, w: Wide.apply(x, w), dtype=torch.float32)
    graph = fused(model, randn(2, 5, 16, dtype=torch.float32), check=partial(assert_close, tolerance=1e-6))
    assert products(graph) == []


def test_idempotent() -> None:
    assert_idempotent(fuse_sampled_matmul, fused(reads(W, lambda x, w: F.linear(x, w)), randn(5, 16)))
