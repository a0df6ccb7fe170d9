"""Checks of what products and updates are given, before a kernel takes it by its address."""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import gate
from smet_compile.ops.codes import num_scales


def unpack(values: Tensor, layout: Layout) -> None:
    """Raises ValueError where ``values`` are not rows of blocks of ``layout``."""
    if values.dim() == 0 or tuple(values.shape) != layout.values_shape(values.shape[0]):
        want = layout.values_shape(0)[1:]
        raise ValueError(
            f"values: expected shape (N, *{want}) for blocks of {layout.block_shape}, got {tuple(values.shape)}"
        )


def pack(dense: Tensor, layout: Layout) -> None:
    """Raises ValueError where ``dense`` is not of the weight's shape."""
    if tuple(dense.shape) != layout.shape:
        raise ValueError(f"expected a weight of shape {layout.shape}, got {tuple(dense.shape)}")


def masked_matmul(
    input: Tensor, values: Tensor, layout: Layout, transposed: bool, bias: Tensor | None, offsets: Tensor | None
) -> None:
    """Raises ValueError where dtypes, devices or shapes do not go together."""
    width, num_outputs = layout.matrix[::-1] if transposed else layout.matrix
    _alike("masked_matmul", values, input=input, bias=bias)
    _tokens("masked_matmul: input", input, width, layout, offsets)
    if values.shape != layout.values_shape(values.shape[0]):
        raise ValueError(
            f"masked_matmul: expected values of {layout.values_shape(values.shape[0])}, got {tuple(values.shape)}"
        )
    if bias is not None and bias.shape != (num_outputs,):
        raise ValueError(f"masked_matmul: expected a bias of ({num_outputs},), got {tuple(bias.shape)}")


def sampled_matmul(left: Tensor, right: Tensor, layout: Layout, offsets: Tensor | None) -> None:
    """Raises ValueError where dtypes, devices or shapes do not go together."""
    _alike("sampled_matmul", left, right=right)
    _tokens("sampled_matmul: left", left, layout.rows, layout, offsets)
    _tokens("sampled_matmul: right", right, layout.cols, layout, offsets)
    if left.shape[:-1] != right.shape[:-1]:
        raise ValueError(
            f"sampled_matmul: expected as many tokens on both sides, got {tuple(left.shape)} and {tuple(right.shape)}"
        )


def update(
    name: str,
    values: Tensor,
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
) -> None:
    """Raises ValueError where state, ages or topology do not fit ``values``; arguments as of ``active_adamw_``."""
    for key, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != values.shape or moment.device != values.device:
            raise ValueError(
                f"{name}: expected {key} of shape {tuple(values.shape)} on {values.device}, got "
                f"{tuple(moment.shape)} on {moment.device}; make the optimizer anew, or load its state again"
            )
    for key, count in (("num_skipped", num_skipped), ("step", step)):
        if count.dtype != torch.int64 or count.numel() != 1:
            raise ValueError(f"{name}: expected {key} as one int64, got {count.dtype} of shape {tuple(count.shape)}")
    layout = None if topology is None else Layout.of_lists(shape, matrix, block_shape)
    if scales is not None:
        want = (2, num_scales(values.numel(), layout))
        if scales.dtype != torch.float32 or tuple(scales.shape) != want:
            raise ValueError(
                f"{name}: expected scales of float32 and {want}, got {scales.dtype} of {tuple(scales.shape)}"
            )
    kept = {"num_skipped": num_skipped, "step": step, "scales": scales, "generation": generation, "births": births}
    for key, tensor in kept.items():
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"{name}: expected {key} on {values.device}, got {tensor.device}; load the state again")
    if values.dim():
        gate.check_ages(name, generation, births, values.shape[0])
    if topology is not None and layout is not None:
        gate.check_topology(topology, index, layout, values.shape[0])


def _alike(op: str, tensor: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and (other.dtype, other.device) != (tensor.dtype, tensor.device):
            raise ValueError(
                f"{op}: expected {name} of {tensor.dtype} on {tensor.device}, got {other.dtype} on {other.device}"
            )


def _tokens(name: str, tokens: Tensor, width: int, layout: Layout, offsets: Tensor | None) -> None:
    """(T, width) of one matrix and where there are offsets, else (S, T, width); a stack of one may come either way."""
    dims = (2,) if offsets is not None else (2, 3) if layout.num_matrices == 1 else (3,)
    stacked = tokens.dim() < 3 or tokens.shape[0] == layout.num_matrices
    if tokens.dim() not in dims or tokens.shape[-1] != width or not stacked:
        shape = f"({layout.num_matrices}, tokens, {width})" if dims == (3,) else f"(tokens, {width})"
        raise ValueError(f"{name}: expected {shape}, got {tuple(tokens.shape)}")
