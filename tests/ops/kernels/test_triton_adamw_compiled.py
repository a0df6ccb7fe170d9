"""The optimizer's kernels compile for Hopper and Ampere, on any machine: in registers, and within shared memory."""

import pytest
import torch

from tests.ops.kernels import compiling
from tests.ops.kernels.adamw_cases import Case, update_of
from tests.ops.kernels.compiling import ARCHITECTURES, SHARED_BYTES, caught, caught_step, compile_for
from tests.ops.kernels.device import compiled_only

pytestmark = compiled_only

BF16, FP32, CODES = torch.bfloat16, torch.float32, torch.uint8
STORED = {
    "bf16, fp32": (BF16, FP32, 5),
    "bf16 to nearest, fp32": (BF16, FP32, None),
    "bf16, bf16": (BF16, BF16, 5),
    "bf16, codes": (BF16, CODES, 5),
    "fp32, fp32": (FP32, FP32, None),
    "fp32, codes": (FP32, CODES, None),
    "fp16, fp32": (torch.float16, FP32, None),
}
CASES = {
    "weights": Case((64, 256), (1, 1)),
    "runs": Case((64, 256), (1, 64)),
    "small tiles": Case((64, 256), (16, 16)),
    "tiles": Case((256, 512), (128, 128)),
}
PLAIN = Case((1024,))
UPDATES = [  # kernels of the default and those with codes are the largest; of the others, each kind of block has two
    (stored, case)
    for number, stored in enumerate(STORED)
    for place, case in enumerate(CASES)
    if stored == "bf16, fp32" or "codes" in stored or number % 2 == place % 2
]


@pytest.fixture(autouse=True)
def tables_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling._POINTERS, torch.int64, "*i64")
    monkeypatch.setitem(compiling._POINTERS, torch.float64, "*fp64")


def check(launch: compiling.Launch, architecture: str) -> str:
    """Returns the PTX of a kernel that fits, built with all options that it is launched with."""
    assert launch.arguments["enable_fp_fusion"] is False, "it must round as the law does"
    compiled = compile_for(launch, architecture)
    assert compiled.shared_bytes <= SHARED_BYTES[architecture]
    assert not compiled.spilled_bytes, f"{compiled.spilled_bytes} bytes of registers are spilled"
    return compiled.ptx


@pytest.mark.parametrize(("stored", "case"), UPDATES)
def test_update(stored: str, case: str) -> None:
    """Plain parameters and blocks of one kind share a launch; each architecture sees every kind and all dtypes."""
    number = list(STORED).index(stored) + list(CASES).index(case)
    updates = [update_of(each, *STORED[stored]) for each in (CASES[case], PLAIN)]
    launches = caught_step(updates)
    update, listed = launches["update"], launches["write_places"]
    ptx = check(update, list(ARCHITECTURES)[number % 2])
    entries_of_a_thread = 1024 // (32 * update.option("num_warps"))
    width = "v4" if entries_of_a_thread * (4 if "fp32" in stored else 2) >= 16 else "v2"
    assert f"ld.global.{width}.b32" in ptx and f"st.global.{width}.b32" in ptx
    has_noise = STORED[stored][2] is not None
    assert bool(listed.arguments) == (has_noise and case == "weights")
    if number < 2:
        check(launches["prepare"], list(ARCHITECTURES)[number])
    if listed.arguments:
        compile_for(listed, list(ARCHITECTURES)[number % 2])


@pytest.mark.parametrize(
    ("architecture", "side", "stored"),
    [
        ("hopper", 128, "bf16, fp32"),
        ("hopper", 128, "bf16, codes"),
        ("hopper", 64, "bf16, codes"),
        ("hopper", 32, "bf16, bf16"),
        ("hopper", 64, "fp32, fp32"),
        ("ampere", 128, "bf16, fp32"),
        ("ampere", 128, "bf16, codes"),
        ("ampere", 64, "bf16, fp32"),
        ("ampere", 32, "bf16, codes"),
    ],
)
def test_sampled(architecture: str, side: int, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.triton import (
        adamw,
        adamw_tables,
        matmul_tiles,
        sampled_tiles,
        sampled_update,
        supports,
    )

    monkeypatch.setattr(supports, "architecture", lambda _: architecture)
    assert matmul_tiles.dot_precision(BF16) == "tf32"
    monkeypatch.setattr(sampled_tiles, "dot_precision", lambda _: "tf32")
    monkeypatch.setattr(sampled_tiles, "num_splits", lambda *_: 1)
    case = Case((512, 1024), (side, side), density=0.25)
    one = update_of(case, *STORED[stored], broken=False)
    one.grad = one.values
    left, right = (torch.empty(512, size, dtype=one.values.dtype) for size in case.shape)
    with (
        caught(adamw_tables, "_write_addresses"),
        caught(adamw, "prepare"),
        caught(sampled_update, "_sampled_update") as fused,
    ):
        sampled_update.sampled_update(left, right, None, one)
    ptx = check(fused, architecture)
    assert ("wgmma.mma_async" if architecture == "hopper" else "mma.sync") in ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_addresses(architecture: str) -> None:
    """Gradients and rates are arguments of the launch, of which a CUDA graph keeps the addresses."""
    from smet_compile.ops.kernels.triton import adamw_tables

    rate, grads = torch.zeros(1, dtype=torch.float64), [torch.zeros(64, dtype=BF16), torch.zeros(65)[1:]]
    with caught(adamw_tables, "_write_addresses") as write:
        adamw_tables.write_step_table(grads, [rate, rate], torch.device("cpu"))
    ptx = compile_for(write, architecture).ptx
    assert ptx.count("_param_") > 2 * len(grads) and ptx.count("st.global") >= 2 * len(grads)
