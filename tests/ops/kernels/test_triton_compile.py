"""Triton's kernels compile for Hopper and Ampere, on any machine: in registers, within shared memory, copying ahead."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smet_compile.format import Layout, Topology, empty_lists
from smet_compile.ops.kernels.triton import supports
from tests.ops.kernels.compiling import ARCHITECTURES, SHARED_BYTES, Compiled, Launch, caught, compile_for
from tests.ops.kernels.device import compiled_only
from tests.support.pairs import pairwise

pytestmark = compiled_only
SIDES = [
    (torch.bfloat16, 128),
    (torch.bfloat16, 64),
    (torch.bfloat16, 32),
    (torch.float16, 16),
    (torch.float32, 64),
    (torch.float32, 128),
]
every_side = pytest.mark.parametrize(("dtype", "side"), SIDES, ids=str)
every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


@pytest.fixture(autouse=True)
def as_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets launches choose what they would choose on the GPU in question."""
    architecture = request.getfixturevalue("architecture")
    monkeypatch.setattr(supports, "architecture", lambda _: architecture)
    monkeypatch.setattr(supports, "num_sms", lambda _: {"hopper": 132, "ampere": 108}[architecture])


def weight(
    dtype: torch.dtype, block_shape: tuple[int, int], stack: int = 1, size: tuple[int, int] = (1024, 2048)
) -> tuple[torch.Tensor, Topology]:
    """Makes values and topology, unwritten, of a weight with a quarter of its blocks active."""
    layout = Layout.of((stack, *size), block_shape)
    num_active = layout.num_active(0.25)
    values = torch.empty(layout.values_shape(num_active), dtype=dtype)
    bits = torch.empty(-(-layout.num_blocks // 8), dtype=torch.uint8)
    return values, Topology(layout, bits, empty_lists(layout, num_active, torch.device("cpu")), num_active)


def check(compiled: Compiled, architecture: str) -> None:
    assert compiled.shared_bytes <= SHARED_BYTES[architecture]
    assert not compiled.spilled_bytes, f"{compiled.spilled_bytes} bytes of registers are spilled"


def uses_tensor_cores(compiled: Compiled, architecture: str) -> bool:
    return ("wgmma.mma_async" if architecture == "hopper" else "mma.sync") in compiled.ptx


def check_loop(compiled: Compiled, architecture: str, launch: Launch, num_indices: int) -> None:
    """Asserts what the loop does: products, then the index of a later step, then copies of 16 bytes for that step."""
    loop = compiled.loop()
    assert loop.count(r"(div|rem)\.") == 0
    assert loop.copies("10") >= 2 and loop.copies("[48]") == 0
    assert loop.count(r"ld\.global") == num_indices
    if architecture == "hopper" and uses_tensor_cores(compiled, architecture):
        assert loop.count(r"wgmma\.mma_async") == num_wgmma(launch)
        index = ["ld.global"] if num_indices else []
        assert loop.order(r"wgmma\.mma|ld\.global|cp\.async\.cg") == ["wgmma.mma", *index, "cp.async.cg"]


def num_wgmma(launch: Launch) -> int:
    """Counts the products of each group of four warps in a step in half precision: 64 rows, 16 deep, all columns."""
    if "BLOCK_I" in launch.arguments:
        rows, depth = launch.option("BLOCK_T"), launch.option("BLOCK_I")
    else:
        sides = launch.option("BLOCK_M"), launch.option("BLOCK_N")
        rows, depth = max(sides) if sides[0] < 64 else sides[0], launch.option("BLOCK_T")
    return -(-rows // (16 * launch.option("num_warps"))) * depth // 16


def num_indices(launch: Launch, side: int, transposed: bool) -> int:
    """Counts the entries of the index that a step of a masked product reads."""
    return max(1, launch.option("BLOCK_I") // side) * (1 if transposed else 2)


@pytest.mark.parametrize(
    ("architecture", "of_side", "transposed", "grouped"),
    pairwise(list(ARCHITECTURES), SIDES, [True, False], [False, True]),
    ids=str,
)
def test_masked_matmul(architecture: str, of_side: tuple[torch.dtype, int], transposed: bool, grouped: bool) -> None:
    from smet_compile.ops.kernels.triton import matmul_tiles

    dtype, side = of_side
    stack = 8 if grouped else 1
    values, topology = weight(dtype, (side, side), stack)
    input = torch.empty(4096, 2048 if transposed else 1024, dtype=dtype)
    offsets = torch.empty(stack, dtype=torch.int32) if grouped else None
    bias = torch.empty(1024 if transposed else 2048, dtype=dtype)
    with caught(matmul_tiles, "_masked_tiles") as launch:
        matmul_tiles.masked_matmul(input, values, topology, transposed, bias, offsets)
    compiled = compile_for(launch, architecture)
    check(compiled, architecture)
    check_loop(compiled, architecture, launch, num_indices(launch, side, transposed))
    assert uses_tensor_cores(compiled, architecture) == (dtype != torch.float32)


@every_side
@every_architecture
def test_sampled_matmul(architecture: str, dtype: torch.dtype, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.triton import sampled_tiles

    _, topology = weight(dtype, (side, side))
    left, right = torch.empty(4096, 1024, dtype=dtype), torch.empty(4096, 2048, dtype=dtype)
    monkeypatch.setattr(sampled_tiles, "num_splits", lambda *_: 4)
    with caught(sampled_tiles, "_add_splits") as sum_, caught(sampled_tiles, "_sampled_tiles") as launch:
        sampled_tiles.sampled_matmul(left, right, topology)
    check(compile_for(sum_, architecture), architecture)
    compiled = compile_for(launch, architecture)
    check(compiled, architecture)
    if side >= 32:  # the narrow side of 16 is 4 numbers for each thread
        check_loop(compiled, architecture, launch, 0)
    assert uses_tensor_cores(compiled, architecture) == (dtype != torch.float32)


UNALIGNED = {  # what lies so that rows do not begin at multiples of 16 bytes
    "columns": lambda rows, columns: torch.empty(rows, columns, dtype=torch.bfloat16),
    "beginning": lambda rows, columns: torch.empty(rows * columns + 1, dtype=torch.bfloat16)[1:].view(rows, columns),
    "rows": lambda rows, columns: torch.empty(rows, columns + 3, dtype=torch.bfloat16)[:, :columns],
    "transposed": lambda rows, columns: torch.empty(columns, rows, dtype=torch.bfloat16).mT,
}


@pytest.mark.parametrize(
    ("architecture", "rows", "columns", "side", "how"),
    [
        ("hopper", 2048, 5461, 128, "columns"),
        ("hopper", 2048, 5461, 64, "columns"),
        ("hopper", 2048, 5461, 32, "columns"),
        ("ampere", 2048, 5461, 128, "columns"),
        ("ampere", 5461, 2048, 64, "columns"),
        *(("hopper", 1024, 2048, 64, how) for how in list(UNALIGNED)[1:]),
        *(("ampere", 1024, 2048, 64, how) for how in list(UNALIGNED)[1:]),
    ],
)
def test_rows_that_are_not_aligned(
    architecture: str, rows: int, columns: int, side: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every factor of every product is copied 16 bytes at a time, as if its rows were aligned."""
    from smet_compile.ops.kernels.triton import matmul_tiles, sampled_tiles

    values, topology = weight(torch.bfloat16, (side, side), size=(rows, columns))
    left, right = UNALIGNED[how](4096, rows), UNALIGNED[how](4096, columns)
    for transposed, input in ((True, right), (False, left)):
        with caught(matmul_tiles, "_masked_tiles") as launch:
            matmul_tiles.masked_matmul(input, values, topology, transposed)
        compiled = compile_for(launch, architecture)
        check(compiled, architecture)
        check_loop(compiled, architecture, launch, num_indices(launch, side, transposed))
    monkeypatch.setattr(sampled_tiles, "num_splits", lambda *_: 1)
    with caught(sampled_tiles, "_sampled_tiles") as launch:
        sampled_tiles.sampled_matmul(left, right, topology)
    compiled = compile_for(launch, architecture)
    check(compiled, architecture)
    check_loop(compiled, architecture, launch, 0)


ALL_SIZES = [
    pytest.param(architecture, precision, width, sizes, id=f"{architecture}-{precision}-{width}-{sizes.tokens}")
    for (architecture, precision, width), options in supports._MASKED.items()
    for sizes in options
]


@pytest.mark.parametrize(("architecture", "precision", "width", "sizes"), ALL_SIZES)
def test_every_size_of_a_masked_product_stays_in_registers(
    architecture: str, precision: str, width: int, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smet_compile.ops.kernels.triton import matmul_tiles

    dtype = torch.bfloat16 if precision == "half" else torch.float32
    monkeypatch.setattr(matmul_tiles, "dot_precision", lambda _: "tf32")
    monkeypatch.setattr(supports, "masked_sizes", lambda *_: sizes)
    values, topology = weight(dtype, (width, width), size=(1024, 2085))
    with caught(matmul_tiles, "_masked_tiles") as launch:
        matmul_tiles.masked_matmul(torch.empty(4096, 1024, dtype=dtype), values, topology, False)
    compiled = compile_for(launch, architecture)
    check(compiled, architecture)
    assert uses_tensor_cores(compiled, architecture)
    if sizes.num_warps <= supports.WARPS_OF_TWO:
        assert 2 * compiled.shared_bytes <= SHARED_BYTES[architecture], "two fit on a multiprocessor"


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("allow_tf32")
@every_architecture
def test_tf32(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors in fp32 go to tensor cores where torch's setting lets them."""
    from smet_compile.ops.kernels.triton import matmul_tiles, sampled_tiles

    monkeypatch.setattr(sampled_tiles, "num_splits", lambda *_: 1)
    values, topology = weight(torch.float32, (64, 64))
    left, right = torch.empty(4096, 1024), torch.empty(4096, 2048)
    with caught(matmul_tiles, "_masked_tiles") as masked:
        matmul_tiles.masked_matmul(right, values, topology, True)
    with caught(sampled_tiles, "_sampled_tiles") as sampled:
        sampled_tiles.sampled_matmul(left, right, topology)
    for launch in (masked, sampled):
        compiled = compile_for(launch, architecture)
        check(compiled, architecture)
        assert uses_tensor_cores(compiled, architecture)


@pytest.mark.parametrize("packs", [False, True], ids=["unpack", "pack"])
@pytest.mark.parametrize("block_shape", [(1, 1), (1, 16), (32, 32), (128, 128)], ids=str)
@every_architecture
def test_unpack_and_pack(architecture: str, block_shape: tuple[int, int], packs: bool) -> None:
    """Writes the dense side 16 bytes at a time."""
    from smet_compile.ops.kernels.triton import expand

    values, topology = weight(torch.bfloat16, block_shape)
    name = "_expand_tiles" if min(block_shape) > 1 else "_expand_bits"
    with caught(expand, name) as launch:
        if packs:
            expand.pack(torch.empty(topology.layout.shape, dtype=torch.bfloat16), topology)
        else:
            expand.unpack(values, topology)
    compiled = compile_for(launch, architecture)
    check(compiled, architecture)
    assert packs or re.search(r"st\.global\.v4\.b32", compiled.ptx)


@pytest.mark.parametrize(("size", "grouped"), [((1, 1), False), ((32, 64), True)], ids=["", "grouped"])
@pytest.mark.parametrize("architecture", ["hopper"])
def test_sizes_that_become_constants(
    architecture: str, size: tuple[int, int], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token, one block or one row compiles, too: Triton makes a kernel of its own where an argument is 1."""
    from smet_compile.ops.kernels.triton import expand, matmul_tiles, sampled_tiles

    values, topology = weight(torch.bfloat16, (32, 32), size=size)
    sides = torch.empty(1, size[0], dtype=torch.bfloat16), torch.empty(1, size[1], dtype=torch.bfloat16)
    offsets = torch.empty(1, dtype=torch.int32) if grouped else None
    launches = []
    for transposed in (False, True):
        with caught(matmul_tiles, "_masked_tiles") as launch:
            matmul_tiles.masked_matmul(sides[transposed], values, topology, transposed, None, offsets)
        launches.append(launch)
    monkeypatch.setattr(sampled_tiles, "num_splits", lambda *_: 2)
    with caught(sampled_tiles, "_add_splits") as sum_, caught(sampled_tiles, "_sampled_tiles") as launch:
        sampled_tiles.sampled_matmul(*sides, topology, offsets)
    with caught(expand, "_expand_tiles") as tiles:
        expand.unpack(values, topology)
    values, topology = weight(torch.bfloat16, (1, 1), size=size)
    with caught(expand, "_expand_bits") as bits:
        expand.unpack(values, topology)
    for each in (*launches, launch, sum_, tiles, bits):
        compile_for(each, architecture)
