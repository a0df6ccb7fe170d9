"""Makes optimizer steps of many parameters in one call of C++, for the kernels "cpu_adamw" and "cpu_scale".

A parameter's addresses and numbers are written into a struct, its job, once for each ``Update`` object. From step to
step only the address of its gradient and its rate change there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.updates import Update

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""The number in a job that tells how a tensor is stored."""
_PLAIN = (Tensor, nn.Parameter)


class _Prepared(NamedTuple):
    """Holds a parameter's job without gradient and rate, and the dtype and shape that gradients must have."""

    job: Any
    dtype: torch.dtype
    shape: torch.Size


class _Batch(NamedTuple):
    """Holds the jobs of several updates that are made together; kept while these come again in the same order.

    Args:
        prepared: what each update keeps. array: copies of their jobs. jobs: the elements of the array.
        changed: every tensor that the updates change.
    """

    prepared: list[_Prepared]
    array: Any
    jobs: list[Any]
    changed: list[Tensor]


def update_all(source: str, make_job: Callable[[Update], ctypes.Structure], updates: list[Update]) -> None:
    """Makes every update by the C++ of ``source``, given what makes its jobs, which have members grad and rate.

    Raises ValueError for a gradient of another dtype, shape or device than the values.
    """
    if not updates:
        return
    batch = _find_batch(source, make_job, updates)
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
    lib = library(source)
    assert lib is not None, "the kernel is chosen only where it compiled"
    lib.update_all(batch.array, ctypes.c_int64(len(updates)), ctypes.c_int64(torch.get_num_threads()))
    torch.autograd.graph.increment_version(batch.changed)


def takes_tensors(update: Update, is_traced: bool) -> bool:
    """Tells whether C++ can read the tensors of an update. ``is_traced``: they are fake."""
    values, slots, topology = update.values, update.slots, update.topology
    of_topology = () if topology is None else (topology.bits, topology.lists)
    in_order = (values, *slots, update.scales, update.generation, update.births, *of_topology)
    return (
        values.device.type == "cpu"
        and (is_traced or all(_is_plain(tensor) for tensor in update.tensors()))
        and values.dtype in (torch.float32, torch.bfloat16)
        and (update.grad.dtype, update.grad.shape) == (values.dtype, values.shape)
        and len({slot.dtype for slot in slots}) <= 1
        and all(slot.dtype in KINDS and slot.shape == values.shape for slot in slots)
        and update.is_coded == any(slot.dtype == torch.uint8 for slot in slots)
        and all(tensor is None or tensor.is_contiguous() for tensor in in_order)
        and all(count is None or count.dtype == torch.int64 for count in (update.num_skipped, update.step))
    )


def addresses(update: Update, names: tuple[str, ...]) -> dict[str, int]:
    """Returns the addresses of those tensors of an update, its topology and its slots that are there, by name."""
    tensors = {name: getattr(update, name, getattr(update.topology, name, None)) for name in names}
    tensors |= {slot.name: tensor for slot, tensor in zip(update.rule.slots, update.slots, strict=True)}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def _is_plain(tensor: Tensor) -> bool:
    """Tells whether a tensor is an ordinary one in the CPU's memory, neither fake nor of a subclass."""
    return type(tensor) in _PLAIN and tensor.is_cpu


def _find_batch(source: str, make_job: Callable[[Update], ctypes.Structure], updates: list[Update]) -> _Batch:
    """Returns the batch of these updates; the first of them keeps it."""
    prepared = [update.prepared.get(source) or _prepare(source, make_job, update) for update in updates]
    together = f"{source}, with others"
    batch: _Batch | None = updates[0].prepared.get(together)
    if batch is None or batch.prepared != prepared:
        array = (type(prepared[0].job) * len(prepared))(*(each.job for each in prepared))
        batch = _Batch(prepared, array, list(array), [tensor for update in updates for tensor in update.changed()])
        updates[0].prepared[together] = batch
    return batch


def _prepare(source: str, make_job: Callable[[Update], ctypes.Structure], update: Update) -> _Prepared:
    """Makes the job of an update, which keeps it."""
    prepared = update.prepared[source] = _Prepared(make_job(update), update.values.dtype, update.values.shape)
    return prepared
