"""Finds which compact weights have an output that batch norm normalizes, and nothing else reads.

The output of a product with a weight is followed through views, copies, conversions and sums. With it goes a tensor of
its shape that holds, for each entry, the row of the weight that made it. The same ops run on that tensor, so that at a
batch norm it tells whether each channel comes from one row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Layout
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


@dataclass(frozen=True)
class _Followed:
    """Describes a tensor that is a weight or the output of one: the sites in it, and each entry's row (int32)."""

    sites: frozenset[str]
    rows: Tensor


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
        self._weights: dict[int, _Followed] = {}
        self._outputs: dict[int, _Followed] = {}
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
            self._weights[call.outputs[0].number] = _Followed(frozenset((site.name,)), _rows_of(site.layout))
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
                self._note(self._outputs[ref.number].sites, f"its output is read by {_named(call)} without batch norm")
            for ref in (*call.written, *call.aliases):
                self._outputs.pop(ref.number, None)

    def _read_weights(self, call: Call, weights: list[Ref]) -> None:
        """Makes the result of a product one that is followed, or that of a view of the weight."""
        followed = self._weights[weights[0].number]
        if len(weights) == 1 and call.args[0] == weights[0] and (parts := _replayed(call, followed.rows)):
            self._weights |= {ref.number: _Followed(followed.sites, rows) for ref, rows in parts.items()}
            return
        place = _PRODUCTS.get(op_name(call))
        if len(weights) != 1 or place is None or call.args[place] != weights[0]:
            for ref in weights:
                self._note(self._weights[ref.number].sites, f"the weight is read by {_named(call)}")
            return
        rows = _rows_of_product(call, followed.rows)
        if rows is None:
            self._note(followed.sites, "the weight is multiplied so that a row is no output")
        else:
            self._outputs[call.outputs[0].number] = _Followed(followed.sites, rows)

    def _pass_on(self, call: Call, inputs: list[Ref]) -> bool:
        """Follows outputs through a view, a copy or a sum; returns False where the call is another."""
        followed = [self._outputs[ref.number] for ref in inputs]
        if len(inputs) == 1 and call.args[0] == inputs[0] and (parts := _replayed(call, followed[0].rows)):
            self._outputs |= {ref.number: _Followed(followed[0].sites, rows) for ref, rows in parts.items()}
            return True
        result = call.outputs[0] if call.outputs else None
        if op_name(call) != "aten.add" or result is None or any(ref.shape != result.shape for ref in inputs):
            return False
        sites = frozenset(name for each in followed for name in each.sites)
        self._outputs[result.number] = _Followed(sites, followed[0].rows)
        return True

    def _normalize(self, call: Call, followed: _Followed) -> None:
        rows = _without_repeats(followed.rows).transpose(0, 1).flatten(1)
        if not _takes_statistics(call):
            self._note(followed.sites, EVALUATED)
        elif len(followed.sites) > 1:
            for name in followed.sites:
                others = ", ".join(sorted(followed.sites - {name})[:3])
                self._note((name,), f"it reaches batch norm in a sum with the outputs of other sites ({others})")
        elif not bool((rows == rows[:, :1]).all()):
            self._note(followed.sites, "batch norm normalizes several of its rows together")
        else:
            self._fed |= followed.sites

    def end(self, outputs: list[Ref]) -> None:
        """Takes into account what the model returns."""
        for ref in outputs:
            if ref.number in self._outputs:
                self._note(self._outputs[ref.number].sites, "its output is returned by the model without batch norm")

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


def _rows_of(layout: Layout) -> Tensor:
    """Returns the row of each entry of a dense weight."""
    rows = torch.arange(layout.num_matrices * layout.rows, dtype=torch.int32)
    return rows[:, None].expand(-1, layout.cols).reshape(layout.shape)


def _without_repeats(rows: Tensor) -> Tensor:
    """Leaves one entry of each dimension but the channels along which the same memory is repeated."""
    for dim, stride in enumerate(rows.stride()):
        if stride == 0 and dim != 1:
            rows = rows.narrow(dim, 0, 1)
    return rows


def _replayed(call: Call, rows: Tensor) -> dict[Ref, Tensor] | None:
    """Returns the rows of each result of a view, a copy or a conversion; None where the call is something else."""
    name = op_name(call)
    if name in _RESHAPES:
        made: Any = rows.reshape(call.outputs[0].shape)
    elif name in _COPIES:
        made = rows
    elif call.op.is_view and name not in _NOT_FOLLOWED:
        made = call.op(rows, *call.args[1:], **call.kwargs)
    else:
        return None
    parts = list(made) if isinstance(made, list | tuple) else [made]
    return dict(zip(call.outputs, parts, strict=True))


def _rows_of_product(call: Call, rows: Tensor) -> Tensor | None:
    """Returns the row of each entry of a product's result; None where an output is no row of the weight."""
    result = call.outputs[0].shape
    if op_name(call) == "aten.convolution":
        if named_arguments(call)["transposed"]:
            return None
        of_filters = rows.flatten(1)[:, :1]
        is_known = bool((rows.flatten(1) == of_filters).all())
        return of_filters.view(1, -1, *[1] * (len(result) - 2)).expand(result) if is_known else None
    of_columns = rows[..., :1, :]
    return of_columns.expand(result) if bool((rows == of_columns).all()) else None
