"""The products that copy with TMA equal the law in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.ops import law
from tests.ops.kernels import cases
from tests.ops.kernels.cases import Weight
from tests.ops.kernels.device import DEVICE, HAS_GPU, combinations, new_memory_is_nan, on_device
from tests.ops.kernels.test_triton_matmul import STRIDES
from tests.ops.kernels.tolerances import assert_close
from tests.ops.matmul_cases import MASKS

pytestmark = [on_device, pytest.mark.usefixtures(new_memory_is_nan.__name__)]
if HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("this GPU has no TMA", allow_module_level=True)
WEIGHTS = [
    ((128, 192), (32, 32)),
    ((96, 256), (32, 64)),
    ((200, 328), (64, 64)),  # blocks hang over, rows are aligned
    ((201, 341), (64, 64)),  # rows are not
    ((300, 257), (128, 128)),
    ((1, 130, 100), (64, 32)),
]
DTYPES, NUM_TOKENS = [torch.bfloat16, torch.float16], [0, 1, 150]


def masked(each: Weight, input: Tensor, transposed: bool, bias: Tensor | None = None) -> None:
    from smet_compile.ops.kernels.triton import matmul_tma

    out = matmul_tma.masked_matmul(input, each.values(input.dtype), each.on_device, transposed, bias)
    exact = None if bias is None else bias.double().cpu()
    expected = law.masked_matmul(input.double().cpu(), each.exact_values(), each.topology, transposed, exact)
    assert out.is_contiguous() and out.dtype == input.dtype
    assert_close("transposed" if transposed else "plain", out.cpu(), expected)


def both_sides(each: Weight, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _, rows, cols = each.grid.matrix
    stack = (1,) if each.layout.shape != each.layout.matrix else ()
    left, right = each.tokens(num_tokens, rows, dtype), each.tokens(num_tokens, cols, dtype)
    return left.view(*stack, *left.shape), right.view(*stack, *right.shape)


SAMPLED = [each for each in WEIGHTS if min(each[1]) >= 64] + [((1, 130, 300), (64, 64)), ((200, 700), (64, 128))]


def sampled(each: Weight, left: Tensor, right: Tensor) -> None:
    from smet_compile.ops.kernels.triton import sampled_tma

    out = sampled_tma.sampled_matmul(left, right, each.on_device)
    expected = law.sampled_matmul(left.double().cpu(), right.double().cpu(), each.topology)
    assert out.is_contiguous() and out.dtype == left.dtype
    assert_close("sampled", out.cpu(), expected)


@pytest.mark.parametrize(("weight", "dtype", "num_tokens"), combinations(SAMPLED, DTYPES, NUM_TOKENS), ids=str)
def test_sampled(weight: tuple[tuple[int, ...], tuple[int, int]], dtype: torch.dtype, num_tokens: int) -> None:
    each = cases.weight(*weight)
    sampled(each, *both_sides(each, num_tokens, dtype))


@pytest.mark.parametrize("mask", ["none", *MASKS[1:]])
@pytest.mark.parametrize(("splits", "num_programs"), [(1, 1), (3, 2)])
def test_sampled_masks(mask: str, splits: int, num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may have no block, one, or an odd number; tokens may be split, and programs few."""
    from smet_compile.ops.kernels.triton import sampled_tma, supports

    monkeypatch.setattr(supports, "num_sms", lambda _: num_programs)
    monkeypatch.setattr(sampled_tma, "num_splits", lambda *_: splits)
    each = cases.weight((200, 328), (64, 64), mask)
    sampled(each, *both_sides(each, 400, torch.bfloat16))


@pytest.mark.parametrize("number", [1.0, torch.nan])
def test_what_hangs_over_an_edge_is_zero(number: float) -> None:
    from smet_compile.ops.kernels.triton import sampled_tma

    each = cases.weight((200, 341), (64, 64), "all")
    left, right = (torch.full_like(side, number) for side in both_sides(each, 20, torch.bfloat16))
    out = sampled_tma.sampled_matmul(left, right, each.on_device).cpu()
    inside = each.gather(torch.ones_like(each.dense)) == 1
    assert bool((out[~inside] == 0).all()) and bool((out[inside] != 0).all())


@pytest.mark.parametrize(("weight", "dtype", "num_tokens"), combinations(WEIGHTS, DTYPES, NUM_TOKENS), ids=str)
def test_masked(weight: tuple[tuple[int, ...], tuple[int, int]], dtype: torch.dtype, num_tokens: int) -> None:
    each = cases.weight(*weight)
    left, right = both_sides(each, num_tokens, dtype)
    masked(each, right, True, torch.randn(left.shape[-1]).to(DEVICE, dtype))
    masked(each, left, False)


@pytest.mark.parametrize("mask", ["none", *MASKS[1:]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_masks(mask: str, with_bias: bool) -> None:
    """Lines may have no block, or all, or differ much in length."""
    each = cases.weight((200, 328), (64, 64), mask)
    left, right = both_sides(each, 70, torch.bfloat16)
    bias = torch.randn(328).to(DEVICE, torch.bfloat16) if with_bias else None
    masked(each, left, False, bias)
    masked(each, right, True)


@pytest.mark.parametrize("strides", list(STRIDES))
def test_strided_inputs(strides: str) -> None:
    each = cases.weight((200, 328), (64, 64))
    left, right = (STRIDES[strides](side) for side in both_sides(each, 37, torch.bfloat16))
    masked(each, right, True)
    masked(each, left, False)
    sampled(each, left, right)


def test_values_that_begin_anywhere() -> None:
    from smet_compile.ops.kernels.triton import matmul_tma

    each = cases.weight((128, 192), (32, 32))
    _, right = both_sides(each, 40, torch.bfloat16)
    values = each.values(torch.bfloat16)
    shifted = torch.empty(values.numel() + 1, dtype=values.dtype, device=DEVICE)[1:].view(values.shape).copy_(values)
    out = matmul_tma.masked_matmul(right, shifted, each.on_device, True)
    assert torch.equal(out, matmul_tma.masked_matmul(right, values, each.on_device, True))


@pytest.mark.parametrize("num_programs", [1, 3])
def test_programs_take_items_in_turn(num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than items, tokens in several groups of which the last is smaller, lines by their length."""
    from smet_compile.ops.kernels.triton import matmul_tma, supports

    monkeypatch.setattr(matmul_tma, "_TOKENS_TOGETHER", 128)
    monkeypatch.setattr(supports, "num_sms", lambda _: num_programs)
    each = cases.weight((200, 328), (64, 64))
    left, right = both_sides(each, 400, torch.bfloat16)
    masked(each, right, True)
    masked(each, left, False)


def test_the_sums_are_those_of_the_other_kernel() -> None:
    """In the interpreter the two kernels take the same steps, so not a bit differs."""
    from smet_compile.ops.kernels.triton import matmul_tiles, matmul_tma

    each = cases.weight((201, 341), (64, 64))
    left, _ = both_sides(each, 70, torch.bfloat16)
    args: Any = left, each.values(torch.bfloat16), each.on_device, False
    assert torch.equal(matmul_tma.masked_matmul(*args), matmul_tiles.masked_matmul(*args))
