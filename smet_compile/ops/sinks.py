"""Sinks: a sink is where a gradient ends that nobody is to keep.

A sink is a tensor of zeros that takes no memory and stands in the autograd graph for what a gradient is needed for.
All reads of a weight share one, so autograd adds up their gradients; the sink's backward consumes the sum at once: the
optimizer updates the values (update sinks, opened once in a step), or candidates for growth are chosen (growth sinks).
No gradient outlives such an update; the counts of updates and of skipped blocks tell others that it was made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.format import Layout, all_block_means, unpack_bits
from smet_compile.ops import updates
from smet_compile.ops.library import library
from smet_compile.ops.torch_insides import run_first_in_backward
from smet_compile.ops.torch_optim import SINK_SCHEMA

_COUNTS = "_smet_update_counts"
NO_GRADIENT = -1
"""A buffer of candidates holds this until a gradient has come."""

library.define("growth_candidates(Tensor grad_dense, Tensor topology, str layout, int count) -> Tensor")


def _growth_candidates(grad_dense: Tensor, bits: Tensor, layout_text: str, count: int) -> Tensor:
    """Returns the inactive blocks of largest mean gradient (RigL, Evci et al. 2020), best first."""
    layout = Layout.from_text(layout_text)
    scores = all_block_means(grad_dense, layout)
    scores.masked_fill_(unpack_bits(bits, layout.num_blocks), -1)
    return scores.topk(count).indices


library.impl("growth_candidates", _growth_candidates, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::growth_candidates", lib=library)
def _(grad_dense: Tensor, bits: Tensor, layout_text: str, count: int) -> Tensor:
    return bits.new_empty(count, dtype=torch.int64)


def _like_values(leaf: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return values.new_zeros(()).expand(values.shape)


def _like_dense(leaf: Tensor, candidates: Tensor, bits: Tensor, layout_text: str) -> Tensor:
    return leaf.new_zeros(()).expand(Layout.from_text(layout_text).shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.inputs = inputs


def _no_gradients(ctx: Any) -> tuple[Any, ...]:
    """Returns None for the leaf and all other inputs; for a list of tensors, a list of None."""
    return None, *([None] * len(each) if _holds_tensors(each) else None for each in ctx.inputs)


def _holds_tensors(each: Any) -> bool:
    return isinstance(each, list) and all(isinstance(one, Tensor) for one in each)


def _update_by(op: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, *rest = ctx.inputs
    with torch.no_grad():
        getattr(torch.ops.smet, op)(values.detach(), grad, *rest)
    return _no_gradients(ctx)


def _choose_candidates(ctx: Any, grad_dense: Tensor) -> tuple[Any, ...]:
    candidates, bits, layout_text = ctx.inputs
    with torch.no_grad():
        found = torch.ops.smet.growth_candidates(grad_dense, bits, layout_text, candidates.shape[0])
        candidates.copy_(found)
    return _no_gradients(ctx)


def _open(name: str, *inputs: Any) -> Tensor:
    sink: Tensor = getattr(torch.ops.smet, f"new_{name}")(*inputs)
    run_first_in_backward(sink)
    return sink


def _open_growth_sink(leaf: Tensor, candidates: Tensor, bits: Tensor, layout_text: str) -> Tensor:
    """Opens the sink that fills ``candidates``: one for all reads of a weight whose graphs are alive together."""
    known = _growth_sinks.get(candidates)
    sink = None if known is None else known()
    if sink is None or not sink.requires_grad:
        sink = _open("growth_sink", leaf, candidates, bits, layout_text)
        _growth_sinks[candidates] = weakref.ref(sink)
    return sink


_growth_sinks = WeakIdKeyDictionary()


def _define(name: str, schema: str, opened: Callable[..., Tensor], make: Callable[..., Tensor], backward: Any) -> None:
    """Defines a sink as two ops: one that is opened where autograd records, in eager and when a compiler traces, and
    one below it."""
    library.define(f"{name}(Tensor leaf, {schema}) -> Tensor")
    library.impl(name, opened, "CompositeImplicitAutograd")
    library.define(f"new_{name}(Tensor leaf, {schema}) -> Tensor")
    library.impl(f"new_{name}", make, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smet::new_{name}", make, lib=library)
    torch.library.register_autograd(f"smet::new_{name}", backward, setup_context=_keep, lib=library)


for _name, _op, _schema in (
    ("update_sink", "update_", updates.schema(between="", mutates=False)),
    ("torch_optim_sink", "torch_optim_", SINK_SCHEMA),
):
    _define(_name, _schema, partial(_open, _name), _like_values, partial(_update_by, _op))
_define(
    "growth_sink",
    "Tensor candidates, Tensor topology, str layout",
    _open_growth_sink,
    _like_dense,
    _choose_candidates,
)


@dataclass(frozen=True, eq=False)
class UpdateCounts:
    """Counts the updates of one parameter in backward; int64 scalars.

    Args:
        num_updates, num_skipped: how many updates there were, and how many blocks they skipped for a gradient that
            is not finite. Backward raises them in place.
        first_updates, first_skipped: what they were before the first step that was counted by them.
    """

    num_updates: Tensor
    num_skipped: Tensor
    first_updates: Tensor
    first_skipped: Tensor

    def now(self) -> tuple[int, int]:
        """Waits for the device."""
        return int(self.num_updates), int(self.num_skipped)

    def at_first(self) -> tuple[int, int]:
        return int(self.first_updates), int(self.first_skipped)


def counts_of(optimizer: Optimizer) -> dict[nn.Parameter, UpdateCounts]:
    """Returns the counts of every parameter whose update was made in backward; they are not saved."""
    counts: dict[nn.Parameter, UpdateCounts] = optimizer.__dict__.setdefault(_COUNTS, {})
    return counts


def count_by(optimizer: Optimizer, parameter: nn.Parameter, num_updates: Tensor, num_skipped: Tensor) -> None:
    """Notes which tensors count the updates of ``parameter``. Others than before (a state was loaded) start afresh."""
    known = counts_of(optimizer).get(parameter)
    if known is None or known.num_updates is not num_updates or known.num_skipped is not num_skipped:
        first = num_updates.clone(), num_skipped.clone()
        counts_of(optimizer)[parameter] = UpdateCounts(num_updates, num_skipped, *first)
