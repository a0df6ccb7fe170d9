"""The product with the update as its epilogue: bit for bit the product, and then the update of all it wrote."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.kernels.adamw_cases import Case, copy_of, differences, update_of
from tests.ops.kernels.device import DEVICE, INTERPRETED, on_device

pytest.importorskip("triton")
from smet_compile.ops.kernels.triton import adamw, sampled_adamw
from smet_compile.ops.kernels.triton.sampled_tiles import sampled_matmul

pytestmark = on_device

CASES = {
    "one of 128": Case((128, 128), (128, 128)),
    "over the edges": Case((70, 100), (32, 32)),
    "stacked": Case((3, 20, 50), (16, 16)),
    "small": Case((10, 50), (4, 8)),
    "not a power of two": Case((60, 150), (24, 48)),
}
BF16, FP32 = torch.bfloat16, torch.float32
STORED = {
    "fp32": (FP32, FP32, FP32, None),
    "bf16": (BF16, BF16, FP32, 5),
    "bf16 factors and moments": (BF16, FP32, BF16, 5),
    "codes": (BF16, BF16, torch.uint8, 5),
    "codes to nearest": (FP32, FP32, torch.uint8, None),
}


def factors(case: Case, dtype: torch.dtype, grouped: bool, broken: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is multiplied, and the offsets of tokens sorted by matrix."""
    layout = case.layout
    assert layout is not None
    generator = torch.Generator().manual_seed(1)
    stack = (layout.num_matrices,) if len(case.shape) == 3 and not grouped else ()
    left = torch.randn(*stack, 75, layout.rows, generator=generator) * 0.01
    right = torch.randn(*stack, 75, layout.cols, generator=generator)
    if broken:
        left.view(-1)[7] = float("nan")
    offsets = torch.tensor([20, 20, 70], dtype=torch.int32, device=DEVICE) if grouped else None
    return left.to(DEVICE, dtype), right.to(DEVICE, dtype), offsets


def product(left: Tensor, right: Tensor, *where: Any) -> Tensor:
    """pack(leftᵀ right); the interpreter cuts bf16 off where a GPU rounds, so there the sums are rounded here."""
    if INTERPRETED:
        return sampled_matmul(left.float(), right.float(), *where).to(left.dtype)
    return sampled_matmul(left, right, *where)


def step_both(
    case: Case, stored: str, grouped: bool = False, broken: bool = True
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The arguments before, after the fused step, and after product and update."""
    factor, dtype, moments, noise_seed = STORED[stored]
    before = update_of(case, dtype, moments, noise_seed)
    left, right, offsets = factors(case, factor, grouped, broken)
    actual, expected = copy_of(before, DEVICE), copy_of(before, DEVICE)
    assert sampled_adamw.fuses(left, offsets, actual)
    sampled_adamw.sampled_active_adamw_(actual[0], left, right, offsets, *actual[2:])
    values, _, *update = expected
    grad = product(left, right, *expected[10:15], values.shape[0], offsets)
    adamw.update_all([(values, grad.to(dtype), *update)])
    return before, actual, expected


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", CASES)
def test_fused_step(case: str, stored: str) -> None:
    before, actual, expected = step_both(CASES[case], stored)
    assert differences(expected, before)
    assert int(expected[5]) > int(before[5]), "some blocks must have been skipped"
    assert differences(actual, expected) == []


def test_tokens_sorted_by_matrix() -> None:
    before, actual, expected = step_both(CASES["stacked"], "bf16", grouped=True)
    assert differences(expected, before)
    assert differences(actual, expected) == []


def test_wide_blocks_are_multiplied_first() -> None:
    case = Case((100, 160), (96, 160), density=1.0)
    before = update_of(case, FP32, FP32, None)
    left, right, _ = factors(case, FP32, grouped=False, broken=False)
    actual = copy_of(before, DEVICE)
    assert not sampled_adamw.fuses(left, None, actual)
    sampled_adamw.sampled_active_adamw_(actual[0], left, right, None, *actual[2:])
    assert int(actual[6]) == int(before[6]) + 1
    assert not torch.equal(actual[0].cpu(), before[0])
