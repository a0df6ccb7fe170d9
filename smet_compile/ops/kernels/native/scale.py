"""Implements the kernel named "cpu_scale": SCALE steps of many parameters in one call of C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.kernels.native import jobs
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.updates import Update

_RULES = ("scale", "scale_momentum")
_OPTIONS = ("momentum", "weight_decay")
_STATE = ("num_skipped", "step")
_OF_TOPOLOGY = ("bits", "positions", "group_starts")
_SIZES = ("num_blocks", "num_positions", "wide_index", "num_matrices", "rows", "cols", "block_rows", "block_cols")


class Job(ctypes.Structure):
    """Holds the arguments for one parameter. It has the members of ``Update`` in scale.cpp, in their order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "grad", "exp_avg", *_STATE, *_OF_TOPOLOGY)),
        *((name, ctypes.c_int64) for name in (*_SIZES, "bm", "bn", "units_are_columns")),
        *((name, ctypes.c_int64) for name in ("weight_kind", "moment_kind", "rounds", "seed")),
        *((name, ctypes.c_double) for name in ("rate", *_OPTIONS)),
    ]


def refusal(case: UpdateCase) -> str | None:
    """Says why ``update_all`` cannot make an update; None where it can."""
    update = case.update
    if update.rule.name not in _RULES:
        return "computes the rule scale only"
    if library("scale") is None:
        return "could not be compiled"
    if update.generation is not None or update.warmup_steps or update.initial_warmup_steps:
        return "does not take ages of blocks"
    if update.sum_over_ranks is not None or update.first_place:
        return "does not take a shard of a parameter"
    if update.layout is None or update.is_coded or not jobs.takes_tensors(update, case.is_traced):
        return "does not take parameters, gradients or optimizer state of this dtype, memory layout or device"
    return None


def update_all(updates: list[Update]) -> None:
    """Makes every update. Raises ValueError for a gradient of another dtype, shape or device than the values."""
    jobs.update_all("scale", _job, updates)


def _job(update: Update) -> Job:
    """Writes all of a job but gradient and rate."""
    return Job(
        **jobs.addresses(update, ("values", *_STATE, *_OF_TOPOLOGY)),
        **dict(zip(update.rule.options, update.options, strict=True)),
        **_geometry(update),
        units_are_columns=update.units_are_columns,
        weight_kind=jobs.KINDS[update.values.dtype],
        moment_kind=jobs.KINDS[update.slots[0].dtype] if update.slots else 0,
        rounds=update.rounds_stochastically,
        seed=update.noise_seed or 0,
    )


def _geometry(update: Update) -> dict[str, Any]:
    """Returns the numbers that say where the blocks lie. Each row of a plain parameter is a line."""
    topology, layout = update.topology, update.layout
    assert layout is not None, "the kernel is chosen only where there is one"
    of_blocks = {name: getattr(layout, name) for name in ("num_matrices", "rows", "cols", "block_rows", "block_cols")}
    bm, bn = layout.block_shape
    return of_blocks | {
        "bm": bm,
        "bn": bn,
        "num_blocks": update.values.numel() // (bm * bn),
        "num_positions": layout.num_blocks,
        "wide_index": topology is not None and topology.lists.dtype == torch.int64,
    }
