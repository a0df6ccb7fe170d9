"""The optimizer step of many parameters on the CPU, in one call."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import Layout, blocks_per_group, num_groups, split_index
from smet_compile.ops.kernels.native.build import library

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_ENTRIES_OF_A_GROUP = 1024
_GENERATIONS_OF_A_BYTE = 256


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "grad", "exp_avg", "exp_avg_sq", "scales")),
        *((name, ctypes.c_void_p) for name in ("num_skipped", "step", "generation", "births", "bits")),
        *((name, ctypes.c_void_p) for name in ("positions", "group_starts")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "num_positions", "num_births", "generation_bytes")),
        *((name, ctypes.c_int64) for name in ("wide_index", "num_groups", "blocks_per_group")),
        *((name, ctypes.c_int64) for name in ("block_rows", "block_cols", "bm", "bn", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("weight_kind", "moment_kind", "warmup_steps", "shared_step")),
        *((name, ctypes.c_int64) for name in ("rounds", "seed")),
        *((name, ctypes.c_double) for name in ("rate", "beta1", "beta2", "eps", "weight_decay")),
    ]


def supports(arguments: tuple[Any, ...], traced: bool = False) -> bool:
    """Whether ``update_all`` takes a parameter with these arguments of ``smet::active_adamw_``.

    ``traced``: they only stand for tensors, of which it would.
    """
    values, grad, exp_avg, exp_avg_sq, scales, num_skipped, step, _, generation, births, topology, index = arguments[
        :12
    ]
    return (
        values.device.type == "cpu"
        and (traced or _are_plain(*arguments[:7], generation, births, topology, *index))
        and values.dtype in (torch.float32, torch.bfloat16)
        and exp_avg.dtype in _KINDS
        and (grad.dtype, exp_avg_sq.dtype) == (values.dtype, exp_avg.dtype)
        and values.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape
        and all(t is None or t.is_contiguous() for t in (values, exp_avg, exp_avg_sq, scales, generation, births))
        and all(t is None or t.dtype == torch.int64 for t in (num_skipped, step, births))
        and (generation is None or _has_table(generation, births))
        and (topology is None or len(index) == 1)
        and library("adamw") is not None
    )


def _are_plain(*tensors: Tensor | None) -> bool:
    """In the CPU's memory, and nothing that only stands for a tensor."""
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu") for t in tensors)


def _has_table(generation: Tensor, births: Tensor) -> bool:
    if generation.dtype == torch.uint8:
        return births.numel() >= _GENERATIONS_OF_A_BYTE  # as many are looked up at once
    return generation.dtype in (torch.int16, torch.int32)


def update_all(all_updates: list[tuple[Any, ...]]) -> None:
    """``active_adamw_`` of each parameter; ``all_updates`` holds the arguments of each, its values first."""
    gradients = [update[1].contiguous() for update in all_updates]  # alive until all is done
    jobs = [_job(gradient, *update) for gradient, update in zip(gradients, all_updates, strict=True)]
    lib = library("adamw")
    assert lib is not None, "chosen only where it compiled"
    array = (_Update * len(jobs))(*jobs)
    lib.update_all(array, ctypes.c_int64(len(jobs)), ctypes.c_int64(torch.get_num_threads()))
    for values, _, exp_avg, exp_avg_sq, scales, num_skipped, step, *_ in all_updates:
        changed = (values, exp_avg, exp_avg_sq, num_skipped, step) + (() if scales is None else (scales,))
        torch.autograd.graph.increment_version(changed)


def _job(
    contiguous_grad: Tensor,
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None,
    num_skipped: Tensor,
    step: Tensor,
    lr: Tensor,
    generation: Tensor | None,
    births: Tensor | None,
    topology: Tensor | None,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    density_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    warmup_steps: int,
    shared_step: bool,
    noise_seed: int | None,
) -> _Update:
    return _Update(
        values=values.data_ptr(),
        grad=contiguous_grad.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        scales=_pointer(scales),
        num_skipped=num_skipped.data_ptr(),
        step=step.data_ptr(),
        generation=_pointer(generation),
        births=_pointer(births),
        num_births=0 if births is None else births.numel(),
        generation_bytes=0 if generation is None else generation.element_size(),
        weight_kind=_KINDS[values.dtype],
        moment_kind=_KINDS[exp_avg.dtype],
        warmup_steps=warmup_steps,
        shared_step=shared_step,
        rounds=noise_seed is not None and not values.dtype == exp_avg.dtype == torch.float32,
        seed=noise_seed or 0,
        rate=float(lr * density_rate),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        **_geometry(values, topology, index, shape, matrix, block_shape),
    )


def _geometry(
    values: Tensor,
    topology: Tensor | None,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
) -> dict[str, Any]:
    """Where the blocks lie. Of a plain parameter each entry is a block."""
    if topology is None:
        groups = -(-values.numel() // _ENTRIES_OF_A_GROUP)
        return {
            "num_blocks": values.numel(),
            "num_positions": values.numel(),
            "num_groups": groups,
            "blocks_per_group": _ENTRIES_OF_A_GROUP,
            "bm": 1,
            "bn": 1,
        }
    layout = Layout.of_lists(shape, matrix, block_shape)
    lists = split_index(index[0], layout, values.shape[0])
    return {
        "bits": topology.data_ptr(),
        "positions": _pointer(lists.positions),
        "group_starts": _pointer(lists.group_starts),
        "wide_index": index[0].dtype == torch.int64,
        "num_blocks": values.shape[0],
        "num_positions": layout.num_blocks,
        "num_groups": num_groups(layout),
        "blocks_per_group": blocks_per_group(layout),
        "block_rows": layout.block_rows,
        "block_cols": layout.block_cols,
        "bm": layout.block_shape[0],
        "bn": layout.block_shape[1],
        "rows": layout.rows,
        "cols": layout.cols,
    }


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
