"""Follows a weight through the views and conversions between it and its use, and tells which dimension is which.

A view is described by labels, one per dimension: "S" for the stacked matrices, "R" rows, "C" columns, "1" for a
dimension of size one, "B" for one that the weight was expanded along.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from smet_compile.format import Layout
from smet_compile.passes.graph import add, aten, is_call, prims, val

Labels = tuple[str, ...]

CONVERT = (prims.convert_element_type.default, aten._to_copy.default)
_RESHAPE: tuple[Any, ...] = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_RESHAPE += (aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)
SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)
_WHOLE = 2**63 - 1


@dataclass(frozen=True)
class View:
    """Describes which part of a weight a node holds, and in which form.

    Args:
        labels: names of its dimensions.
        dtypes: the conversions between the weight and the node, in order.
        rows: (first, end) where only those rows of the matrix are left.
    """

    labels: Labels
    dtypes: tuple[torch.dtype, ...] = ()
    rows: tuple[int, int] | None = None


def whole(layout: Layout) -> View | None:
    """Returns the view that is the weight itself; None where labels cannot name its dimensions.

    That is so for convolutions, but for those of a kernel of 1.
    """
    rows, cols, *kernel = layout.shape
    if kernel and layout.matrix == (rows, cols) and all(side == 1 for side in kernel):
        return None if 1 in layout.matrix else View(("R", "C", *["1"] * len(kernel)))
    if tuple(layout.matrix) != tuple(layout.shape[-2:]) or 1 in layout.matrix or len(layout.shape) > 3:
        return None
    stack = ("S",) if layout.num_matrices > 1 else ("1",)
    return View((*stack, "R", "C")[-len(layout.shape) :])


def through(view: View, node: fx.Node, source: fx.Node) -> View | None:
    """Returns the view that ``node`` holds, a user of ``source``, which holds ``view``; None where it is no view."""
    if is_call(node, aten.permute.default):
        return replace(view, labels=tuple(view.labels[dim] for dim in node.args[1]))
    if is_call(node, aten.t.default) or is_call(node, aten.transpose.int):
        return replace(view, labels=_transposed(view.labels, *node.args[1:]))
    if is_call(node, *_RESHAPE):
        return relabeled(view, source, node)
    if is_call(node, aten.expand.default):
        return _expanded(view, source, node)
    if is_call(node, *CONVERT):
        return _converted(view, node)
    if is_call(node, *_COPIES):
        return view
    if is_call(node, aten.slice.Tensor):
        return _sliced(view, source, *node.args[1:])
    return _part(view, node, source)


def _transposed(labels: Labels, first: int = 0, second: int = 1) -> Labels:
    swapped = list(labels)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return tuple(swapped)


def relabeled(view: View, source: fx.Node, node: fx.Node) -> View | None:
    """Returns the view after a reshape; None unless it only adds or removes dimensions of size one."""
    kept = [(label, size) for label, size in zip(view.labels, val(source).shape, strict=True) if label != "1"]
    labels = []
    for size in val(node).shape:
        if kept and _are_equal(kept[0][1], size):
            labels.append(kept.pop(0)[0])
        elif is_one(size):
            labels.append("1")
        else:
            return None
    return None if kept else replace(view, labels=tuple(labels))


def _are_equal(a: Any, b: Any) -> bool:
    return bool(a is b or (isinstance(a, int) and isinstance(b, int) and a == b))


def is_one(size: Any) -> bool:
    return _are_equal(size, 1)


def _expanded(view: View, source: fx.Node, node: fx.Node) -> View | None:
    """Returns the view after an expand, which repeats the weight along dimensions of size one."""
    new = len(val(node).shape) - len(view.labels)
    old = ("1",) * new + view.labels
    sizes = (1,) * new + tuple(val(source).shape)
    grown = [not _are_equal(a, b) for a, b in zip(sizes, val(node).shape, strict=True)]
    return replace(view, labels=tuple("B" if more else label for label, more in zip(old, grown, strict=True)))


def _converted(view: View, node: fx.Node) -> View | None:
    dtype = node.args[1] if is_call(node, prims.convert_element_type.default) else node.kwargs.get("dtype")
    others = {k: v for k, v in node.kwargs.items() if k not in ("dtype", "memory_format", "non_blocking")}
    if any(value is not None for value in others.values()) or not isinstance(dtype, torch.dtype | None):
        return None
    return view if dtype is None else replace(view, dtypes=(*view.dtypes, dtype))


def _sliced(
    view: View, source: fx.Node, dim: int = 0, start: int | None = 0, end: int | None = _WHOLE, step: int = 1
) -> View | None:
    size = val(source).shape[dim]
    start, end = start or 0, _WHOLE if end is None else end
    if view.labels[dim] != "R" or step != 1 or not all(isinstance(x, int) for x in (size, start, end)):
        return None
    first, stop, _ = slice(start, end).indices(size)
    offset = view.rows[0] if view.rows else 0
    return replace(view, rows=(offset + first, offset + stop))


def _part(view: View, node: fx.Node, source: fx.Node) -> View | None:
    """Returns the view that is a part of a split along the rows; ``node`` is its getitem, ``source`` was split."""
    if node.target is not operator.getitem or not is_call(node.args[0], *SPLITS):
        return None
    split = node.args[0]
    dim = split.args[2] if len(split.args) > 2 else 0
    sizes = [part.shape[dim] for part in val(split)]
    first = sum(sizes[: node.args[1]])
    return _sliced(view, source, dim, first, first + sizes[node.args[1]])


def padded(like: fx.Node, node: fx.Node, rows: tuple[int, int], num_rows: int) -> fx.Node:
    """Pads (T, end - first) to (T, R), with zeros for the weight's other rows."""
    return add(like, aten.constant_pad_nd.default, node, [rows[0], num_rows - rows[1]], 0.0)
