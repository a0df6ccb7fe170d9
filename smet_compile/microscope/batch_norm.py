"""Finds which compact weights have an output that batch norm normalizes, and nothing else reads.

The output of a product with a weight is followed through views, copies, conversions, concatenations and sums. With it
goes a tensor of its shape that holds, for each entry, the number of its source: one row of one weight, a sum of several
such rows, or zero for all else. The same ops run on that tensor, so that at a batch norm it tells whether each channel
comes from one row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smet_compile.microscope.reading import named_arguments, op_name, short_name
from smet_compile.microscope.recording import Call, Recording, Ref
from smet_compile.ops import Site

_BATCH_NORMS = {
    *("aten.native_batch_norm", "aten.cudnn_batch_norm", "aten.miopen_batch_norm", "aten._native_batch_norm_legit"),
    *("aten._batch_norm_with_update", "aten._batch_norm_no_update", "aten._native_batch_norm_legit_no_training"),
    *("aten.batch_norm_stats", "aten.batch_norm_elemt"),  # those of SyncBatchNorm
}
_WITHOUT_STATISTICS = {"aten._batch_norm_no_update", "aten._native_batch_norm_legit_no_training"}
_RESHAPES = {"aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias"}
_COPIES = {"aten._to_copy", "aten.clone", "aten.detach", "aten.alias"}
_NOT_FOLLOWED = {"aten.as_strided"}
_PRODUCTS = {"aten.convolution": 1, "aten.mm": 1, "aten.bmm": 1, "aten.addmm": 2}
"""Maps each product to the place of the argument that the weight has to be."""
_NAMES = {
    "native_layer_norm": "a layer norm, by which gradients are not skewed",
    "native_group_norm": "a group norm",
    "convolution": "a convolution",
    "relu": "a ReLU",
    "cat": "a concatenation",
}
UNUSED = "the example does not use it"
NO_BATCH_NORM = "its output reaches no batch norm"
EVALUATED = "its output reaches a batch norm that is in evaluation mode"
_SEVERAL_ROWS = "batch norm normalizes several of its rows together"
_SEVERAL_TENSORS = "batch norm normalizes its rows together with what others made"


@dataclass
class BatchNormUse:
    """Holds what a forward showed.

    Args:
        reasons: for each site why batch norm alone does not read its output; an empty text where it does.
        num_training, num_evaluated: how many batch norms take their statistics from the batch, or from earlier ones.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    num_training: int = 0
    num_evaluated: int = 0


class _Sources:
    """Numbers the sources of entries: each row of each site, and the sums of several of them; zero is no source."""

    def __init__(self) -> None:
        self._sites: list[frozenset[str]] = [frozenset()]
        self._first: dict[str, int] = {}
        self._sums: set[int] = set()

    def of_rows(self, site: Site) -> Tensor:
        """Returns the source of each entry of a dense weight (int32)."""
        layout = site.layout
        num_rows = layout.num_matrices * layout.rows
        first = self._first.setdefault(site.name, len(self._sites))
        if first == len(self._sites):
            self._sites += [frozenset((site.name,))] * num_rows
        rows = torch.arange(first, first + num_rows, dtype=torch.int32)
        return rows[:, None].expand(-1, layout.cols).reshape(layout.shape)

    def of_sum(self, one: Tensor, other: Tensor) -> Tensor:
        """Returns the sources of a sum of two tensors of one shape."""
        shape = one.shape
        one, other = _without_repeats(one, other)
        pairs, places = torch.stack((one, other)).flatten(1).unique(dim=1, return_inverse=True)
        found = [self._pair(*pair) for pair in pairs.T.tolist()]
        return torch.tensor(found, dtype=torch.int32)[places].view(one.shape).expand(shape)

    def _pair(self, one: int, other: int) -> int:
        if one == other or not (one and other):
            return max(one, other)
        self._sites.append(self._sites[one] | self._sites[other])
        self._sums.add(len(self._sites) - 1)
        return len(self._sites) - 1

    def sites(self, sources: Tensor) -> frozenset[str]:
        """Returns the sites that have a part in a tensor."""
        return frozenset().union(*(self._sites[number] for number in _distinct(sources)))

    def is_sum(self, source: int) -> bool:
        return source in self._sums


def find_uses(recording: Recording, names: dict[str, Site]) -> BatchNormUse:
    """Reads from a recorded forward which sites feed batch norm. ``names``: the site of each parameter's name."""
    follower = _Follower({recording.state[name].number: site for name, site in names.items()})
    for call in recording.calls:
        follower.follow(call)
    follower.end(recording.outputs)
    return follower.found(site.name for site in names.values())


class _Follower:
    """Follows weights and their outputs from call to call."""

    def __init__(self, values: dict[int, Site]) -> None:
        self._values = values
        self._sources = _Sources()
        self._weights: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._read: set[str] = set()
        self._fed: set[str] = set()
        self._problems: dict[str, dict[str, None]] = {}
        self._use = BatchNormUse()

    def follow(self, call: Call) -> None:
        """Takes one call into account."""
        name, refs = op_name(call), _refs(call)
        if name == "smet.unpack" and call.args[0].number in self._values:
            site = self._values[call.args[0].number]
            self._read.add(site.name)
            self._weights[call.outputs[0].number] = self._sources.of_rows(site)
            return
        is_norm = name in _BATCH_NORMS
        if is_norm and name != "aten.batch_norm_elemt":
            trains = _takes_statistics(call)
            self._use.num_training += trains
            self._use.num_evaluated += not trains
        weights = [ref for ref in refs if ref.number in self._weights]
        outputs = [ref for ref in refs if ref.number in self._outputs]
        if name.startswith("prim.") or not (weights or outputs):  # prim ops ask for a device or a size
            return
        if weights:
            self._read_weights(call, weights)
        if is_norm and outputs == [call.args[0]]:
            self._normalize(call, self._outputs[outputs[0].number])
        elif outputs and not (not weights and self._pass_on(call, outputs)):
            for ref in outputs:
                self._note_all(self._outputs[ref.number], f"its output is read by {_named(call)} without batch norm")
            for ref in (*call.written, *call.aliases):
                self._outputs.pop(ref.number, None)

    def _read_weights(self, call: Call, weights: list[Ref]) -> None:
        """Makes the result of a product one that is followed, or that of a view of the weight."""
        sources = self._weights[weights[0].number]
        if len(weights) == 1 and call.args[0] == weights[0] and (parts := _replayed(call, sources)):
            self._weights |= {ref.number: part for ref, part in parts.items()}
            return
        place = _PRODUCTS.get(op_name(call))
        if len(weights) != 1 or place is None or call.args[place] != weights[0]:
            for ref in weights:
                self._note_all(self._weights[ref.number], f"the weight is read by {_named(call)}")
            return
        made = _sources_of_product(call, sources)
        if made is None:
            self._note_all(sources, "the weight is multiplied so that a row is no output")
        else:
            self._outputs[call.outputs[0].number] = made

    def _pass_on(self, call: Call, inputs: list[Ref]) -> bool:
        """Follows outputs through a view, a copy, a concatenation or a sum; returns False where the call is another."""
        sources = [self._outputs[ref.number] for ref in inputs]
        if len(inputs) == 1 and call.args[0] == inputs[0] and (parts := _replayed(call, sources[0])):
            self._outputs |= {ref.number: part for ref, part in parts.items()}
            return True
        result = call.outputs[0] if call.outputs else None
        if result is None:
            return False
        if op_name(call) == "aten.cat":
            known = named_arguments(call)  # torch ignores an empty tensor of another number of dimensions
            joined = [ref for ref in known["tensors"] if len(ref.shape) == len(result.shape)]
            parts_of = [self._outputs.get(ref.number, _no_source(ref)) for ref in joined]
            self._outputs[result.number] = _concatenated(parts_of, known.get("dim", 0))
            return True
        if op_name(call) != "aten.add" or any(ref.shape != result.shape for ref in inputs):
            return False
        self._outputs[result.number] = functools.reduce(self._sources.of_sum, sources)
        return True

    def _normalize(self, call: Call, sources: Tensor) -> None:
        if not _takes_statistics(call):
            self._note_all(sources, EVALUATED)
            return
        of_channels = _without_repeats(sources, keep=1)[0].transpose(0, 1).flatten(1)
        is_whole = (of_channels == of_channels[:, :1]).all(1)
        for source in _distinct(of_channels[is_whole, 0]):
            self._normalize_source(source)
        for channel in of_channels[~is_whole]:
            names = self._sources.sites(channel)
            is_alone = len(names) == 1 and bool((channel > 0).all())
            self._note(names, _SEVERAL_ROWS if is_alone else _SEVERAL_TENSORS)

    def _normalize_source(self, source: int) -> None:
        """Takes into account that batch norm has a channel of this source alone."""
        names = self._sources.sites(torch.tensor([source]))
        if not self._sources.is_sum(source):
            self._fed |= names
        elif len(names) == 1:
            self._note(names, _SEVERAL_ROWS)
        else:
            for name in names:
                others = ", ".join(sorted(names - {name})[:3])
                self._note((name,), f"it reaches batch norm in a sum with the outputs of other sites ({others})")

    def end(self, outputs: list[Ref]) -> None:
        """Takes into account what the model returns."""
        for ref in outputs:
            if ref.number in self._outputs:
                self._note_all(self._outputs[ref.number], "its output is returned by the model without batch norm")

    def _note_all(self, sources: Tensor, problem: str) -> None:
        self._note(self._sources.sites(sources), problem)

    def _note(self, sites: Iterable[str], problem: str) -> None:
        for name in sites:
            self._problems.setdefault(name, {})[problem] = None

    def found(self, names: Iterable[str]) -> BatchNormUse:
        for name in names:
            problems = list(self._problems.get(name, ()))
            if name not in self._read:
                problems = [UNUSED]
            elif not problems and name not in self._fed:
                problems = [NO_BATCH_NORM]
            self._use.reasons[name] = "; ".join(problems[:3])
        return self._use


def _refs(call: Call) -> list[Ref]:
    """Returns the tensors that a call was given, also those in lists."""
    found: list[Ref] = []
    for value in (*call.args, *call.kwargs.values()):
        found += [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Ref)]
    return found


def _takes_statistics(call: Call) -> bool:
    """Tells whether a batch norm normalizes by the statistics of the batch."""
    return bool(named_arguments(call).get("training", op_name(call) not in _WITHOUT_STATISTICS))


def _named(call: Call) -> str:
    return _NAMES.get(short_name(call), short_name(call))


def _distinct(sources: Tensor) -> list[int]:
    found: list[int] = _without_repeats(sources)[0].unique().tolist()
    return found


def _no_source(ref: Ref) -> Tensor:
    return torch.zeros((), dtype=torch.int32).expand(ref.shape)


def _without_repeats(*tensors: Tensor, keep: int | None = None) -> list[Tensor]:
    """Leaves one entry of each dimension, but for one to keep, along which all repeat the same memory."""
    kept = list(tensors)
    for dim in range(tensors[0].dim()):
        if dim != keep and all(each.stride(dim) == 0 for each in tensors):
            kept = [each.narrow(dim, 0, 1) for each in kept]
    return kept


def _concatenated(parts: list[Tensor], dim: int) -> Tensor:
    """Joins the sources of entries, without a copy of what repeats along other dimensions."""
    shape, dim = list(parts[0].shape), dim % parts[0].dim()
    shape[dim] = sum(each.shape[dim] for each in parts)
    return torch.cat(_without_repeats(*parts, keep=dim), dim).expand(shape)


def _replayed(call: Call, sources: Tensor) -> dict[Ref, Tensor] | None:
    """Returns the sources in each result of a view, a copy or a conversion; None where the call is something else."""
    name = op_name(call)
    if name in _RESHAPES:
        made: Any = sources.reshape(call.outputs[0].shape)
    elif name in _COPIES:
        made = sources
    elif call.op.is_view and name not in _NOT_FOLLOWED:
        made = call.op(sources, *call.args[1:], **call.kwargs)
    else:
        return None
    parts = list(made) if isinstance(made, list | tuple) else [made]
    return dict(zip(call.outputs, parts, strict=True))


def _sources_of_product(call: Call, sources: Tensor) -> Tensor | None:
    """Returns the source of each entry of a product's result; None where an output is no row of the weight."""
    result = call.outputs[0].shape
    if op_name(call) == "aten.convolution":
        if named_arguments(call)["transposed"]:
            return None
        of_filters = sources.flatten(1)[:, :1]
        is_known = bool((sources.flatten(1) == of_filters).all())
        return of_filters.view(1, -1, *[1] * (len(result) - 2)).expand(result) if is_known else None
    of_columns = sources[..., :1, :]
    return of_columns.expand(result) if bool((sources == of_columns).all()) else None
