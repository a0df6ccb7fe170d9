"""Rules for ops that move entries: views, concatenation, padding; and for what makes tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smet_compile.microscope.combine import gather
from smet_compile.microscope.flow import Link
from smet_compile.microscope.reading import Reading, short_name
from smet_compile.microscope.recorder import Call, Ref
from smet_compile.microscope.units import (
    Units,
    Value,
    Weight,
    narrowed,
    reshaped,
    settled,
    single,
    varies,
)

SHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias")
VIEWS = (
    "permute", "transpose", "t", "squeeze", "unsqueeze", "select", "slice", "split", "split_with_sizes",
    "chunk", "unbind", "narrow", "diagonal", "expand", "flip", "roll", "repeat", "tile", "repeat_interleave",
    "unfold", "movedim", "swapaxes", "mT", "select_copy", "slice_copy",
)  # fmt: skip
MADE_ZERO = ("zeros", "new_zeros", "zeros_like", "zero")
MADE = (
    "arange", "empty", "empty_like", "empty_strided", "eye", "fill", "full", "full_like", "linspace",
    "new_empty", "new_empty_strided", "new_full", "new_ones", "ones", "ones_like", "rand", "rand_like",
    "randint", "randn", "randn_like", "bernoulli", "normal", "uniform", "scalar_tensor", "tril_indices",
    "exponential", "random", "randperm",
)  # fmt: skip


def shape(reading: Reading, call: Call) -> Value | list[Value]:
    """Other dimensions, the same entries in the same order."""
    value = reading.value(call.args[0])
    if isinstance(value, Weight) and value.chosen:
        return reading.opaque(call)
    return _moved(value, lambda labels: reshaped(labels, call.outputs[0].shape))


def view(reading: Reading, call: Call) -> Value | list[Value]:
    """The op itself, on labels."""
    if any(isinstance(arg, Ref) for arg in call.args[1:]):
        return reading.opaque(call)
    value = reading.value(call.args[0])
    if isinstance(value, Weight) and value.chosen:
        return replace(value, rows=value.rows.mT, cols=value.cols.mT) if _swaps_last(call) else reading.opaque(call)
    return _moved(value, lambda labels: call.op(labels, *call.args[1:], **call.kwargs))


def _swaps_last(call: Call) -> bool:
    """Whether the op exchanges the last two dimensions."""
    last = len(call.args[0].shape)
    dims = [dim % last for dim in call.args[1:] if isinstance(dim, int)]
    return short_name(call) == "transpose" and sorted(dims) == [last - 2, last - 1]


def _moved(value: Value, move: Any) -> Value | list[Value]:
    if isinstance(value, Weight):
        rows, cols = move(value.rows), move(value.cols)
        if isinstance(rows, Tensor):
            return replace(value, rows=rows, cols=cols)
        return [replace(value, rows=row, cols=col) for row, col in zip(rows, cols, strict=True)]
    labels = move(value.labels)
    if isinstance(labels, Tensor):
        return Units(value.node, settled(labels))
    return [Units(value.node, settled(part)) for part in labels]


def cat(reading: Reading, call: Call) -> Value:
    """``cat`` and ``stack``: units of one node, or those of several in one."""
    if any(reading.is_site(reading.value(arg)) for arg in call.args[0]):
        return reading.opaque(call)
    values = [reading.units(arg) for arg in call.args[0]]
    dim = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % len(call.outputs[0].shape)
    units, start, links = [], 0, []
    for value in values:
        if short_name(call) == "stack":
            value = Units(value.node, value.labels.unsqueeze(dim))
        if value.labels.dim() == len(call.outputs[0].shape):  # an empty one may have any shape
            units.append(value)
    if len({value.node for value in units}) == 1:
        return Units(units[0].node, _cat([value.labels for value in units], dim))
    labels = []
    for value in units:
        count = reading.flow.nodes[value.node].num_units
        links.append(Link(value.node, torch.arange(count), torch.arange(start, start + count)))
        labels.append(value.labels + start if count > 1 else single(0, ()).labels.add(start).expand(value.labels.shape))
        start += count
    return Units(reading.flow.add("sum", start, tuple(links), elementwise=True), _cat(labels, dim))


def _cat(labels: list[Tensor], dim: int) -> Tensor:
    """Along every other dimension only where one of them varies."""
    full = [list(part.shape) for part in labels]
    small = [narrowed(part) for part in labels]
    common = [max(part.shape[d] for part in small) for d in range(labels[0].dim())]
    shapes = [[sizes[d] if d == dim else common[d] for d in range(len(sizes))] for sizes in full]
    joined = torch.cat([part.expand(sizes) for part, sizes in zip(small, shapes, strict=True)], dim)
    whole = [sum(sizes[d] for sizes in full) if d == dim else full[0][d] for d in range(len(common))]
    return settled(joined).expand(whole)


def pad(reading: Reading, call: Call) -> Value:
    """Constants around a tensor, along dimensions that tell no units apart."""
    value, out = reading.units(call.args[0]), call.outputs[0].shape
    padded = [dim for dim, (a, b) in enumerate(zip(value.labels.shape, out, strict=True)) if a != b]
    if any(varies(value.labels, dim) for dim in padded):
        return reading.opaque(call)
    labels = narrowed(value.labels)
    for dim in padded:
        labels = labels.narrow(dim, 0, 1)
    return Units(value.node, labels.expand(out))


def as_complex(reading: Reading, call: Call) -> Value:
    """Two entries become one number."""
    pair = gather(reading.flow, reading.units(call.args[0]), (len(call.args[0].shape) - 1,))
    return Units(pair.node, pair.labels.squeeze(-1))


def as_real(reading: Reading, call: Call) -> Value:
    """A number becomes two entries."""
    value = reading.units(call.args[0])
    return Units(value.node, value.labels.unsqueeze(-1).expand(call.outputs[0].shape))


def made(reading: Reading, call: Call) -> Value:
    """A new tensor: of nothing that the model was given."""
    zero = short_name(call) in MADE_ZERO
    return single(reading.flow.ZERO if zero else reading.flow.CONSTANT, call.outputs[0].shape)
