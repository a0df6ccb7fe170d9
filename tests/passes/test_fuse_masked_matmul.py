"""After fuse_masked_matmul products with a canonical weight read its values; all else stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from smet_compile.passes.fuse_masked_matmul import fuse_masked_matmul
from smet_compile.passes.graph import MASKED, PRODUCTS, UNPACK, PassReport, calls
from smet_compile.tracing import Captured
from tests.passes.compiled import assert_idempotent, capture, matched, randn, reads, targets, upto

W, S = (24, 16), (3, 24, 16)
TRANSPOSED, BIAS, OFFSETS = 5, 6, 7
"""Positions of arguments of masked_matmul."""


def fused(model: Any, *inputs: Any, **options: Any) -> Captured:
    return capture(model, *inputs, passes=upto(fuse_masked_matmul), **options)


def products(captured: Captured) -> list[fx.Node]:
    assert captured.joint is not None
    return calls(captured.joint.graph, MASKED)


def test_forward_and_input_gradient_of_a_linear_layer() -> None:
    graph = fused(reads(W, lambda x, b, w: F.linear(x, w, b)), randn(5, 16), randn(24))
    forward, input_gradient = products(graph)
    assert matched(graph, "fuse_masked_matmul") == 2
    assert forward.args[TRANSPOSED] and forward.args[BIAS] is not None
    assert not input_gradient.args[TRANSPOSED] and input_gradient.args[BIAS] is None
    assert graph.joint is not None
    assert UNPACK not in targets(graph.joint.graph)


def test_forward_and_input_gradient_of_a_conv1d() -> None:
    graph = fused(reads(W, lambda x, b, w: torch.addmm(b, x, w)), randn(5, 24), randn(16))
    forward, input_gradient = products(graph)
    assert not forward.args[TRANSPOSED] and forward.args[BIAS] is not None
    assert input_gradient.args[TRANSPOSED]


def test_stacked_experts() -> None:
    graph = fused(reads(S, lambda x, w: torch.bmm(x, w.mT)), randn(3, 5, 16))
    assert [node.args[TRANSPOSED] for node in products(graph)] == [True, False]


def test_sorted_tokens_keep_their_offsets() -> None:
    offsets = torch.tensor([3, 3, 12], dtype=torch.int32)
    model = reads(S, lambda x, w: torch._grouped_mm(x, w.mT, offs=offsets), 1, torch.bfloat16)
    graph = fused(model, randn(12, 16, dtype=torch.bfloat16))
    assert [node.args[OFFSETS] is not None for node in products(graph)] == [True, True]


@pytest.mark.parametrize("shape", [(5, 24), (5, 1), (1, 24), (1,)], ids=str)
def test_bias_of_another_shape_is_added_after_the_product(shape: tuple[int, ...]) -> None:
    graph = fused(reads(W, lambda x, b, w: torch.addmm(b, x, w.t())), randn(5, 16), randn(*shape))
    forward, _ = products(graph)
    assert forward.args[BIAS] is None


def test_unit_bias_of_a_unit_row_is_no_row() -> None:
    graph = fused(reads(W, lambda x, b, w: torch.addmm(b, x, w.t()[:, :1])), randn(5, 16), randn(1))
    assert all(node.args[BIAS] is None for node in products(graph))


NEAR_MISSES: dict[str, tuple[tuple[int, ...], Callable[..., Any], list[tuple[int, ...]]]] = {
    "scaled": (W, lambda x, w: x @ (w * 2).t(), [(5, 16)]),
    "masked": (W, lambda x, m, w: x @ (w * m).t(), [(5, 16), (24, 16)]),
    "added to another": (W, lambda x, d, w: F.linear(x, w + d), [(5, 16), (24, 16)]),
    "permuted across matrices": (S, lambda x, w: torch.bmm(x, w.permute(1, 0, 2)), [(24, 5, 3)]),
    "convolution": ((8, 4, 3), lambda x, w: F.conv1d(x, w), [(1, 4, 7)]),
    "vector": (W, lambda x, w: w.mv(x), [(16,)]),
    "outer product": (W, lambda x, w: (x[:, None, None] * w).sum(0), [(5,)]),
    "added to a product": (W, lambda a, b, w: torch.addmm(w, a, b), [(24, 4), (4, 16)]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name: str) -> None:
    shape, apply, inputs = NEAR_MISSES[name]
    graph = fused(reads(shape, apply), *(randn(*each) for each in inputs))
    assert products(graph) == []


@pytest.mark.parametrize("scale", [{"beta": 2}, {"alpha": 3}], ids=str)
def test_scaled_sum_is_left_alone(scale: dict[str, int]) -> None:
    graph = fused(reads(W, lambda b, x, w: torch.addmm(b, x, w.t(), **scale)), randn(24), randn(5, 16))
    (input_gradient,) = products(graph)
    assert not input_gradient.args[TRANSPOSED]


@pytest.mark.parametrize("dims", [(8, 16), (2, 8, 16)], ids=["2-D", "3-D"])
def test_grouped_product_with_a_single_matrix_is_left_alone(dims: tuple[int, ...]) -> None:
    ends = [8, 16] if len(dims) == 2 else [8, 24]
    model = reads((16, 24), lambda x, w: torch._grouped_mm(x, w, offs=torch.tensor(ends, dtype=torch.int32)))
    model.to(torch.bfloat16)
    assert products(fused(model, randn(*dims, dtype=torch.bfloat16))) == []


def test_product_in_a_checkpointed_region_is_recomputed_like_the_dense_one() -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda y: F.linear(y.sin(), w).sin(), x, use_reentrant=False)

    graph = fused(reads(W, apply), randn(5, 16))
    forward, _ = products(graph)
    assert "recompute" in forward.meta and "ac_graph_id" in forward.meta
    assert graph.backward is not None
    assert targets(graph.backward.graph).count(MASKED) == 2


def test_nothing_of_the_eager_call_is_left_for_inductor() -> None:
    def as_inductor_has_it(graph: fx.Graph) -> PassReport:
        for node in calls(graph, *PRODUCTS):
            node.meta.setdefault("eager_input_vals", ())
        return PassReport("noted")

    passes = (as_inductor_has_it, *upto(fuse_masked_matmul))
    graph = capture(reads(W, lambda x, w: F.linear(x, w)), randn(5, 16), passes=passes)
    assert len(products(graph)) == 2
    assert all("eager_input_vals" not in node.meta and "val" in node.meta for node in products(graph))


def test_idempotent() -> None:
    assert_idempotent(fuse_masked_matmul, fused(reads(W, lambda x, w: F.linear(x, w)), randn(5, 16)))
