"""Describes one training run of a study as data, with everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property

from benchmarks.studies.byte_pairs import BYTES
from benchmarks.studies.corpus import STDLIB


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Describes a LLaMA, and how many tokens one step reads."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    sequence: int
    batch: int
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describes a run.

    Args:
        rate: peak learning rate α, after ``warmup`` of the steps; then ``decay``: "cosine" to a tenth, or "constant".
        plain_rate: of embeddings, output embeddings and norms, at their peak; None: as all others.
        density: 1 is dense training; then nothing below matters but ``optimizer``, ``dtype``, ``seed``, ``text`` and
            ``vocabulary``.
        block: "1", "1x16", "16": as in `pretrain`.
        sparse: "all" linear layers, or those of the "feed_forward" parts alone.
        dense_from: share of the steps after which the model becomes dense; 1: it does not.
        even: whether rows and columns of tiles fill evenly at the start, as `sparsify` has it, or by chance.
        permuted: whether each layer's tiles cover its inputs and outputs in an order of the layer's own.
        exponent: p of d^(-p). local_age: bias correction by the block's age (SMET), or by the step count (naive).
        block_warmup: W. every: ΔT, 0 for a static topology. grow: "random", "gradient".
        drop_fraction, final_drop_fraction: ζ, by cosine; equal ones are constant.
        min_age: a block that was grown is not dropped before it is so many steps old.
        seeded_moments: a grown block starts with the mean second moment of the others, instead of 0.
        optimizer: "adamw", or another of `optimizers.py`. moment_dtype, dtype: of moments and weights.
        probe: whether to follow the loss of one fixed batch around the updates.
        text: what `Corpus` reads. vocabulary: 256 for bytes; more for as many byte pairs, learnt from the text.
    """

    shape: Shape
    steps: int
    rate: float
    plain_rate: float | None = None
    warmup: float = 0.1
    decay: str = "cosine"
    density: float = 1.0
    block: str = "1"
    sparse: str = "all"
    dense_from: float = 1.0
    distribution: str = "uniform"
    rescale: bool = True
    even: bool = True
    permuted: bool = False
    exponent: float = 1.0
    local_age: bool = True
    block_warmup: int = 100
    every: int = 100
    grow: str = "random"
    drop_fraction: float = 0.2
    final_drop_fraction: float = 0.005
    stop_fraction: float = 0.75
    seeded_moments: bool = False
    optimizer: str = "adamw"
    dtype: str = "float32"
    moment_dtype: str = "float32"
    probe: bool = False
    seed: int = 0
    min_age: int = 0
    text: str = STDLIB
    vocabulary: int = BYTES

    @cached_property
    def key(self) -> str:
        """Hashes the fields that differ from the defaults, so that a new field changes no key."""
        plain = {field.name: field.default for field in fields(self)}
        special = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return hashlib.sha256(json.dumps(special, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def block_shape(self) -> tuple[int, int]:
        sides = self.block.split("x")
        return int(sides[0]), int(sides[-1])

    @classmethod
    def from_dict(cls, saved: dict) -> Case:
        return cls(**(saved | {"shape": Shape(**saved["shape"])}))
