"""After canonicalize a weight is the right operand of its products, and a packed gradient is a product."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from smet_compile.passes.canonicalize import canonicalize
from smet_compile.passes.graph import BMM, GROUPED_MM, MM, PACK, PRODUCTS, UNPACK, calls, is_call, weight_of
from smet_compile.tracing import Captured
from tests.passes.compiled import assert_idempotent, capture, matched, randn, reads, upto
from tests.passes.forms import FORMS

W, S = (24, 16), (3, 24, 16)
CONVERT = torch.ops.prims.convert_element_type.default
VIEWS = [
    "linear: matmul, weight left",
    "linear: einsum",
    "linear: contiguous transpose",
    "linear: split unevenly",
    "linear: addmm, weight left",
    "linear: bmm, expanded",
    "linear: twice",
    "linear: checkpoint",
    "experts: einsum, weight first",
    "experts: gate and up",
]


def canonical(model: Any, *inputs: Any) -> Captured:
    return capture(model, *inputs, passes=upto(canonicalize))


def weight_products(captured: Captured) -> list[fx.Node]:
    assert captured.joint is not None
    return [product for product in calls(captured.joint.graph, *PRODUCTS) if weight_of(product) is not None]


def gradients(captured: Captured) -> list[fx.Node]:
    assert captured.joint is not None
    return [pack.args[0] for pack in calls(captured.joint.graph, PACK)]


@pytest.mark.parametrize("name", VIEWS)
def test_weights_come_right_and_gradients_are_products(name: str) -> None:
    form = FORMS[name]
    graph = canonical(reads(form.shape, form.apply), *(randn(*shape) for shape in form.inputs))
    assert matched(graph, "canonicalize") > 0
    assert graph.joint is not None
    for unpack in calls(graph.joint.graph, UNPACK):
        users = [user for view in unpack.users for user in ([view] if is_call(view, *PRODUCTS) else view.users)]
        assert users and all(weight_of(user) is unpack for user in users)
    assert gradients(graph) and all(is_call(node, MM, BMM, GROUPED_MM) for node in gradients(graph))


def test_what_is_canonical_stays() -> None:
    graph = canonical(reads(W, lambda x, w: x @ w), randn(5, 24))
    assert matched(graph, "canonicalize") == 0
    assert len(weight_products(graph)) == 2 and len(gradients(graph)) == 1


def test_conversions_go_to_the_compact_side() -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w.float().bfloat16().double())

    graph = canonical(reads(W, apply, block=1), randn(5, 16))
    assert graph.joint is not None
    sizes = {node.meta["val"].numel() for node in calls(graph.joint.graph, CONVERT)}
    assert sizes == {24 * 16 // 2}


def test_integers_are_converted_back_in_the_same_order() -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(x, (w * 4).int().double()) + (x.int() @ w.int().t()).double()

    graph = canonical(reads(W, apply), 4 * torch.randn(5, 16, dtype=torch.float64))
    assert len(weight_products(graph)) == 2


NEAR_MISSES: dict[str, tuple[tuple[int, ...], Callable[..., Any], list[tuple[int, ...]]]] = {
    "scaled": (W, lambda x, w: x @ (w * 2).t(), [(5, 16)]),
    "every other row": (W, lambda x, w: F.linear(x, w[::2]), [(5, 16)]),
    "some columns": (W, lambda x, w: F.linear(x, w[:, :8]), [(5, 8)]),
    "other columns a row": (W, lambda x, w: F.linear(x, w.reshape(16, 24)), [(5, 24)]),
    "added to a product": (W, lambda a, b, w: torch.addmm(w, a, b), [(24, 4), (4, 16)]),
    "added to a square product": ((16, 16), lambda a, b, w: torch.addmm(w, a, b), [(16, 16), (16, 16)]),
    "matrices as rows": (S, lambda x, w: torch.bmm(x, w.permute(1, 0, 2)), [(24, 5, 3)]),
    "matrices as columns": (S, lambda x, w: torch.bmm(x, w.permute(1, 2, 0)), [(24, 5, 16)]),
    "repeated": (W, lambda x, w: F.linear(x, torch.cat([w, w])), [(5, 16)]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name: str) -> None:
    shape, apply, inputs = NEAR_MISSES[name]
    graph = canonical(reads(shape, apply), *(randn(*each) for each in inputs))
    assert weight_products(graph) == []


@pytest.mark.parametrize("scale", [{"beta": 0}, {"beta": 2}, {"alpha": 3}], ids=str)
def test_scaled_sum_is_left_alone(scale: dict[str, int]) -> None:
    def apply(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.addmm(b, x, w.t(), **scale) + torch.addmm(b, w, x.t(), **scale).t()

    graph = canonical(reads(W, apply), randn(24, 24), randn(24, 16))
    assert {node.target for node in weight_products(graph)} == {MM}


def test_gradient_that_is_read_by_others_is_left_alone() -> None:
    graph = canonical(reads(W, lambda a, b, w: torch.addmm(w, a, b) + w), randn(24, 4), randn(4, 16))
    assert not any(is_call(node, *PRODUCTS) for node in gradients(graph))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_grouped_product_with_a_single_matrix_is_left_alone(dtype: torch.dtype) -> None:
    offsets = torch.tensor([8, 16], dtype=torch.int32)
    model = reads((16, 24), lambda x, w: torch._grouped_mm(x, w, offs=offsets), dtype=dtype)
    assert weight_products(canonical(model, randn(8, 16, dtype=dtype))) == []


TWO_WEIGHTS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "with itself": (lambda x, w: x @ (w @ w), (16, 16)),
    "with its transpose": (lambda x, w: x @ (w @ w.t()), (24, 16)),
    "with itself, converted": (lambda x, w: x @ (w.float() @ w.float().t()).double(), (24, 16)),
}


@pytest.mark.parametrize("name", TWO_WEIGHTS)
def test_weight_times_itself_is_right(name: str) -> None:
    apply, shape = TWO_WEIGHTS[name]
    graph = canonical(reads(shape, apply), randn(5, shape[0]))
    assert_idempotent(canonicalize, graph)


@pytest.mark.parametrize("name", VIEWS[:2])
def test_idempotent(name: str) -> None:
    form = FORMS[name]
    graph = canonical(reads(form.shape, form.apply), *(randn(*shape) for shape in form.inputs))
    assert_idempotent(canonicalize, graph)
