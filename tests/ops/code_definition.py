"""Defines a step with 8-bit moments entry by entry, in plain Python from the specification of the codes.

Only the arithmetic of AdamW on decoded moments is the rule's own.
"""

import struct
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smet_compile.ops import law
from smet_compile.ops.rules import Block
from smet_compile.optim.adamw import ADAMW

LARGEST, LEAST = 3.4028234663852886e38, 2.0**-126
OFFSETS = (889, 761)


def bits_of(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def fp32(x: float) -> float:
    return float_of(bits_of(x))


def decode(code: int, scale: float, offset: int) -> float:
    magnitude = code & 127 if offset == 889 else code
    size = fp32(scale * float_of((magnitude + offset) << 20)) if magnitude else 0.0
    return -size if offset == 889 and code >= 128 else size


def encode(x: float, scale: float, offset: int, noise: int | None) -> int:
    inverse = fp32(1 / scale) if scale else 0.0
    ratio = fp32(abs(x) * inverse)
    bits = bits_of(ratio)
    fraction = 0x80000 if noise is None else 16 * noise + 8
    magnitude = ((bits + fraction) >> 20) - offset
    if offset == 761:
        return min(255, max(magnitude, int(x > 0)))
    if bits < 890 << 20:
        smallest = float_of(890 << 20)
        up = ratio >= smallest / 2 if noise is None else noise < round(fp32(ratio * fp32(2**16 / smallest)))
        magnitude = int(up)
    return min(127, magnitude) + (128 if x < 0 else 0)


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def noise_at(seed: int, step: int, stream: int, block: int, place: int) -> int:
    """Returns 16 bits: the upper half of the first hash for the weight, both halves of the second for its moments."""
    key = mixed(mixed(seed % 2**32) ^ step % 2**32)
    block_key = mixed(mixed(block % 2**32 ^ key) ^ (block >> 32))
    word, shift = ((0, 16), (1, 0), (1, 16))[stream]
    return mixed(place ^ block_key ^ word * 0x9E3779B9) >> shift & 0xFFFF


@dataclass
class Coded:
    """Holds one flat parameter, with ``group``, ``block`` and ``place`` (block and place of noise) of each entry."""

    values: Tensor
    codes: list[Tensor]
    scales: Tensor
    place: list[tuple[int, int]]
    group: list[int]
    block: list[int]

    def step(self, grad: Tensor, ages: Tensor, step: int, seed: int | None, options: dict[str, Any]) -> int:
        """Changes it as one update would; returns the number of skipped blocks. ``ages`` by entry."""
        every = range(len(self.place))
        old = [
            torch.tensor([decode(int(c[i]), float(self.scales[m, self.group[i]]), OFFSETS[m]) for i in every])
            for m, c in enumerate(self.codes)
        ]
        tables = (
            law.step_sizes(ages.double(), options["lr"], options["density_rate"], options["warmup_steps"]),
            1 / (1 - options["beta1"] ** ages.double()),
            1 / (1 - options["beta2"] ** ages.double()),
        )
        rate, *of_age = (table.float() for table in tables)
        block = Block(self.values, grad, tuple(old), rate, tuple(of_age))
        weight, *new = ADAMW.step(block, ADAMW.named_options([options[name] for name in ADAMW.options]))
        bad = {self.block[i] for i in every if not grad[i].isfinite()}
        good = [i for i in every if self.block[i] not in bad]
        self.values[good] = weight[good]
        for m in range(2):
            self._code(
                m, [float(new[m][i] if self.block[i] not in bad else old[m][i]) for i in every], good, step, seed
            )
        return len(bad)

    def _code(self, m: int, moment: list[float], good: list[int], step: int, seed: int | None) -> None:
        changed = {self.group[i] for i in good}
        members = defaultdict(list)
        for i, group in enumerate(self.group):
            members[group].append(i)
        for group in changed:
            here = members[group]
            scale = max(min(LARGEST, abs(moment[i])) for i in here)
            scale = max(scale, LEAST) if scale else 0.0
            self.scales[m, group] = scale
            for i in here:
                noise = None if seed is None else noise_at(seed, step, m + 1, *self.place[i])
                self.codes[m][i] = encode(min(LARGEST, moment[i]), scale, OFFSETS[m], noise)
