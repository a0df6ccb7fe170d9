"""Triton's kernels compile for Hopper and Ampere, on any machine: in registers, within shared memory, copying ahead."""

import re
from collections.abc import Iterator

import pytest
import torch

from smet_compile.format import Layout, Topology, empty_lists
from tests.ops.kernels.compiling import ARCHITECTURES, SHARED_BYTES, Compiled, caught, compile_for
from tests.ops.kernels.device import compiled_only

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
    from smet_compile.ops.kernels.triton import supports

    monkeypatch.setattr(supports, "architecture", lambda _: request.getfixturevalue("architecture"))


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


def copies_16_bytes(compiled: Compiled) -> bool:
    """Tells whether copies to shared memory that no thread waits for are as wide as they can be."""
    return re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10", compiled.ptx) is not None


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@every_side
@every_architecture
def test_masked_matmul(architecture: str, dtype: torch.dtype, side: int, transposed: bool, grouped: bool) -> None:
    from smet_compile.ops.kernels.triton import matmul_tiles

    stack = 8 if grouped else 1
    values, topology = weight(dtype, (side, side), stack)
    input = torch.empty(4096, 2048 if transposed else 1024, dtype=dtype)
    offsets = torch.empty(stack, dtype=torch.int32) if grouped else None
    bias = torch.empty(1024 if transposed else 2048, dtype=dtype)
    with caught(matmul_tiles, "_masked_tiles") as launch:
        matmul_tiles.masked_matmul(input, values, topology, transposed, bias, offsets)
    compiled = compile_for(launch, architecture)
    check(compiled, architecture)
    assert copies_16_bytes(compiled)
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
    assert copies_16_bytes(compiled)
    assert uses_tensor_cores(compiled, architecture) == (dtype != torch.float32)


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("allow_tf32")
@every_architecture
def test_tf32(architecture: str) -> None:
    """Factors in fp32 go to tensor cores where torch's setting lets them."""
    from smet_compile.ops.kernels.triton import matmul_tiles, sampled_tiles

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


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("size", [(1, 1), (32, 64)], ids=str)
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
