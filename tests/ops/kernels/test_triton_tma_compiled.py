"""The products that copy with TMA compile for Hopper: bulk copies by descriptors and wgmma, and little else."""

import pytest
import torch

from smet_compile.format import Layout, Topology
from smet_compile.ops.kernels.triton import supports
from tests.ops.kernels.compiling import SHARED_BYTES, Compiled, Launch, caught, compile_for
from tests.ops.kernels.device import compiled_only
from tests.support.pairs import pairwise

pytestmark = compiled_only
BF16, TOKENS = torch.bfloat16, 16384
RESERVED_BYTES, MULTIPROCESSOR_BYTES = 1024, 228 * 1024
"""Shared memory that the system takes for each program, and all there is of a Hopper multiprocessor."""
SIZES = [(1024, 2048), (2048, 5461), (5461, 2048)]
INTO_SHARED = r"cp\.async\.bulk\.tensor\.2d\.shared"
TO_GLOBAL = "cp.async.bulk.tensor.2d.global.shared"


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supports, "architecture", lambda _: "hopper")
    monkeypatch.setattr(supports, "num_sms", lambda _: 132)


def topology(size: tuple[int, int], side: int) -> Topology:
    layout = Layout.of(size, (side, side))
    torch.manual_seed(0)
    return Topology.from_mask(torch.rand(layout.num_blocks) < 0.25, layout)


def check(compiled: Compiled, launch: Launch, num_copies: int, num_indices: int) -> None:
    """Asserts that nothing spills, that programs fit side by side, and what the loop does: it computes no address."""
    assert not compiled.spilled_bytes
    programs = 1 if launch.option("num_warps") > supports.WARPS_OF_TWO else 2
    assert compiled.shared_bytes <= SHARED_BYTES["hopper"]
    assert programs * (compiled.shared_bytes + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES
    loop = compiled.loop()
    assert loop.count(INTO_SHARED) == loop.count(r"cp\.async") == num_copies
    assert loop.count(r"ld\.global") == num_indices
    assert loop.count(r"(div|rem)\.") == loop.count(r"(st|ld)\.(global|shared)") - num_indices == 0
    index = ["ld.global"] if num_indices else []
    assert loop.order(r"wgmma\.mma|ld\.global|cp\.async\.bulk") == ["wgmma.mma", *index, "cp.async.bulk"]


@pytest.mark.parametrize(
    ("size", "side", "sizes", "transposed"), pairwise(SIZES, [128, 64, 32], supports._TMA, [True, False]), ids=str
)
def test_masked(
    size: tuple[int, int], side: int, sizes: supports.MaskedSizes, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smet_compile.ops.kernels.triton import matmul_tma

    monkeypatch.setattr(supports, "tma_sizes", lambda *_: sizes)
    weight = topology(size, side)
    values = torch.empty(weight.values_shape, dtype=BF16)
    input = torch.empty(TOKENS, size[transposed], dtype=BF16)
    with caught(matmul_tma, "_masked_by_tma") as launch:
        matmul_tma.masked_matmul(input, values, weight, transposed)
    compiled = compile_for(launch, "hopper")
    check(compiled, launch, num_copies=2, num_indices=1 if transposed else 2)
    groups, depth = launch.option("num_warps") // 4, launch.option("BLOCK_I") // 16
    assert compiled.loop().count(r"wgmma\.mma_async") == sizes.tokens // 64 // groups * depth
    has_aligned_rows = size[not transposed] % 8 == 0
    assert (TO_GLOBAL in compiled.ptx) == has_aligned_rows, "rows of 5461 numbers have no descriptor"


@pytest.mark.parametrize(("size", "side", "splits"), pairwise(SIZES, [128, 64], [1, 4]), ids=str)
def test_sampled(size: tuple[int, int], side: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.triton import sampled_tma

    monkeypatch.setattr(sampled_tma, "num_splits", lambda *_: splits)
    monkeypatch.setattr(sampled_tma, "add_splits", lambda *_: None)
    left, right = (torch.empty(TOKENS, columns, dtype=BF16) for columns in size)
    with caught(sampled_tma, "_sampled_by_tma") as launch:
        sampled_tma.sampled_matmul(left, right, topology(size, side))
    compiled = compile_for(launch, "hopper")
    check(compiled, launch, num_copies=3, num_indices=0)
    groups = launch.option("num_warps") // 4
    assert compiled.loop().count(r"wgmma\.mma_async") == 2 * (side // 64 // groups) * (64 // 16)
    assert TO_GLOBAL in compiled.ptx


@pytest.mark.parametrize(
    ("tokens", "lines", "density", "expected"), [(16384, 16, 0.25, 256), (16384, 16, 0.05, 128), (2048, 8, 0.25, 128)]
)
def test_short_lines_and_few_tokens_get_smaller_programs(
    tokens: int, lines: int, density: float, expected: int
) -> None:
    """Two of 128 tokens share a multiprocessor, one with four warps."""
    work = supports.MaskedWork(tokens, 1, lines, width=128, length=density * 4096)
    sizes = supports.tma_sizes(work, 132, 2, torch.device("cuda"))
    assert (sizes.tokens, sizes.num_warps) == (expected, 8 if expected == 256 else 4)


def test_a_launch_has_no_more_programs_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest line comes first, and none is left out."""
    from smet_compile.ops.kernels.triton import matmul_tma

    weight = topology((1024, 2048), 64)
    found = matmul_tma._prepare(weight, torch.empty(TOKENS, 2048, dtype=BF16), True)
    assert found.grid == (132,) or found.grid == (264,)
    starts, order = weight.row_starts, found.lists[3]
    assert starts is not None and order is not None
    lengths = starts.diff()[order.long()].tolist()
    assert lengths == sorted(lengths, reverse=True) and sorted(order.tolist()) == list(range(16))
    few = matmul_tma._prepare(weight, torch.empty(100, 2048, dtype=BF16), True)
    assert few.grid == (16,)
