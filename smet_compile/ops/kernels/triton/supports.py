"""Tells what Triton's kernels can do on a device, and with which sizes. Nothing here imports Triton.

Sizes are those of a program's piece of work, its warps and its pipeline stages. They follow from shared memory (227 KiB
of a multiprocessor on Hopper, 163 KiB on Ampere), from 255 registers per thread, and from reuse: a step of a product
(a, k) by (k, c) reads k (a + c) numbers for k a c multiply-adds, so narrow tiles are taken with many tokens, or several
at once. They depend on shapes and on the kind of device alone, never on a timing, so a run can be repeated bit for bit.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from smet_compile.format import Layout
from smet_compile.ops.tile_speed import tile_speed

OPS = ("masked_matmul", "sampled_matmul", "unpack", "pack")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)
"""Compute capability of Ampere: the first with bf16, tf32 and copies that do not wait."""
_SMS_OF_INTERPRETER = 4
WIDEST = 128
"""Wider blocks are taken in parts."""
NARROWEST = 16
"""Least width of a product on tensor cores; narrower blocks are padded."""
_FEWEST_LANES = 8
_MOST_SPLITS = 16
_COST_OF_A_SPLIT = 1000
"""Multiply-adds that take as long as writing and reading one fp32: some 8 bytes at 3 TB/s, beside 350 T a second."""
WARPS_OF_TWO = 4
"""Warps of a program whose registers leave room for another: at most 255 for each of 128 threads, of 65,536."""
_SHARED_BYTES = 160 * 2**10
"""Shared memory of a multiprocessor, for programs in pairs: what Ampere has, so that both choose alike."""


def supports(op: str, device: torch.device, dtype: torch.dtype, layout: Layout, has_offsets: bool) -> bool:
    """Tells whether ``op``, one of ``OPS``, runs in Triton there, for tensors of ``dtype``.

    Tokens sorted by matrix (``has_offsets``) are multiplied for tiles alone; the other kinds of block would have to
    wait for the offsets. The CPU counts where Triton interprets its kernels (``TRITON_INTERPRET=1``).
    """
    if op not in OPS or dtype not in _DTYPES or not runs_on(device):
        return False
    return layout.tiles or not has_offsets


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Tells whether Triton is installed and its kernels run on the device, which must be of Ampere or newer."""
    return missing(device) is None


def missing(device: torch.device) -> str | None:
    """Says what Triton's kernels would need on the device; None where they run."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if _is_installed() else "needs Triton, which is not installed"
    if device.type != "cuda":
        return "runs on CUDA GPUs only"
    if torch.version.hip is not None:
        return "is not written for AMD GPUs"
    if not _is_installed():
        return "needs Triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"needs a GPU of compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None


@functools.cache
def num_sms(device: torch.device) -> int:
    """Counts the streaming multiprocessors of ``device``."""
    if device.type != "cuda":
        return _SMS_OF_INTERPRETER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def architecture(device: torch.device) -> str:
    """Returns the row of the tables below that fits: "interpreter", "ampere", or "hopper" and what has its memory.

    Consumer cards of the generation after (sm_120) have less than half of that shared memory, and get the smaller row.
    """
    if device.type != "cuda":
        return "interpreter"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


@functools.cache
def _has_one_gpu() -> bool:
    return torch.cuda.device_count() == 1


class _OnDevice:
    """Launches a kernel while a device is current, which is where Triton launches."""

    def __init__(self, kernel: Any, device: torch.device) -> None:
        self.kernel = kernel
        self.device = device

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with torch.cuda.device(self.device):
                self.kernel[grid](*args, **kwargs)

        return run


def on_device(kernel: Any, device: torch.device) -> Any:
    """Returns ``kernel`` as one that is launched on ``device``: unchanged where no other device can be current."""
    return kernel if device.type == "cpu" or _has_one_gpu() else _OnDevice(kernel, device)


def tiles_are_profitable(dtype: torch.dtype, layout: Layout, density: float) -> bool:
    """Tells whether multiplying active tiles alone is faster than a dense product with the expanded weight."""
    speed = tile_speed(dtype, layout)
    return speed is not None and density < speed


class MaskedSizes(NamedTuple):
    """Holds the sizes of masked_matmul: a step multiplies ``tokens`` tokens by ``inner`` weights of each output.

    Of several, those of fewer tokens are for products with too few programs for all multiprocessors, or short lines.
    """

    tokens: int
    inner: int
    num_warps: int
    num_stages: int


class SampledSizes(NamedTuple):
    """Holds the sizes of sampled_matmul: ``tokens`` of a step, for a block row by ``columns`` of one or more tiles."""

    columns: int
    tokens: int
    num_warps: int
    num_stages: int


_MASKED = {
    ("hopper", "half", 32): (MaskedSizes(256, 64, 8, 3), MaskedSizes(128, 64, 4, 4), MaskedSizes(64, 64, 4, 4)),
    ("hopper", "half", 64): (MaskedSizes(256, 32, 8, 4), MaskedSizes(128, 64, 4, 4), MaskedSizes(64, 64, 4, 4)),
    ("hopper", "half", 128): (MaskedSizes(256, 64, 8, 4), MaskedSizes(128, 64, 4, 3), MaskedSizes(64, 64, 4, 4)),
    ("hopper", "tf32", 32): (MaskedSizes(128, 32, 4, 4), MaskedSizes(64, 32, 4, 4)),
    ("hopper", "tf32", 64): (MaskedSizes(128, 32, 4, 4), MaskedSizes(64, 32, 4, 4)),
    ("hopper", "tf32", 128): (MaskedSizes(128, 32, 8, 4), MaskedSizes(64, 32, 4, 4)),
    ("ampere", "half", 32): (MaskedSizes(128, 64, 4, 4), MaskedSizes(64, 64, 4, 4)),
    ("ampere", "half", 64): (MaskedSizes(128, 64, 4, 4), MaskedSizes(64, 64, 4, 4)),
    ("ampere", "half", 128): (MaskedSizes(128, 32, 4, 4), MaskedSizes(64, 32, 4, 4)),
    ("ampere", "tf32", 32): (MaskedSizes(128, 32, 4, 4), MaskedSizes(64, 32, 4, 4)),
    ("ampere", "tf32", 64): (MaskedSizes(128, 32, 4, 3), MaskedSizes(64, 32, 4, 4)),
    ("ampere", "tf32", 128): (MaskedSizes(128, 32, 8, 3), MaskedSizes(64, 32, 4, 3)),
}
_MASKED_WITHOUT_TENSOR_CORES = (MaskedSizes(64, 16, 8, 3),)
_SAMPLED = {
    ("hopper", "half", 32): SampledSizes(256, 64, 8, 3),
    ("hopper", "half", 64): SampledSizes(256, 32, 8, 4),
    ("hopper", "half", 128): SampledSizes(128, 64, 8, 3),
    ("hopper", "tf32", 32): SampledSizes(128, 32, 4, 4),
    ("hopper", "tf32", 64): SampledSizes(128, 32, 4, 4),
    ("hopper", "tf32", 128): SampledSizes(128, 32, 8, 4),
    ("ampere", "half", 32): SampledSizes(128, 64, 4, 3),
    ("ampere", "half", 64): SampledSizes(128, 64, 4, 3),
    ("ampere", "half", 128): SampledSizes(128, 32, 8, 4),
    ("ampere", "tf32", 32): SampledSizes(128, 32, 4, 3),
    ("ampere", "tf32", 64): SampledSizes(128, 32, 4, 3),
    ("ampere", "tf32", 128): SampledSizes(128, 32, 8, 3),
}
_SAMPLED_WITHOUT_TENSOR_CORES = SampledSizes(64, 16, 8, 3)
_MASKED_INTERPRETED = (MaskedSizes(64, 32, 4, 1),)
_SAMPLED_INTERPRETED = SampledSizes(32, 64, 4, 1)


def lanes(width: int) -> int:
    """Returns the lanes of a program for a block of ``width``: a power of two, from ``NARROWEST`` to ``WIDEST``."""
    return min(WIDEST, max(NARROWEST, 1 << (width - 1).bit_length()))


def _row(architecture: str, dtype: torch.dtype, precision: str, width: int) -> tuple[str, str, int]:
    return architecture, "half" if dtype.itemsize == 2 else precision, max(32, lanes(width))


_TMA = (MaskedSizes(256, 64, 8, 4), MaskedSizes(128, 64, 4, 3))
"""Sizes of the kernels that copy with TMA. Two programs of 128 tokens share a multiprocessor, for short lines."""
_TMA_INTERPRETED = MaskedSizes(64, 32, 4, 1)
_TMA_SIDES = (32, 64, 128)


class MaskedWork(NamedTuple):
    """Describes what one masked product has to do.

    Args:
        tokens: of all matrices. groups: parts of the tokens that are cut into programs each for itself.
        lines: lines of blocks, or parts of wide ones, that each token meets. width: of a line, in outputs.
        length: inputs that a line sums over, on average.
    """

    tokens: int
    groups: int
    lines: int
    width: int
    length: float


def masked_sizes(device: torch.device, dtype: torch.dtype, precision: str, work: MaskedWork) -> MaskedSizes:
    """Returns the sizes of the least estimated time."""
    kind = architecture(device)
    if kind == "interpreter":
        return _MASKED_INTERPRETED[0]
    known = _MASKED.get(_row(kind, dtype, precision, work.width), _MASKED_WITHOUT_TENSOR_CORES)
    sms = num_sms(device)
    return min(known, key=lambda sizes: masked_cost(sizes, work, sms, dtype.itemsize))


def tma_sizes(work: MaskedWork, sms: int, item_bytes: int, device: torch.device) -> MaskedSizes:
    """Returns ``masked_sizes`` for copies with TMA."""
    if architecture(device) == "interpreter":
        return _TMA_INTERPRETED
    return min(_TMA, key=lambda sizes: masked_cost(sizes, work, sms, item_bytes))


def tma_refusal(op: str, device: torch.device, dtype: torch.dtype, layout: Layout, has_offsets: bool) -> str | None:
    """Says why a product is not computed with TMA, which Hopper cards have; None where it is."""
    if layout.num_matrices > 1 or has_offsets:
        return "multiplies one matrix, not a stack"
    sides = _TMA_SIDES if op == "masked_matmul" else _TMA_SIDES[1:]
    if not all(side in sides for side in layout.block_shape):
        return f"multiplies tiles with sides of {' or '.join(map(str, sides))} only"
    if dtype.itemsize != 2:
        return "multiplies bf16 and fp16 only"
    if not runs_on(device):
        return missing(device)
    if not _has_descriptors():
        return "needs a Triton with tensor descriptors, 3.4 or newer"
    if architecture(device) == "ampere":
        return "needs the TMA and the shared memory of a GPU of compute capability 9.0 or 10.0"
    return None


@functools.cache
def _has_descriptors() -> bool:
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def masked_cost(sizes: MaskedSizes, work: MaskedWork, sms: int, item_bytes: int) -> float:
    """Estimates the time of a masked product, in numbers that one multiprocessor reads.

    Programs are bound by what they read, from the L2 cache. A multiprocessor that has two at a time fills and drains
    the pipeline of one behind the products of the other.
    """
    per_input = sizes.tokens + lanes(work.width)
    programs = work.lines * work.groups * math.ceil(work.tokens / work.groups / sizes.tokens)
    in_flight = (sizes.num_stages - 1) * sizes.inner
    is_alone = sizes.num_warps > WARPS_OF_TWO or 2 * in_flight * per_input * item_bytes > _SHARED_BYTES
    return math.ceil(programs / sms) * per_input * (work.length + is_alone * in_flight)


def sampled_sizes(device: torch.device, dtype: torch.dtype, precision: str, width: int) -> SampledSizes:
    """Returns the sizes for blocks of ``width`` columns."""
    kind = architecture(device)
    if kind == "interpreter":
        return _SAMPLED_INTERPRETED
    return _SAMPLED.get(_row(kind, dtype, precision, width), _SAMPLED_WITHOUT_TENSOR_CORES)


def inner_step(width: int, wanted: int) -> tuple[int, int]:
    """Returns the weights of a step along blocks of ``width``, and the lanes that a block takes there.

    A step has a part of one block, or several whole ones, padded to a power of two.
    """
    divisor = math.gcd(width, wanted)
    if divisor == wanted or (width > wanted and divisor >= NARROWEST):
        return divisor, width
    padded = max(_FEWEST_LANES, 1 << (width - 1).bit_length())
    return wanted, padded


def num_splits(at_once: int, layout: Layout, tokens: int, num_active: int, blocks_together: int, step: int) -> int:
    """Returns in how many parts to sum the ``tokens`` of a matrix, so that the estimated time is the least.

    Time is counted in multiply-adds of one output. Programs of ``blocks_together`` blocks run in rounds of ``at_once``,
    and each part of a sum has to be written and read.
    """
    bm, bn = layout.block_shape
    if num_active == 0:
        return 1
    lines = min(num_active, layout.num_matrices * layout.block_rows)
    parts_of_block = -(-bm // WIDEST) * -(-bn // WIDEST)
    programs = parts_of_block * (num_active / blocks_together + lines * (1 - 1 / blocks_together) / 2)

    def cost(splits: int) -> float:
        rounds = math.ceil(programs * splits / at_once)
        return rounds * at_once / programs * tokens / splits + (splits > 1) * splits * _COST_OF_A_SPLIT

    most = max(1, min(_MOST_SPLITS, tokens // (4 * step)))
    return min(range(1, most + 1), key=cost)
