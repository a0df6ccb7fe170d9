"""Implements the kernel named "cpu_adamw": AdamW steps of many parameters in one call of C++."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP
from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.gate import GENERATIONS_OF_A_BYTE
from smet_compile.ops.kernels.native import jobs
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.updates import Update

_RULES = ("adamw", "naive_adamw")
_SLOTS = ("exp_avg", "exp_avg_sq")
_OPTIONS = ("beta1", "beta2", "eps", "weight_decay")
_STATE = ("scales", "num_skipped", "step", "generation", "births")
_OF_TOPOLOGY = ("bits", "positions", "group_starts")


class Job(ctypes.Structure):
    """Holds the arguments for one parameter. It has the members of ``Update`` in adamw.cpp, in their order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "grad", *_SLOTS, *_STATE, *_OF_TOPOLOGY)),
        *((name, ctypes.c_int64) for name in ("num_blocks", "num_positions", "block_size", "num_births")),
        *((name, ctypes.c_int64) for name in ("generation_bytes", "wide_index", "num_groups", "blocks_per_group")),
        *((name, ctypes.c_int64) for name in ("weight_kind", "moment_kind", "warmup_steps")),
        *((name, ctypes.c_int64) for name in ("initial_warmup_steps", "shared_step", "rounds", "seed", "first_place")),
        *((name, ctypes.c_double) for name in ("rate", *_OPTIONS)),
    ]


def refusal(case: UpdateCase) -> str | None:
    """Says why ``update_all`` cannot make an update; None where it can."""
    if case.update.rule.name not in _RULES:
        return "computes the rule adamw only"
    if library("adamw") is None:
        return "could not be compiled"
    if _takes(case.update, case.is_traced):
        return None
    return "does not take parameters, gradients or optimizer state of this dtype, memory layout or device"


def update_all(updates: list[Update]) -> None:
    """Makes every update. Raises ValueError for a gradient of another dtype, shape or device than the values."""
    jobs.update_all("adamw", _job, updates)


def _takes(update: Update, is_traced: bool) -> bool:
    """Tells whether this kernel takes the tensors of an update. ``is_traced``: they are fake."""
    generation, births = update.generation, update.births
    return (
        jobs.takes_tensors(update, is_traced)
        and len(update.slots) == len(_SLOTS)
        and (births is None or births.dtype == torch.int64)
        and (generation is None or births is None or _has_table(generation, births))
    )


def _has_table(generation: Tensor, births: Tensor) -> bool:
    if generation.dtype == torch.uint8:
        return births.numel() >= GENERATIONS_OF_A_BYTE  # as many are looked up at once
    return generation.dtype in (torch.int16, torch.int32)


def _job(update: Update) -> Job:
    """Writes all of a job but gradient and rate."""
    values, generation, births = update.values, update.generation, update.births
    return Job(
        **jobs.addresses(update, ("values", *_STATE, *_OF_TOPOLOGY)),
        **dict(zip(update.rule.options, update.options, strict=True)),
        **_geometry(update),
        num_births=0 if births is None else births.numel(),
        generation_bytes=0 if generation is None else generation.element_size(),
        weight_kind=jobs.KINDS[values.dtype],
        moment_kind=jobs.KINDS[update.slots[0].dtype],
        warmup_steps=update.warmup_steps,
        initial_warmup_steps=update.initial_warmup_steps,
        shared_step=update.rule.shared_step,
        rounds=update.rounds_stochastically,
        seed=update.noise_seed or 0,
        first_place=update.first_place,
    )


def _geometry(update: Update) -> dict[str, Any]:
    """Returns the numbers that say where the blocks lie. Each entry of a plain parameter is a block."""
    topology, num_entries = update.topology, update.values.numel()
    if topology is None:
        return {
            "num_blocks": num_entries,
            "num_positions": num_entries,
            "num_groups": -(-num_entries // WEIGHTS_OF_A_GROUP),
            "blocks_per_group": WEIGHTS_OF_A_GROUP,
            "block_size": 1,
        }
    layout = topology.layout
    return {
        "wide_index": topology.lists.dtype == torch.int64,
        "num_blocks": topology.num_active,
        "num_positions": layout.num_blocks,
        "num_groups": layout.num_groups,
        "blocks_per_group": layout.blocks_per_group,
        "block_size": math.prod(layout.block_shape),
    }
