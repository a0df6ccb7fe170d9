"""Tests that a weight outside matrix products is unpacked, again in backward, never saved, and reported."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.passes.compiled import FORWARD, INPUT, WEIGHT, capture, parts, randn, reads
from tests.passes.memory_facts import saves_no_dense_weight


class Unfused(NamedTuple):
    """Holds the shape of a weight, the computation, the inputs, and the reason expected for each part."""

    shape: tuple[int, ...]
    apply: Callable[..., Any]
    inputs: tuple[Any, ...]
    expected: dict[str, list[str]]


def read_by(what: str) -> str:
    return f"read by {what}, which is not a matrix product"


def comes_from(what: str) -> str:
    return f"the gradient comes from {what}, which is not a matrix product"


def looked_up(how: str) -> str:
    return f"rows or matrices of it are looked up ({how}), as an embedding or data-dependent experts do"


def routed(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    """Multiplies each token with the matrix that is chosen for it."""
    return torch.einsum("tc,trc->tr", x, w[chosen])


W, S = (24, 16), (3, 24, 16)


def convolution(kernel: str) -> dict[str, list[str]]:
    read = f"read by a convolution of kernel {kernel}"
    return {FORWARD: [read], INPUT: [read], WEIGHT: [comes_from("convolution_backward")]}


ROWS = torch.tensor([3, 0, 3, 23])
EMBEDDING_GRADIENT = "index_put" if torch.__version__ < "2.13" else "_unsafe_masked_index_put_accumulate"
UNFUSED = {
    "convolution": Unfused((8, 4, 3, 3), lambda x, w: F.conv2d(x, w), (randn(1, 4, 7, 7),), convolution("3x3")),
    "convolution, 1-D": Unfused((8, 4, 3), lambda x, w: F.conv1d(x, w), (randn(1, 4, 7),), convolution("3")),
    "embedding": Unfused(
        W,
        lambda rows, w: F.embedding(rows, w),
        (ROWS,),
        {FORWARD: [looked_up("embedding")], WEIGHT: [comes_from(EMBEDDING_GRADIENT)]},
    ),
    "routed experts": Unfused(
        S,
        routed,
        (randn(4, 16), torch.tensor([0, 2, 2, 0])),
        {FORWARD: [looked_up("index")], WEIGHT: [comes_from("index_put")]},
    ),
    "one of several": Unfused(
        S,
        lambda x, w: F.linear(x, w[1]),
        (randn(5, 16),),
        {FORWARD: [looked_up("select")], WEIGHT: [comes_from("select_scatter")]},
    ),
    "scaled": Unfused(
        W, lambda x, w: x @ (w * 2).t(), (randn(5, 16),), {FORWARD: [read_by("mul")], WEIGHT: [comes_from("mul")]}
    ),
    "normalized": Unfused(
        W,
        lambda x, w: F.linear(x, F.normalize(w, dim=-1)),
        (randn(5, 16),),
        {FORWARD: [read_by("pow"), read_by("div")], WEIGHT: [comes_from("add")]},
    ),
    "flipped": Unfused(
        W,
        lambda x, w: F.linear(x, w.flip(0)),
        (randn(5, 16),),
        {FORWARD: [read_by("rev")], WEIGHT: [comes_from("rev")]},
    ),
    "reshaped": Unfused(
        W,
        lambda x, w: F.linear(x, w.reshape(48, 8)),
        (randn(5, 8),),
        {FORWARD: [read_by("view")], WEIGHT: [comes_from("view")]},
    ),
    "every other row": Unfused(
        W,
        lambda x, w: F.linear(x, w[::2]),
        (randn(5, 16),),
        {FORWARD: [read_by("slice")], WEIGHT: [comes_from("slice_scatter")]},
    ),
    "some columns": Unfused(
        W,
        lambda x, w: F.linear(x, w[:, :8]),
        (randn(5, 8),),
        {FORWARD: [read_by("slice")], WEIGHT: [comes_from("slice_scatter")]},
    ),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_keeps_its_weight_and_says_why(name: str) -> None:
    shape, apply, inputs, expected = UNFUSED[name]
    model = reads(shape, apply, block=1)
    graph = capture(model, *inputs)
    results = parts(graph)[0]
    assert {part: sorted(reasons) for part, reasons in results.items()} == {p: sorted(e) for p, e in expected.items()}
    saves_no_dense_weight(graph, model)


@pytest.mark.parametrize("name", ["convolution", "embedding", "routed experts", "scaled"])
def test_in_a_checkpointed_region_it_is_not_saved(name: str) -> None:
    shape, apply, inputs, _ = UNFUSED[name]

    def in_checkpoint(*args: Any) -> Any:
        return checkpoint(apply, *args, use_reentrant=False)

    model = reads(shape, in_checkpoint, block=1)
    saves_no_dense_weight(capture(model, *inputs), model)


def test_fused_and_unfused_reads_of_one_weight() -> None:
    model = reads(W, lambda x, w: F.linear(x, w) / w.norm())
    graph = capture(model, randn(5, 16))
    (results,) = parts(graph)
    assert results[FORWARD][0] == "fused" and results[INPUT] == ["fused"]
    assert results[WEIGHT] == [comes_from("add")]
    saves_no_dense_weight(graph, model)
