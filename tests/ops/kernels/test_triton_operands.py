"""Operands are copied to aligned rows where that lets Triton read 16 bytes at a time, and left alone elsewhere."""

import pytest
import torch
from torch import Tensor

from smet_compile.ops.kernels.triton.operands import copy_to_blocks, is_far, needs_copy

BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("operand", "width", "expected"),
    [
        (empty(4, 2048), 64, False),
        (empty(4, 5461), 64, True),
        (empty(4, 5464), 64, False),  # the edge of the matrix is in the midst of a block, at a multiple of 16 bytes
        (empty(4, 5464)[:, :5461], 64, True),
        (empty(4, 2052, dtype=FP32), 64, False),
        (empty(4, 2052), 64, True),
        (empty(4, 2049)[:, :2048], 64, True),
        (empty(2048, 4).mT, 64, True),
        (empty(1, 2048).expand(4, 2048), 64, False),
        (empty(4 * 2048 + 1)[1:].view(4, 2048), 64, True),
        (empty(2, 4, 2049)[:, :, :2048], 64, True),
        (empty(2, 4, 2048), 64, False),
        (empty(4, 5461), 12, False),  # blocks of 24 bytes
        (empty(4, 5461), 8, True),
        (empty(4, 5460), 3, False),  # blocks that begin anywhere
        (empty(4, 5461, dtype=FP32), 6, False),
    ],
    ids=lambda each: f"{tuple(each.shape)} {each.dtype}" if isinstance(each, Tensor) else str(each),
)
def test_which_rows_are_not_aligned(operand: Tensor, width: int, expected: bool) -> None:
    assert needs_copy(operand, width) == expected
    if expected:
        assert not needs_copy(copy_to_blocks(operand, width), width)


@pytest.mark.parametrize("shape", [(4, 21), (3, 4, 21), (0, 21)], ids=str)
def test_a_copy_ends_with_a_block_in_zeros(shape: tuple[int, ...]) -> None:
    operand = torch.randn(shape, requires_grad=True)
    copied = copy_to_blocks(operand, 8)
    assert copied.shape == (*shape[:-1], 24) and copied.is_contiguous() and not copied.requires_grad
    assert torch.equal(copied[..., :21], operand) and not copied[..., 21:].any()


def test_offsets_of_a_program_fit_into_32_bits() -> None:
    meta = torch.device("meta")
    assert not is_far(torch.empty(4096, 2048, device=meta))
    assert is_far(torch.empty_strided((4096, 2048), (2**23, 1), device=meta))
    assert is_far(torch.empty_strided((4096, 2048), (1, 2**20), device=meta))
