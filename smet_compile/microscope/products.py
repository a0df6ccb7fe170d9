"""Rules for matrix products: with a weight, or of two tensors, as in attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from smet_compile.microscope.combine import MOST_PAIRS, combine, gather, pooled
from smet_compile.microscope.flow import Link
from smet_compile.microscope.reading import Reading
from smet_compile.microscope.recorder import Call, Ref
from smet_compile.microscope.units import Units, Value, Weight, narrowed, single, varies


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
    columns = meets(reading, left, met[..., 0].unsqueeze(-2), num_met)
    rows = reading.flow.matrix(weight.name, columns, num_met, num_made, transposed)
    made_at = made[..., 0, :].unsqueeze(-2)
    return Units(rows, made_at.expand(*batch, left.labels.shape[-2], made.shape[-1]))


def _runs_along(inner: Tensor, outer: Tensor) -> bool:
    """Whether ``inner`` changes along the first of the last two dimensions only, ``outer`` along the second only."""
    return not (varies(inner, -1) or varies(outer, -2))


def meets(reading: Reading, value: Units, met: Tensor, num_met: int) -> Link:
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
    """Fused attention of q, k and v (B, H, T, D), with fewer heads of k and v where they share.

    Scores that are all zero, or a constant, still let values through: all alike.
    """
    query, key, value = (reading.units(arg) for arg in call.args[:3])
    heads = query.labels.shape[-3]
    key, value = (Units(x.node, _shared(x.labels, heads)) for x in (key, value))
    products = _contract(reading, query, Units(key.node, key.labels.mT))
    added = [single(reading.flow.CONSTANT, ()), *_score_bias(reading, call)]
    scores = combine(reading.flow, "sum", [products, *added], tuple(products.labels.shape))
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [_contract(reading, scores, value), *rest]


def _score_bias(reading: Reading, call: Call) -> list[Units]:
    """What is added to the scores: a mask, or biases that the model computes."""
    names = [argument.name for argument in call.op._schema.arguments]
    given = call.kwargs | dict(zip(names, call.args, strict=False))
    found = [given[name] for name in ("attn_mask", "attn_bias") if isinstance(given.get(name), Ref)]
    return [reading.units(ref) for ref in found]


def _shared(labels: Tensor, heads: int) -> Tensor:
    return labels if labels.shape[-3] == heads else labels.repeat_interleave(heads // labels.shape[-3], dim=-3)
