"""The product with the update as its epilogue equals the product and then the update, bit for bit."""

import pytest
import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops.updates import Update
from tests.ops.kernels.adamw_cases import Case, copy_of, differences, update_of
from tests.ops.kernels.device import DEVICE, HAS_GPU, INTERPRETED, on_device

pytest.importorskip("triton")
from smet_compile.ops.kernels.triton import adamw, sampled_update
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
    """Draws what is multiplied, and returns offsets where tokens are sorted by matrix."""
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


def product(left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None) -> Tensor:
    """Computes pack(leftᵀ right). The interpreter cuts bf16 off where a GPU rounds, so there it is rounded here."""
    if INTERPRETED:
        return sampled_matmul(left.float(), right.float(), topology, offsets).to(left.dtype)
    return sampled_matmul(left, right, topology, offsets)


def with_stand_in(update: Update) -> Update:
    """Copies an update to the device; its values stand for the gradient."""
    copied = copy_of(update, DEVICE)
    copied.grad = copied.values
    return copied


def step_both(
    case: Case, stored: str, grouped: bool = False, broken: bool = True, steps: int = 1
) -> tuple[Update, Update, Update]:
    """Returns an update before, after fused steps, and after as many products and updates."""
    factor, dtype, moments, noise_seed = STORED[stored]
    before = update_of(case, dtype, moments, noise_seed)
    left, right, offsets = factors(case, factor, grouped, broken)
    actual, expected = with_stand_in(before), copy_of(before, DEVICE)
    assert expected.topology is not None
    assert sampled_update.fuses(left, offsets, actual)
    for _ in range(steps):
        sampled_update.sampled_update(left, right, offsets, actual)
        expected.grad = product(left, right, expected.topology, offsets).to(dtype)
        adamw.update_all([expected])
    assert actual.grad is actual.values
    actual.grad = expected.grad
    return before, actual, expected


FUSED = [
    (case, stored)
    for case in CASES
    for stored in STORED
    if HAS_GPU or stored in ("bf16", "codes") or case == "over the edges"
]


@pytest.mark.parametrize(("case", "stored"), FUSED)
def test_fused_step(case: str, stored: str) -> None:
    before, actual, expected = step_both(CASES[case], stored)
    assert differences(expected, before)
    assert int(expected.num_skipped) > int(before.num_skipped), "some blocks must have been skipped"
    assert differences(actual, expected) == []


def test_tokens_sorted_by_matrix() -> None:
    before, actual, expected = step_both(CASES["stacked"], "bf16", grouped=True)
    assert differences(expected, before)
    assert differences(actual, expected) == []


def test_several_steps() -> None:
    """The launch that is kept with the update is right in the next steps, too."""
    _, actual, expected = step_both(CASES["over the edges"], "codes", steps=3)
    assert int(actual.step) == 103
    assert differences(actual, expected) == []


def test_wide_blocks_are_multiplied_first() -> None:
    case = Case((100, 160), (96, 160), density=1.0)
    before = update_of(case, FP32, FP32, None)
    left, right, _ = factors(case, FP32, grouped=False, broken=False)
    actual, expected = with_stand_in(before), copy_of(before, DEVICE)
    assert not sampled_update.fuses(left, None, actual)
    sampled_update.sampled_update(left, right, None, actual)
    assert actual.grad is actual.values
    assert int(actual.step) == int(before.step) + 1
    assert not torch.equal(actual.values.cpu(), before.values)
    assert expected.topology is not None
    actual.grad = expected.grad = sampled_matmul(left, right, expected.topology)
    adamw.update_all([expected])
    assert differences(actual, expected) == []
