"""The optimizer's kernels compile for Hopper and Ampere, without a GPU, in the registers and the memory that there are."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.kernels.device import compiled_only

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smet_compile.ops.kernels.triton import adamw, adamw_columns, configs, sampled_adamw

pytestmark = compiled_only

BF16, FP32, FP16, CODES = tl.bfloat16, tl.float32, tl.float16, tl.uint8
STORED = {
    "bf16, fp32": (BF16, FP32, True),
    "bf16 to nearest, fp32": (BF16, FP32, False),
    "bf16, bf16": (BF16, BF16, True),
    "bf16, codes": (BF16, CODES, True),
    "fp32, fp32": (FP32, FP32, False),
    "fp32, codes": (FP32, CODES, True),
    "fp16, fp32": (FP16, FP32, False),
}
KINDS = [adamw_columns.BLOCK, adamw_columns.BLOCKS, adamw_columns.GROUP_OF_WEIGHTS, adamw_columns.GROUP_OF_RUNS]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
ARCHITECTURES = {80: "ampere", 90: "hopper"}


def compiled(
    kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any], folder: Path, **options: Any
) -> tuple[str, int]:
    """PTX, and the bytes of registers that spill. ``pointers`` and ``constants`` in the order of the arguments."""
    types = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(types) if name in pointers}
    source = ASTSource(kernel, types, constants, aligned)
    options |= {"enable_fp_fusion": False}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert binary.metadata.shared <= SHARED_BYTES[capability]
    (folder / "kernel.ptx").write_text(binary.asm["ptx"])
    target = re.search(r"\.target (\w+)", binary.asm["ptx"])
    assert target
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "-fmad=false", f"--gpu-name={target[1]}", folder / "kernel.ptx", "-o", folder / "cubin"]
    report = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    assert spilled, report
    return binary.asm["ptx"], sum(map(int, spilled))


def update_constants(stored: str, kind: Any) -> dict[str, Any]:
    weight, moment, stochastic = STORED[stored]
    return {
        "DTYPES": (weight, weight, moment),
        "INDEX": tl.int32,
        "GENERATION": tl.uint8,
        "KINDS": tuple(number in (adamw_columns.ENTRIES.value, kind.value) for number in range(5)),
        "STOCHASTIC": stochastic,
    }


def num_warps(stored: str) -> int:
    return adamw._NUM_WARPS[STORED[stored][1] == CODES]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_prepare(capability: int, tmp_path: Path) -> None:
    pointers = {"table": "*i64", "rates": "*fp32"}
    _, spilled = compiled(adamw.prepare, capability, pointers, {"GENERATIONS": 256}, tmp_path, num_warps=1)
    assert spilled == 0


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("stored", STORED)
def test_update(stored: str, kind: int, tmp_path: Path) -> None:
    pointers = {"table": "*i64", "rates": "*fp32", "work": "*i32"}
    capability = (80, 90)[(kind + list(STORED).index(stored)) % 2]
    constants = update_constants(stored, KINDS[kind])
    ptx, spilled = compiled(
        adamw.update, capability, pointers, constants, tmp_path, num_warps=num_warps(stored), num_stages=3
    )
    assert spilled == 0
    assert "fma.rn.f32" not in ptx, "rounds otherwise than the reference"
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, "reads and writes 16 bytes at a time"


SAMPLED_POINTERS = {"table": "*i64", "rates": "*fp32", "positions": "*i32", "row_starts": "*i32"}


@pytest.mark.parametrize(
    ("capability", "side", "stored"),
    [
        (90, 128, "bf16, fp32"),
        (90, 128, "bf16, codes"),
        (90, 64, "bf16, codes"),
        (90, 32, "bf16, bf16"),
        (90, 64, "fp32, fp32"),
        (80, 128, "bf16, fp32"),
        (80, 128, "bf16, codes"),
        (80, 64, "bf16, fp32"),
        (80, 32, "bf16, codes"),
    ],
)
def test_sampled(capability: int, side: int, stored: str, tmp_path: Path) -> None:
    weight = STORED[stored][0]
    name, factor = ("bf16", torch.bfloat16) if weight == BF16 else ("fp32", torch.float32)
    config = configs.sampled(ARCHITECTURES[capability], factor, "tf32", side)
    columns = max(config.columns, configs.lanes(side))
    constants = update_constants(stored, adamw_columns.BLOCK)
    del constants["KINDS"]
    constants |= {
        "offsets": None,
        "left_stride_r": 1,
        "right_stride_c": 1,
        "WIDTH_M": side,
        "WIDTH_N": side,
        "BLOCK_M": configs.lanes(side),
        "BLOCK_N": columns,
        "LANES_N": configs.lanes(side),
        "BLOCK_T": config.tokens,
        "ALIGNED_M": side,
        "ALIGNED_N": side,
        "LINES_TOGETHER": 8,
        "PRECISION": "tf32",
        "PARTS": sampled_adamw.num_parts(configs.lanes(side), columns, config.num_warps),
        "ALIGNED": True,
    }
    pointers = {**SAMPLED_POINTERS, "left": f"*{name}", "right": f"*{name}"}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    _, spilled = compiled(sampled_adamw._sampled_adamw, capability, pointers, constants, tmp_path, **options)
    assert spilled == 0
