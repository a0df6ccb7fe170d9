"""Every way in which models multiply with a weight is fused: forward, input gradient and weight gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smet_compile as smet
from tests.passes.compiled import ALL_FUSED, FORWARD, INPUT, WEIGHT, assert_close, capture, parts, randn, reads
from tests.passes.forms import FORMS, S, W
from tests.passes.memory_facts import makes_no_dense_gradient, saves_no_dense_weight

HALVES = [torch.bfloat16, torch.float16]
ROUNDED = partial(assert_close, tolerance=2e-2)
"""A product of half precision is rounded once; of tiles, in another order. Sums of it lie within a few roundings."""


@pytest.mark.parametrize("name", FORMS)
def test_form_is_fused(name: str) -> None:
    form = FORMS[name]
    model = reads(form.shape, form.apply)
    graph = capture(model, *(randn(*shape) for shape in form.inputs))
    assert parts(graph) == [ALL_FUSED]
    makes_no_dense_gradient(graph, model)
    saves_no_dense_weight(graph, model)


@pytest.mark.parametrize("block", [1, (1, 4), (5, 7)], ids=str)
@pytest.mark.parametrize("name", ["linear: linear, 3-D, bias", "linear: addmm (Conv1D)", "experts: gate and up"])
def test_form_is_fused_whatever_the_block(name: str, block: Any) -> None:
    form = FORMS[name]
    graph = capture(reads(form.shape, form.apply, block), *(randn(*shape) for shape in form.inputs))
    assert parts(graph) == [ALL_FUSED]


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype: torch.dtype, block: int) -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return F.linear(F.linear(x, w).tanh(), w.t())

    model = reads(W, apply, block, torch.float32)
    graph = capture(model, randn(5, 16, dtype=torch.float32), check=ROUNDED)
    assert parts(graph) == [ALL_FUSED]
    makes_no_dense_gradient(graph, model)
    saves_no_dense_weight(graph, model)


@pytest.mark.parametrize("block", [1, 8])
def test_grouped_products_of_experts(block: int) -> None:
    offsets = torch.tensor([3, 3, 12], dtype=torch.int32)
    model = reads(S, lambda x, w: torch._grouped_mm(x, w.mT, offs=offsets), block, torch.bfloat16)
    graph = capture(model, randn(12, 16, dtype=torch.bfloat16), check=ROUNDED)
    assert parts(graph) == [ALL_FUSED]
    makes_no_dense_gradient(graph, model)
    saves_no_dense_weight(graph, model)


@pytest.mark.parametrize("block", [1, 8])
def test_inference(block: int) -> None:
    model = reads(W, lambda x, b, w: F.linear(x, w, b), block)

    def infer(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(*inputs)

    graph = capture(model, randn(2, 3, 16), randn(24), call=infer)
    assert graph.backward is None
    assert parts(graph) == [{FORWARD: ["fused"]}]


ATTENTION: dict[str, Callable[..., Any]] = {
    "self": lambda mha, x, y, z, need: mha(x, x, x, need_weights=need),
    "cross": lambda mha, x, y, z, need: mha(x, y, y, need_weights=need),
    "three": lambda mha, x, y, z, need: mha(x, y, z, need_weights=need),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ATTENTION)
def test_multihead_attention(kind: str, need_weights: bool) -> None:
    attention = smet.sparsify(nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64), 0.5, block_shape=8)
    inputs = randn(2, 5, 16), randn(2, 7, 16), randn(2, 7, 16)
    apply = ATTENTION[kind]
    graph = capture(attention, *inputs, call=lambda x, y, z: apply(attention, x, y, z, need_weights))
    assert parts(graph) == [ALL_FUSED] * 2
    saves_no_dense_weight(graph, attention)


def test_no_input_gradient_where_none_is_asked_for() -> None:
    model = reads(W, lambda x, w: F.linear(x, w))
    graph = capture(model, randn(5, 16).detach())
    assert parts(graph) == [{FORWARD: ["fused"], WEIGHT: ["fused"]}]


def test_frozen_weight_has_no_gradient() -> None:
    model = reads(W, lambda x, w: F.linear(x, w))
    model.requires_grad_(False)
    graph = capture(model, randn(5, 16))
    assert parts(graph) == [{FORWARD: ["fused"], INPUT: ["fused"]}]


@pytest.mark.parametrize("name", ["linear: linear, 3-D, bias", "linear: bmm, expanded", "linear: einsum, rows first"])
def test_number_of_tokens_is_symbolic(name: str) -> None:
    form = FORMS[name]
    expanded = "expanded" in name
    model = reads(form.shape, (lambda x, w: torch.bmm(x, w.t().expand(x.shape[0], 16, 24))) if expanded else form.apply)
    inputs = [randn(*shape) for shape in form.inputs]
    torch._dynamo.mark_dynamic(inputs[0], 0)
    torch._dynamo.mark_dynamic(inputs[0], 1)
    graph = capture(model, *inputs, dynamic=True)
    assert graph.joint is not None
    symbols = [n for n in graph.joint.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], torch.SymInt)]
    assert len(symbols) >= 2
    assert parts(graph) == [ALL_FUSED]
    saves_no_dense_weight(graph, model)
