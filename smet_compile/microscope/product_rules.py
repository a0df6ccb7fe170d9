"""Reads products with a weight or of two tensors (attention), convolutions, and pooling over space."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from smet_compile.microscope.flow import (
    MAX_PAIRS,
    Link,
    Units,
    Value,
    Weight,
    gather,
    pool,
    single,
    varies,
    without_repeats,
)
from smet_compile.microscope.reading import Reading, Rule, named_arguments, short_name
from smet_compile.microscope.recording import Call, Ref

GROUPED_MM = ("_grouped_mm", "transformers.grouped_mm_fallback")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
OVER_SPACE = (
    "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_trilinear3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
)  # fmt: skip


def _multiply(reading: Reading, left: Value, right: Value) -> Units | None:
    """Multiplies (..., m, k) with (..., k, n); returns None where no rule knows the product."""
    if isinstance(right, Weight) and isinstance(left, Units):
        return _times_chosen(reading, left, right) if right.chosen else _times_weight(reading, left, right)
    if isinstance(right, Weight):
        return None
    if isinstance(left, Weight):
        transposed = replace(left, rows=left.rows.mT, cols=left.cols.mT)
        product = _multiply(reading, Units(right.node, right.labels.mT), transposed)
        return None if product is None else Units(product.node, product.labels.mT)
    return _contract(reading, left, right)


def _times_chosen(reading: Reading, left: Units, weight: Weight) -> Units | None:
    """Multiplies with each matrix of the stack and makes the results one: it may be any of them."""
    every = Units(left.node, left.labels.unsqueeze(0))
    product = _times_weight(reading, every, replace(weight, chosen=False))
    if product is None:
        return None
    joined = gather(reading.flow, product, (0,))
    return Units(joined.node, joined.labels.squeeze(0))


def _times_weight(reading: Reading, left: Units, weight: Weight) -> Units | None:
    """Multiplies with a matrix: its columns meet ``left`` and its rows come out, or the other way around."""
    transposed = not _runs_along(weight.cols, weight.rows)
    if transposed and not _runs_along(weight.rows, weight.cols):
        return None
    inner, outer = (weight.rows, weight.cols) if transposed else (weight.cols, weight.rows)
    num_inner, num_outer = (weight.num_rows, weight.num_cols) if transposed else (weight.num_cols, weight.num_rows)
    batch = torch.broadcast_shapes(left.labels.shape[:-2], inner.shape[:-2])
    columns = _meet(reading, left, inner[..., 0].unsqueeze(-2), num_inner)
    node = reading.flow.add_matrix(weight.name, columns, num_inner, num_outer, transposed)
    labels = outer[..., 0, :].unsqueeze(-2)
    return Units(node, labels.expand(*batch, left.labels.shape[-2], outer.shape[-1]))


def _runs_along(inner: Tensor, outer: Tensor) -> bool:
    """Returns whether ``inner`` varies along the first of the last two dimensions only, ``outer`` the second only."""
    return not (varies(inner, -1) or varies(outer, -2))


def _meet(reading: Reading, value: Units, columns: Tensor, num_columns: int) -> Link:
    """Links the units of ``value`` to the columns they meet, labels that broadcast with those of the units."""
    num_units = reading.flow.nodes[value.node].num_units
    keys = torch.unique(without_repeats(columns) * num_units + without_repeats(value.labels))
    return Link(value.node, keys % num_units, keys // num_units)


def _contract(reading: Reading, left: Units, right: Units) -> Units:
    """Sums the products of two entries: q kᵀ keeps heads apart, scores times v keeps the units of v."""
    a, b = left.labels.unsqueeze(-1), right.labels.unsqueeze(-3)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    pairs = torch.broadcast_shapes(*(without_repeats(labels.expand(shape)).shape for labels in (a, b)))
    if torch.Size(pairs).numel() > MAX_PAIRS:
        return pool(reading.flow, [left, right], shape[:-2] + shape[-1:])
    products = reading.product([Units(left.node, a), Units(right.node, b)], shape)
    summed = gather(reading.flow, products, (len(shape) - 2,))
    return Units(summed.node, summed.labels.squeeze(-2))


def _matmul(reading: Reading, call: Call) -> Value:
    left, right = (reading.value(arg) for arg in call.args[:2])
    if isinstance(right, Units) and right.labels.dim() == 1:
        right = Units(right.node, right.labels.unsqueeze(-1))
    if isinstance(left, Units) and left.labels.dim() == 1:
        left = Units(left.node, left.labels.unsqueeze(0))
    return _multiply(reading, left, right) or reading.opaque(call)


def _addmm(reading: Reading, call: Call) -> Value:
    """Reads a product and something added."""
    product = _multiply(reading, *(reading.value(arg) for arg in call.args[1:3]))
    if product is None:
        return reading.opaque(call)
    return reading.sum([product, reading.units(call.args[0])], call.outputs[0].shape)


def _grouped_mm(reading: Reading, call: Call) -> Value:
    """Reads (T, k) times (E, k, n), each token with one of the matrices: it may be any."""
    left, right = (reading.value(arg) for arg in call.args[:2])
    if not isinstance(right, Weight) or not isinstance(left, Units) or right.rows.dim() != 3 or left.labels.dim() != 2:
        return reading.opaque(call)
    return _times_chosen(reading, left, right) or reading.opaque(call)


def _attention(reading: Reading, call: Call) -> list[Value]:
    """Reads fused attention of q, k and v (B, H, T, D), with fewer heads of k and v where they share.

    Scores that are all zero, or a constant, still let values through: all alike.
    """
    query, key, value = (reading.units(arg) for arg in call.args[:3])
    heads = query.labels.shape[-3]
    key, value = (Units(x.node, _repeat_heads(x.labels, heads)) for x in (key, value))
    products = _contract(reading, query, Units(key.node, key.labels.mT))
    scores = reading.sum([products, reading.constant(), *_score_bias(reading, call)], tuple(products.labels.shape))
    return [_contract(reading, scores, value), *reading.constants(call.outputs[1:])]


def _score_bias(reading: Reading, call: Call) -> list[Units]:
    """Returns what is added to the scores: a mask, or biases that the model computes."""
    given = named_arguments(call)
    return [reading.units(given[name]) for name in ("attn_mask", "attn_bias") if isinstance(given.get(name), Ref)]


def _repeat_heads(labels: Tensor, heads: int) -> Tensor:
    return labels if labels.shape[-3] == heads else labels.repeat_interleave(heads // labels.shape[-3], dim=-3)


def _over_space(reading: Reading, call: Call) -> list[Value]:
    """Reads pooling, resizing and padding of images: places are joined or copied, channels stay apart."""
    num_dims = len(call.args[0].shape)
    num_space = next(int(letter) for letter in short_name(call) if letter.isdigit())
    channels = _channels(reading, reading.units(call.args[0]), range(num_dims - num_space, num_dims))
    expanded = Units(channels.node, channels.labels.expand(call.outputs[0].shape))
    return [expanded, *reading.constants(call.outputs[1:])]


def _channels(reading: Reading, value: Units, space: range) -> Units:
    """Joins all places: size 1 along the dimensions ``space``."""
    channels = gather(reading.flow, value, space)
    labels = channels.labels
    for dim in space:
        labels = labels.narrow(dim, 0, 1)
    return Units(channels.node, labels)


def _convolution(reading: Reading, call: Call) -> Value:
    """Reads (B, I, ...) to (B, O, ...) with a weight (O, I, ...): a channel meets all columns of its kernel."""
    value, weight = reading.units(call.args[0]), reading.value(call.args[1])
    transposed, groups = call.args[6], call.args[8]
    if not reading.is_site(weight) and groups == call.args[1].shape[0] == call.args[0].shape[1] > 1:
        channels = _channels(reading, value, range(2, value.labels.dim()))  # depthwise: each channel by itself
        return _add_bias(reading, call, Units(channels.node, channels.labels.expand(call.outputs[0].shape)))
    if not isinstance(weight, Weight) or transposed or groups != 1 or varies(weight.cols, 0) or varies(weight.rows, 1):
        return reading.opaque(call)
    batch_and_space = (0, *range(2, value.labels.dim()))
    channels = gather(reading.flow, value, batch_and_space)
    channels = Units(channels.node, channels.labels.flatten(2))
    columns = _meet(reading, channels, weight.cols[:1].flatten(2), weight.num_cols)
    rows = reading.flow.add_matrix(weight.name, columns, weight.num_cols, weight.num_rows)
    labels = weight.rows.flatten(1)[:, 0].view(-1, *[1] * (value.labels.dim() - 2))
    return _add_bias(reading, call, Units(rows, labels.expand(call.outputs[0].shape)))


def _add_bias(reading: Reading, call: Call, product: Units) -> Units:
    bias = single(reading.flow.constant if call.args[2] else reading.flow.zero, ())
    return reading.sum([product, bias], tuple(product.labels.shape))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "matmul"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(GROUPED_MM, _grouped_mm),
    **dict.fromkeys(ATTENTION, _attention),
    "convolution": _convolution,
    **dict.fromkeys(OVER_SPACE, _over_space),
}
