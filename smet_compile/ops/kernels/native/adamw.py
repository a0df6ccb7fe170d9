"""Implements the kernel named "cpu_adamw": AdamW steps of many parameters in one call of C++.

A parameter's addresses and numbers are written into a struct once for each ``Update`` object. From step to step only
the address of its gradient and its rate change there.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smet_compile.format import WEIGHTS_OF_A_GROUP
from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.gate import GENERATIONS_OF_A_BYTE
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.updates import Update

_RULES = ("adamw", "naive_adamw")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_PLAIN = (Tensor, nn.Parameter)
_PREPARED, _BATCH = "cpu_adamw", "cpu_adamw, with others"

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


class _Prepared(NamedTuple):
    """Holds a parameter's struct without gradient and rate, and the dtype and shape that gradients must have."""

    job: Job
    dtype: torch.dtype
    shape: torch.Size


class _Batch(NamedTuple):
    """Holds the structs of several updates that are made together; kept while these come again in the same order.

    Args:
        prepared: what each update keeps. array: copies of their structs. jobs: the elements of the array.
        changed: every tensor that the updates change.
    """

    prepared: list[_Prepared]
    array: ctypes.Array[Job]
    jobs: list[Job]
    changed: list[Tensor]


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
    if not updates:
        return
    batch = _find_batch(updates)
    copies = []  # of gradients, alive until all is done
    lr: Tensor | None = None
    number: float | None = None
    for update, job, (_, dtype, shape) in zip(updates, batch.jobs, batch.prepared, strict=True):
        grad = update.grad
        if grad.dtype != dtype or grad.shape != shape or not grad.is_cpu:
            raise ValueError(
                f"update_all: expected a gradient of {dtype} and {tuple(shape)} on the CPU, got {grad.dtype} and "
                f"{tuple(grad.shape)} on {grad.device}; choose a kernel for it"
            )
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        job.grad = grad.data_ptr()
        if update.lr is not lr:
            lr = update.lr
            number = lr.item() if lr.dtype == torch.float64 else None
        job.rate = float(lr * update.density_rate) if number is None else number * update.density_rate
    lib = library("adamw")
    assert lib is not None, "the kernel is chosen only where it compiled"
    lib.update_all(batch.array, ctypes.c_int64(len(updates)), ctypes.c_int64(torch.get_num_threads()))
    torch.autograd.graph.increment_version(batch.changed)


def _takes(update: Update, is_traced: bool) -> bool:
    """Tells whether this kernel takes the tensors of an update. ``is_traced``: they are fake."""
    values, slots, topology = update.values, update.slots, update.topology
    generation, births = update.generation, update.births
    of_topology = () if topology is None else (topology.bits, topology.lists)
    in_order = (values, *slots, update.scales, generation, births, *of_topology)
    return (
        values.device.type == "cpu"
        and (is_traced or all(_is_plain(tensor) for tensor in update.tensors()))
        and values.dtype in (torch.float32, torch.bfloat16)
        and (update.grad.dtype, update.grad.shape) == (values.dtype, values.shape)
        and len(slots) == len(_SLOTS)
        and len({slot.dtype for slot in slots}) == 1
        and slots[0].dtype in _KINDS
        and update.is_coded == (slots[0].dtype == torch.uint8)
        and all(slot.shape == values.shape for slot in slots)
        and all(tensor is None or tensor.is_contiguous() for tensor in in_order)
        and all(count is None or count.dtype == torch.int64 for count in (update.num_skipped, update.step, births))
        and (generation is None or births is None or _has_table(generation, births))
    )


def _is_plain(tensor: Tensor) -> bool:
    """Tells whether a tensor is an ordinary one in the CPU's memory, neither fake nor of a subclass."""
    return type(tensor) in _PLAIN and tensor.is_cpu


def _has_table(generation: Tensor, births: Tensor) -> bool:
    if generation.dtype == torch.uint8:
        return births.numel() >= GENERATIONS_OF_A_BYTE  # as many are looked up at once
    return generation.dtype in (torch.int16, torch.int32)


def _find_batch(updates: list[Update]) -> _Batch:
    """Returns the batch of these updates; the first of them keeps it."""
    prepared = [update.prepared.get(_PREPARED) or _prepare(update) for update in updates]
    batch: _Batch | None = updates[0].prepared.get(_BATCH)
    if batch is None or batch.prepared != prepared:
        array = (Job * len(prepared))(*(each.job for each in prepared))
        batch = _Batch(prepared, array, list(array), [tensor for update in updates for tensor in update.changed()])
        updates[0].prepared[_BATCH] = batch
    return batch


def _prepare(update: Update) -> _Prepared:
    """Writes all of a struct but gradient and rate; the update keeps it."""
    values, generation, births = update.values, update.generation, update.births
    tensors = {name: getattr(update, name) for name in ("values", *_STATE)}
    tensors |= {name: getattr(update.topology, name, None) for name in _OF_TOPOLOGY}
    tensors |= {slot.name: tensor for slot, tensor in zip(update.rule.slots, update.slots, strict=True)}
    job = Job(
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
        **dict(zip(update.rule.options, update.options, strict=True)),
        **_geometry(update),
        num_births=0 if births is None else births.numel(),
        generation_bytes=0 if generation is None else generation.element_size(),
        weight_kind=_KINDS[values.dtype],
        moment_kind=_KINDS[update.slots[0].dtype],
        warmup_steps=update.warmup_steps,
        initial_warmup_steps=update.initial_warmup_steps,
        shared_step=update.rule.shared_step,
        rounds=update.rounds_stochastically,
        seed=update.noise_seed or 0,
        first_place=update.first_place,
    )
    prepared = update.prepared[_PREPARED] = _Prepared(job, values.dtype, values.shape)
    return prepared


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
