"""Hash, noise, roundings and codes of the optimizer's kernels equal the law's, bit for bit, on many inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.ops import law
from tests.ops.kernels.device import DEVICE, on_device

pytest.importorskip("triton")
import triton
import triton.language as tl

from smet_compile.ops.kernels.triton.adamw_step import (
    block_key,
    decode,
    encode,
    inverse_of,
    noise_key,
    noise_of_moments,
    noise_of_weight,
    rounded_to,
    scale_of,
)

pytestmark = on_device
COUNT = 4096


@triton.jit
def _noise(seed, step, blocks, places, out, STREAM: tl.constexpr, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    key = block_key(noise_key(tl.load(seed), tl.load(step)), tl.load(blocks + lane))
    place = tl.load(places + lane).to(tl.uint32)
    if STREAM == 0:
        noise = noise_of_weight(key, place)
    else:
        noise = noise_of_moments(key, place)[STREAM - 1]
    tl.store(out + lane, noise.to(tl.int64))


@triton.jit
def _round(x, noise, out, STOCHASTIC: tl.constexpr, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    bits = tl.load(noise + lane).to(tl.uint32)
    tl.store(out + lane, rounded_to(tl.load(x + lane), bits, out.dtype.element_ty, STOCHASTIC))


@triton.jit
def _encode(x, scale, noise, out, OFFSET: tl.constexpr, STOCHASTIC: tl.constexpr, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    bits = tl.load(noise + lane).to(tl.uint32)
    inverse = inverse_of(scale_of(tl.load(scale)))
    tl.store(out + lane, encode(tl.load(x + lane), inverse, bits, OFFSET, STOCHASTIC))


@triton.jit
def _decode(code, scale, out, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    tl.store(out + lane, decode(tl.load(code + lane), tl.load(scale), OFFSET))


def run(kernel: Any, *tensors: Tensor, dtype: torch.dtype, **constants: Any) -> Tensor:
    """Returns what the kernel writes from tensors on the CPU."""
    out = torch.empty(COUNT, dtype=dtype, device=DEVICE)
    kernel[(1,)](*(t.to(DEVICE) for t in tensors), out, COUNT=COUNT, **constants)
    return out.cpu()


def any_bits(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**32, (count,), generator=generator)


def as_float(bits: Tensor) -> Tensor:
    return bits.int().view(torch.float32)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Compares numbers by value: a NaN is a NaN, and zero has no sign."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} differ, as at {int((~same).nonzero()[0])}"


@pytest.mark.parametrize("stream", range(3))
@pytest.mark.parametrize(("seed", "step"), [(0, 1), (2**32 - 1, 2**31 + 3), (123456789, 2**40 + 5)])
def test_noise(seed: int, step: int, stream: int) -> None:
    blocks = torch.cat((torch.arange(COUNT // 2), any_bits(COUNT // 2, 1) * 999))
    places = any_bits(COUNT, 7) % 2**20
    noise = run(_noise, torch.tensor(seed), torch.tensor(step), blocks, places, dtype=torch.int64, STREAM=stream)
    keys = law.block_keys(law.noise_key(seed, torch.tensor(step)), blocks)
    assert torch.equal(noise, law.noise_bits(keys, places, stream))


@pytest.mark.parametrize("stochastic", [True, False])
def test_bfloat16(stochastic: bool) -> None:
    x, noise = as_float(any_bits(COUNT, 2)), any_bits(COUNT, 3) % 2**16
    x[:5] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    x[5:1000] = x[5:1000].bfloat16().float() * (1 + 2**-8)  # halves
    rounded = run(_round, x, noise, dtype=torch.bfloat16, STOCHASTIC=stochastic)
    assert_same_bits(rounded, law.round_stochastic(x, noise) if stochastic else x.bfloat16())


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("kind", [law.SIGNED_CODES, law.UNSIGNED_CODES], ids=["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 0.3, 3.4028234663852886e38, 1e-40])
def test_codes(scale: float, kind: law.CodeFormat, stochastic: bool) -> None:
    noise, scales = any_bits(COUNT, 4) % 2**16, law.scales_of(torch.tensor(scale))
    x = scales * torch.exp2(-40 * torch.rand(COUNT, generator=torch.Generator().manual_seed(5)))
    x[: COUNT // 4] = scales * (torch.arange(COUNT // 4) / (COUNT // 4))
    x[-1] = scales
    if kind.signed:
        x = torch.where(noise % 2 == 0, x, -x)
    constants = {"OFFSET": kind.offset, "STOCHASTIC": stochastic}
    encoded = run(_encode, x, scales, noise, dtype=torch.uint8, **constants)
    assert torch.equal(encoded, law.encode(x, scales, kind, noise if stochastic else None))
    decoded = run(_decode, encoded, scales, dtype=torch.float32, OFFSET=kind.offset)
    assert_same_bits(decoded, law.decode(encoded, scales, kind))


@pytest.mark.parametrize("kind", [law.SIGNED_CODES, law.UNSIGNED_CODES], ids=["exp_avg", "exp_avg_sq"])
def test_every_code(kind: law.CodeFormat) -> None:
    every, scale = torch.arange(COUNT).to(torch.uint8), torch.tensor(0.7)
    decoded = run(_decode, every, scale, dtype=torch.float32, OFFSET=kind.offset)
    assert_same_bits(decoded, law.decode(every, scale, kind))
