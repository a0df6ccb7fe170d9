"""Reads ops that move entries: views, concatenation, padding, indexing, writing; and ops that make tensors.

Where the places that an op reads or writes are known to the data only, it may be any along the indexed dimensions.
Where all that can be read or written there is constant (a table, ones), the place follows from the input, and the
path leads through that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smet_compile.microscope.flow import (
    Link,
    Units,
    Value,
    Weight,
    expand_repeats,
    follow_choice,
    gather,
    pool,
    reshape_labels,
    single,
    varies,
    without_repeats,
)
from smet_compile.microscope.reading import Reading, Rule, short_name
from smet_compile.microscope.recording import Call, Ref

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


def _reshape(reading: Reading, call: Call) -> Value | list[Value]:
    """Reads other dimensions with the same entries in the same order."""
    value = reading.value(call.args[0])
    if isinstance(value, Weight) and value.chosen:
        return reading.opaque(call)
    return _move(value, lambda labels: reshape_labels(labels, call.outputs[0].shape))


def _view(reading: Reading, call: Call) -> Value | list[Value]:
    """Applies the op itself to the labels."""
    if any(isinstance(arg, Ref) for arg in call.args[1:]):
        return reading.opaque(call)
    value = reading.value(call.args[0])
    if isinstance(value, Weight) and value.chosen:
        swaps = _swaps_last_dims(call)
        return replace(value, rows=value.rows.mT, cols=value.cols.mT) if swaps else reading.opaque(call)
    return _move(value, lambda labels: call.op(labels, *call.args[1:], **call.kwargs))


def _swaps_last_dims(call: Call) -> bool:
    num_dims = len(call.args[0].shape)
    dims = [dim % num_dims for dim in call.args[1:] if isinstance(dim, int)]
    return short_name(call) == "transpose" and sorted(dims) == [num_dims - 2, num_dims - 1]


def _move(value: Value, move: Callable[[Tensor], Any]) -> Value | list[Value]:
    if isinstance(value, Weight):
        rows, cols = move(value.rows), move(value.cols)
        if isinstance(rows, Tensor):
            return replace(value, rows=rows, cols=cols)
        return [replace(value, rows=row, cols=col) for row, col in zip(rows, cols, strict=True)]
    labels = move(value.labels)
    if isinstance(labels, Tensor):
        return Units(value.node, expand_repeats(labels))
    return [Units(value.node, expand_repeats(part)) for part in labels]


def _cat(reading: Reading, call: Call) -> Value:
    """Reads ``cat`` and ``stack``: units of one node, or those of several in one."""
    if any(reading.is_site(reading.value(arg)) for arg in call.args[0]):
        return reading.opaque(call)
    num_dims = len(call.outputs[0].shape)
    dim = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % num_dims
    values = [reading.units(arg) for arg in call.args[0]]
    if short_name(call) == "stack":
        values = [Units(value.node, value.labels.unsqueeze(dim)) for value in values]
    values = [value for value in values if value.labels.dim() == num_dims]  # an empty one may have any shape
    if len({value.node for value in values}) == 1:
        return Units(values[0].node, _cat_labels([value.labels for value in values], dim))
    start, links, labels = 0, [], []
    for value in values:
        count = reading.flow.nodes[value.node].num_units
        links.append(Link(value.node, torch.arange(count), torch.arange(start, start + count)))
        labels.append(value.labels + start if count > 1 else torch.tensor(start).expand(value.labels.shape))
        start += count
    return Units(reading.flow.add("sum", start, tuple(links), elementwise=True), _cat_labels(labels, dim))


def _cat_labels(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenates labels, in memory along every other dimension only where one of them varies."""
    narrow = [without_repeats(part) for part in parts]
    common = [max(sizes) for sizes in zip(*(part.shape for part in narrow), strict=True)]
    shapes = [[*common[:dim], part.shape[dim], *common[dim + 1 :]] for part in parts]
    joined = torch.cat([part.expand(sizes) for part, sizes in zip(narrow, shapes, strict=True)], dim)
    length = sum(part.shape[dim] for part in parts)
    return expand_repeats(joined).expand([*parts[0].shape[:dim], length, *parts[0].shape[dim + 1 :]])


def _pad(reading: Reading, call: Call) -> Value:
    """Reads constants around a tensor, along dimensions that tell no units apart."""
    value, out = reading.units(call.args[0]), call.outputs[0].shape
    padded = [dim for dim, (a, b) in enumerate(zip(value.labels.shape, out, strict=True)) if a != b]
    if any(varies(value.labels, dim) for dim in padded):
        return reading.opaque(call)
    labels = without_repeats(value.labels)
    for dim in padded:
        labels = labels.narrow(dim, 0, 1)
    return Units(value.node, labels.expand(out))


def _as_complex(reading: Reading, call: Call) -> Value:
    """Makes one number of two entries."""
    pair = gather(reading.flow, reading.units(call.args[0]), (len(call.args[0].shape) - 1,))
    return Units(pair.node, pair.labels.squeeze(-1))


def _as_real(reading: Reading, call: Call) -> Value:
    """Makes two entries of a number."""
    value = reading.units(call.args[0])
    return Units(value.node, value.labels.unsqueeze(-1).expand(call.outputs[0].shape))


def _made(reading: Reading, call: Call) -> Value:
    """Reads a new tensor, which is made of nothing that the model was given."""
    is_zero = short_name(call) in MADE_ZERO
    return single(reading.flow.zero if is_zero else reading.flow.constant, call.outputs[0].shape)


def _index(reading: Reading, call: Call) -> Value:
    """Reads entries at places that only the data know: along the indexed dimensions it may be any."""
    value, indexed = reading.value(call.args[0]), _indexed_dims(call.args[1])
    if isinstance(value, Weight):
        is_by_rows = list(indexed) == [0] and indexed[0].dtype != torch.bool and not value.chosen
        if is_by_rows and value.rows.dim() == 3:
            return _choose(value, indexed[0].shape)
        return _look_up(reading, call, value, indexed[0]) if is_by_rows else reading.opaque(call)
    value = gather(reading.flow, value, list(indexed))
    places: list[Any] = [slice(None)] * value.labels.dim()
    count = call.outputs[0].shape[min(indexed)] if indexed else 0
    for dim, ref in indexed.items():
        is_mask = ref.dtype == torch.bool
        places[dim] = torch.zeros((count,) if is_mask else ref.shape, dtype=torch.int64)
    labels = value.labels[tuple(places)]
    if labels.shape != call.outputs[0].shape:
        return reading.opaque(call)
    return _at_places(reading, Units(value.node, expand_repeats(labels)), *indexed.values())


def _at_places(reading: Reading, result: Units, *places: Ref) -> Units:
    """Returns what was read or written at some places."""
    return follow_choice(reading.flow, result, pool(reading.flow, [reading.units(ref) for ref in places], ()))


def _embedding(reading: Reading, call: Call) -> Value:
    """Reads rows of a matrix, or of a table that is no parameter."""
    table, place = reading.value(call.args[0]), call.args[1]
    if isinstance(table, Weight):
        return _look_up(reading, call, table, place)
    rows = gather(reading.flow, table, (0,))
    return _at_places(reading, Units(rows.node, rows.labels[0].expand(call.outputs[0].shape)), place)


def _look_up(reading: Reading, call: Call, table: Weight, place: Ref) -> Value:
    """Reads rows of a matrix: which row depends on the input, what it holds does not."""
    choice = reading.units(place)
    if table.chosen or table.rows.dim() != 2 or varies(table.rows, 1) or varies(table.cols, 0):
        return reading.opaque(call)
    if choice.node == reading.flow.constant:
        return reading.constant(call.outputs[0].shape)
    entry = pool(reading.flow, [choice], ())
    link = Link(entry.node, torch.zeros(table.num_rows, dtype=torch.int64))
    columns = reading.flow.add_matrix(table.name, link, table.num_rows, table.num_cols, transposed=True)
    return Units(columns, table.cols[0].expand(call.outputs[0].shape))


def _choose(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """Returns some matrices of a stack (S, R, C), ``shape`` of them."""
    rows, cols = (
        labels[(slice(None), *[None] * len(shape))].expand(-1, *shape, -1, -1) for labels in (weight.rows, weight.cols)
    )
    return replace(weight, rows=rows, cols=cols, chosen=True)


def _indexed_dims(indices: Any) -> dict[int, Ref]:
    """Returns dimension → what indexes it; a mask of several dimensions indexes all of them."""
    indexed: dict[int, Ref] = {}
    dim = 0
    for ref in indices:
        covers = len(ref.shape) if ref is not None and ref.dtype == torch.bool else 1
        if ref is not None:
            indexed |= {dim + i: ref for i in range(covers)}
        dim += covers
    return indexed


def _index_select(reading: Reading, call: Call) -> Value:
    """Reads ``index_select`` and ``gather``: entries along one dimension, any of them."""
    table = reading.value(call.args[0])
    if isinstance(table, Weight):
        is_by_rows = short_name(call) == "index_select" and call.args[1] == 0
        return _look_up(reading, call, table, call.args[2]) if is_by_rows else reading.opaque(call)
    out = call.outputs[0].shape
    if not table.labels.dim():
        return table
    dim = call.args[1] % table.labels.dim()
    gathered = gather(reading.flow, table, (dim,))
    labels = gathered.labels
    for other, size in enumerate(out):
        labels = labels if other == dim else labels.narrow(other, 0, size)
    return _at_places(reading, Units(gathered.node, labels.expand(out)), call.args[2])


def _write(reading: Reading, call: Call) -> Value:
    """Reads ``index_add``, ``scatter`` and the like: what was there, and anything written along one dimension."""
    target = reading.units(call.args[0])
    source = reading.units(call.args[3]) if len(call.args) > 3 else reading.constant()
    written = reading.sum([target, _anywhere_along_dim(reading, call, source)], call.outputs[0].shape)
    return _at_places(reading, written, call.args[2])


def _anywhere_along_dim(reading: Reading, call: Call, source: Units) -> Units:
    out = call.outputs[0].shape
    if source.labels.dim() == len(out) and len(out):
        dim = call.args[1] % len(out)
        if all(a == b or d == dim for d, (a, b) in enumerate(zip(source.labels.shape, out, strict=True))):
            return gather(reading.flow, source, (dim,))
    return pool(reading.flow, [source], ())


def _index_put(reading: Reading, call: Call) -> Value:
    """Reads what was there and what is written, whose last dimensions lie where they lie in the target."""
    target, source, out = reading.units(call.args[0]), reading.units(call.args[2]), call.outputs[0].shape
    indexed = _indexed_dims(call.args[1])
    num_places = source.labels.dim() - (len(out) - 1 - max(indexed))
    if sorted(indexed) == list(range(len(indexed))) and num_places >= 0:
        source = gather(reading.flow, source, range(num_places))
        source = Units(source.node, source.labels[(0,) * num_places] if num_places else source.labels)
    else:
        source = pool(reading.flow, [source], ())
    return _at_places(reading, reading.sum([target, source], out), *indexed.values())


def _copy(reading: Reading, call: Call) -> Value:
    """Reads ``target.copy_(source)``."""
    source = reading.units(call.args[1])
    return Units(source.node, source.labels.expand(call.outputs[0].shape))


RULES: dict[str, Rule] = {
    **dict.fromkeys(SHAPES, _reshape),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(("cat", "stack"), _cat),
    "constant_pad_nd": _pad,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
    **dict.fromkeys((*MADE, *MADE_ZERO), _made),
    "embedding": _embedding,
    "index": _index,
    **dict.fromkeys(("index_select", "gather"), _index_select),
    **dict.fromkeys(("index_add", "scatter", "scatter_add", "index_copy"), _write),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), _index_put),
    "copy": _copy,
}
