"""An optimizer step with noise or codes takes few instructions a weight on Hopper, counted in the machine code.

Counted is what a thread does in the loops for aligned tensors, by the weights that it has in each. What a program does
once, for thousands of weights, and paths that numbers rarely take (a division of tiny numbers) are not in it.
"""

from typing import NamedTuple

import pytest
import torch

from tests.ops.kernels import compiling
from tests.ops.kernels.adamw_cases import Case, update_of
from tests.ops.kernels.compiling import CUOBJDUMP, caught_step, compile_for
from tests.ops.kernels.device import compiled_only
from tests.ops.kernels.sass import Loop, machine_code, outer_loops

pytestmark = [compiled_only, pytest.mark.skipif(not CUOBJDUMP.exists(), reason="nothing here reads machine code")]

BF16, FP32, CODES = torch.bfloat16, torch.float32, torch.uint8
TILES, SINGLES = Case((256, 512), (128, 128)), Case((512, 512), (1, 1))
AT_ONCE, SCANNED_AT_ONCE = 1024, 4096


class Stored(NamedTuple):
    """Holds dtypes of weights and moments, and the most instructions for a weight in tiles, and for a single one."""

    weights: torch.dtype
    moments: torch.dtype
    limit: float
    limit_of_singles: float


STORED = {
    "bf16, fp32": Stored(BF16, FP32, 90, 87),
    "bf16, bf16": Stored(BF16, BF16, 90, 109),
    "bf16, codes": Stored(BF16, CODES, 150, 193),
    "fp32, codes": Stored(FP32, CODES, 150, 179),
}


@pytest.fixture(autouse=True)
def tables_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling._POINTERS, torch.int64, "*i64")


def per_weight(case: Case, stored: Stored) -> float:
    """Counts the instructions of the loops through one piece."""
    update = caught_step([update_of(case, stored.weights, stored.moments)])["update"]
    compiled = compile_for(update, "hopper")
    assert not compiled.spilled_bytes
    loops = outer_loops(machine_code(compiled.cubin, CUOBJDUMP))
    is_single, is_coded = case is SINGLES, stored.moments == CODES
    num_loops = (0 if is_single else 1) + (2 if is_coded else 1)  # a scan for gradients, largest moments, the step
    groups = is_single and is_coded
    assert len(loops) == num_loops * (1 if groups else 2), "one for aligned tensors, and one for others"
    usual = loops[:num_loops]
    check_order(usual, wide=not groups)
    threads = 32 * update.option("num_warps")
    sizes = [AT_ONCE if is_single or number else SCANNED_AT_ONCE for number in range(num_loops)]
    return sum(loop.count * threads / size for loop, size in zip(usual, sizes, strict=True))


def check_order(loops: list[Loop], wide: bool) -> None:
    """The last loop stores; with aligned tensors it writes several numbers at once."""
    assert [loop.has("STG") for loop in loops] == [False] * (len(loops) - 1) + [True]
    assert all(loop.has("LDG") for loop in loops)
    assert loops[-1].has(r"STG\.E\.(64|128)") == wide


@pytest.mark.parametrize("name", STORED)
def test_tiles(name: str) -> None:
    assert per_weight(TILES, STORED[name]) <= STORED[name].limit


@pytest.mark.parametrize("name", STORED)
def test_single_weights(name: str) -> None:
    """They look up ages and places, each its own; and with codes, their groups begin anywhere."""
    assert per_weight(SINGLES, STORED[name]) <= STORED[name].limit_of_singles
