"""Rules for matrix products: with a weight, of two tensors (attention), convolutions, lookups."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from smet_compile.microscope.capture import Call
from smet_compile.microscope.flow import Link
from smet_compile.microscope.reading import Reading
from smet_compile.microscope.units import (
    MOST_PAIRS,
    Units,
    Value,
    Weight,
    combine,
    gather,
    narrowed,
    pooled,
    single,
    varies,
)


def multiply(reading: Reading, left: Value, right: Value) -> Units | None:
    """(..., m, k) times (..., k, n); None where no rule knows it."""
    if isinstance(right, Weight) and isinstance(left, Units):
        return _times_chosen(reading, left, right) if right.chosen else _times_weight(reading, left, right)
    if isinstance(right, Weight):
        return None
    if isinstance(left, Weight):
        turned = multiply(reading, Units(right.node, right.labels.mT), _turned(left))
        return None if turned is None else Units(turned.node, turned.labels.mT)
    return _contract(reading, left, right)


def _times_chosen(reading: Reading, left: Units, weight: Weight) -> Units | None:
    """With each matrix of the stack, and the results as one: it may be any."""
    every = Units(left.node, left.labels.unsqueeze(0))
    product = _times_weight(reading, every, replace(weight, chosen=False))
    if product is None:
        return None
    joined = gather(reading.flow, product, (0,))
    return Units(joined.node, joined.labels.squeeze(0))


def _turned(weight: Weight) -> Weight:
    return replace(weight, rows=weight.rows.mT, cols=weight.cols.mT)


def _times_weight(reading: Reading, left: Units, weight: Weight) -> Units | None:
    """The weight's columns meet ``left`` and its rows come out, or the other way around."""
    transposed = not _runs_along(weight.cols, weight.rows)
    if transposed and not _runs_along(weight.rows, weight.cols):
        return None
    met, made = (weight.rows, weight.cols) if transposed else (weight.cols, weight.rows)
    num_met, num_made = (weight.num_rows, weight.num_cols) if transposed else (weight.num_cols, weight.num_rows)
    batch = torch.broadcast_shapes(left.labels.shape[:-2], met.shape[:-2])
    columns = _pairs(reading, left, met[..., 0].unsqueeze(-2), num_met)
    rows = reading.flow.matrix(weight.name, columns, num_met, num_made, transposed)
    made_at = made[..., 0, :].unsqueeze(-2)
    return Units(rows, made_at.expand(*batch, left.labels.shape[-2], made.shape[-1]))


def _runs_along(inner: Tensor, outer: Tensor) -> bool:
    """Whether ``inner`` changes along the first of the last two dimensions only, ``outer`` along the second only."""
    return not (varies(inner, -1) or varies(outer, -2))


def _pairs(reading: Reading, value: Units, met: Tensor, num_met: int) -> Link:
    """Which units of ``value`` meet which columns, labels that broadcast with those of the units."""
    num_units = reading.flow.nodes[value.node].num_units
    keys = torch.unique(narrowed(met) * num_units + narrowed(value.labels))
    return Link(value.node, keys % num_units, keys // num_units)


def _contract(reading: Reading, left: Units, right: Units) -> Units:
    """Each product of two entries, summed: q kᵀ keeps heads apart, scores times v keeps the units of v."""
    a, b = left.labels.unsqueeze(-1), right.labels.unsqueeze(-3)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    small = torch.broadcast_shapes(narrowed(a.expand(shape)).shape, narrowed(b.expand(shape)).shape)
    if torch.Size(small).numel() > MOST_PAIRS:
        return pooled(reading.flow, [left, right], shape[:-2] + shape[-1:])
    both = combine(reading.flow, "product", [Units(left.node, a), Units(right.node, b)], shape)
    summed = gather(reading.flow, both, (len(shape) - 2,))
    return Units(summed.node, summed.labels.squeeze(-2))


def mm(reading: Reading, call: Call) -> Value:
    """``mm``, ``bmm``, ``mv``, ``dot``, ``matmul``."""
    left, right = (reading.value(arg) for arg in call.args[:2])
    if isinstance(right, Units) and right.labels.dim() == 1:
        right = Units(right.node, right.labels.unsqueeze(-1))
    if isinstance(left, Units) and left.labels.dim() == 1:
        left = Units(left.node, left.labels.unsqueeze(0))
    return multiply(reading, left, right) or reading.opaque(call)


def addmm(reading: Reading, call: Call) -> Value:
    """``addmm``, ``baddbmm``: a product and something added."""
    product = multiply(reading, *(reading.value(arg) for arg in call.args[1:3]))
    if product is None:
        return reading.opaque(call)
    return combine(reading.flow, "sum", [product, reading.units(call.args[0])], call.outputs[0].shape)


def grouped_mm(reading: Reading, call: Call) -> Value:
    """(T, k) times (E, k, n), each token with one of the matrices: it may be any."""
    left, right = (reading.value(arg) for arg in call.args[:2])
    if not isinstance(right, Weight) or not isinstance(left, Units) or right.rows.dim() != 3 or left.labels.dim() != 2:
        return reading.opaque(call)
    return _times_chosen(reading, left, right) or reading.opaque(call)


def attention(reading: Reading, call: Call) -> list[Value]:
    """Fused attention of q, k and v (B, H, T, D), with fewer heads of k and v where they share."""
    query, key, value = (reading.units(arg) for arg in call.args[:3])
    heads = query.labels.shape[-3]
    key, value = (Units(x.node, _shared(x.labels, heads)) for x in (key, value))
    scores = _contract(reading, query, Units(key.node, key.labels.mT))
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [_contract(reading, scores, value), *rest]


def _shared(labels: Tensor, heads: int) -> Tensor:
    return labels if labels.shape[-3] == heads else labels.repeat_interleave(heads // labels.shape[-3], dim=-3)


def embedding(reading: Reading, call: Call) -> Value:
    """A lookup: which row depends on the input, what it holds does not."""
    table, chosen = reading.value(call.args[0]), reading.units(call.args[1])
    if not isinstance(table, Weight) or varies(table.rows, 1) or varies(table.cols, 0):
        return reading.opaque(call)
    if chosen.node == reading.flow.CONSTANT:
        return single(reading.flow.CONSTANT, call.outputs[0].shape)
    entry = pooled(reading.flow, [chosen], ())
    link = Link(entry.node, torch.zeros(table.num_rows, dtype=torch.int64))
    columns = reading.flow.matrix(table.name, link, table.num_rows, table.num_cols, transposed=True)
    return Units(columns, table.cols[0].expand(call.outputs[0].shape))


def convolution(reading: Reading, call: Call) -> Value:
    """(B, I, ...) to (B, O, ...) with a weight (O, I, ...): a channel meets all columns of its kernel."""
    value, weight = reading.units(call.args[0]), reading.value(call.args[1])
    transposed, groups = call.args[6], call.args[8]
    if not isinstance(weight, Weight) or transposed or groups != 1 or varies(weight.cols, 0) or varies(weight.rows, 1):
        return reading.opaque(call)
    batch_and_space = (0, *range(2, value.labels.dim()))
    channels = gather(reading.flow, value, batch_and_space)
    channels = Units(channels.node, channels.labels.flatten(2))
    link = _pairs(reading, channels, weight.cols[:1].flatten(2), weight.num_cols)
    rows = reading.flow.matrix(weight.name, link, weight.num_cols, weight.num_rows)
    at_channel = weight.rows.flatten(1)[:, 0].view(-1, *[1] * (value.labels.dim() - 2))
    out = Units(rows, at_channel.expand(call.outputs[0].shape))
    bias = single(reading.flow.CONSTANT if call.args[2] else reading.flow.ZERO, ())
    return combine(reading.flow, "sum", [out, bias], out.labels.shape)
