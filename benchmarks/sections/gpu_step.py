"""Measures a training step of LLaMA-350m's shapes on a GPU against dense ``torch.compile``, and its peak memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.measuring import MIB
from benchmarks.peak import Peak
from benchmarks.sections.step import QUICK_SHAPE, measure
from benchmarks.settings import Settings
from benchmarks.tables import AWAITS_GPU, Row, Table, at_least, at_most
from benchmarks.training import FUSED, Recipe, Shape, Training, static_shapes, training

TARGETS = {128: at_least(1.8), 64: at_least(1.5)}
MEMORY = at_most(1.05)
MEMORY_BLOCK = 64
SHAPE = Shape(hidden=1024, intermediate=2736, heads=16, layers=24, vocabulary=32000, sequence=256, batch=64)
FEW_TOKENS = {"sequence": 32, "batch": 1}
DTYPE = torch.bfloat16
NOTE = (
    "LLaMA-350m's shapes, bf16 weights and moments, {batch} sequences of {sequence} tokens, density 0.25, fused "
    'update, beside dense `torch.compile` with torch\'s fused AdamW. "bound" counts operations alone.'
)
MEMORY_NOTE = (
    "The most that tensors hold during a step, over weights, gradients that are kept, two moments, and where the "
    "blocks lie. 32 tokens, so that activations are next to nothing."
)


def tables(settings: Settings) -> list[Table]:
    place = settings.on_gpu()
    shape = settings.size(SHAPE, QUICK_SHAPE)
    if place is None:
        rows = [Row(f"{block} tiles", target=target, unmeasured=AWAITS_GPU) for block, target in TARGETS.items()]
    else:
        variants = {(FUSED, block): target for block, target in TARGETS.items()}
        rows = measure(shape, DTYPE, variants, place)
        training.cache_clear()
    return [
        Table("Training step on a GPU", "dense / sparse", NOTE.format(**vars(shape)), rows),
        Table("Peak memory on a GPU", "peak / formula", MEMORY_NOTE, [_memory_row(shape, place)]),
    ]


def _memory_row(shape: Shape, place: Settings | None) -> Row:
    what = f"{FUSED}, {MEMORY_BLOCK} tiles"
    if place is None:
        return Row(what, target=MEMORY, unmeasured=AWAITS_GPU)
    peak = Peak(place.device)
    with static_shapes():
        run = Training(Recipe(FUSED, replace(shape, **FEW_TOKENS), MEMORY_BLOCK, DTYPE, place.device))
        for _ in range(3):
            peak.restart()
            run.step()
    found, formula = peak.bytes, run.formula_bytes()
    more = {"peak, MiB": f"{found / MIB:.0f}", "formula, MiB": f"{formula / MIB:.0f}"}
    return Row(what, run.kernels, [found / formula], MEMORY, more)
