"""Sinks: where a gradient ends that nobody is to keep.

A sink is a tensor of zeros that takes no memory and stands in the autograd graph for what a gradient is needed for.
All reads of a weight share one, so autograd adds up their gradients; the sink's backward consumes the sum at once: the
optimizer updates the values (update sinks, opened once in a step), or candidates for growth are chosen (growth sinks).
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.format import Layout, all_block_means, unpack_bits
from smet_compile.ops.library import _LAYOUT, _library
from smet_compile.ops.torch_optim import torch_optim_

_AT_ONCE = 2**62
"""Autograd runs first what was made last, and a sink would find every layer's gradient waiting: it goes before all."""
NO_GRADIENT = -1
"""What a buffer of candidates holds until a gradient has come."""

_TORCH_OPTIM = "Tensor(b!)? first, Tensor(c!)? second, Tensor(d!)? largest"
_COUNTS = "Tensor(e!)? step, Tensor(f!) num_updates, Tensor(g!) num_skipped, Tensor lr, str rule, float[] options"
_library.define(f"torch_optim_(Tensor(a!) values, Tensor grad, {_TORCH_OPTIM}, {_COUNTS}) -> ()")
_library.impl("torch_optim_", torch_optim_, "CompositeExplicitAutograd")

_ACTIVE_ADAMW = (
    "Tensor exp_avg, Tensor exp_avg_sq, Tensor? scales, Tensor num_skipped, Tensor step, Tensor lr, "
    f"Tensor? generation, Tensor? births, Tensor? topology, Tensor[] index, {_LAYOUT}, "
    "float density_rate, float beta1, float beta2, float eps, "
    "float weight_decay, int warmup_steps, bool shared_step, int? noise_seed"
)
_SINKS = {
    "active_adamw_sink": f"Tensor leaf, Tensor values, {_ACTIVE_ADAMW}",
    "torch_optim_sink": "Tensor leaf, Tensor values, Tensor? first, Tensor? second, Tensor? largest, Tensor? step, "
    "Tensor num_updates, Tensor num_skipped, Tensor lr, str rule, float[] options",
    "growth_sink": f"Tensor leaf, Tensor candidates, Tensor topology, {_LAYOUT}",
}
_library.define(f"growth_candidates(Tensor grad_dense, Tensor topology, {_LAYOUT}, int count) -> Tensor")


@torch.library.register_fake("smet::torch_optim_", lib=_library)
def _(*args: Any) -> None:
    return None


def _like_values(leaf: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return values.new_zeros(()).expand(values.shape)


def _like_dense(leaf: Tensor, candidates: Tensor, topology: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return leaf.new_zeros(()).expand(shape)


def _growth_candidates(grad_dense: Tensor, topology: Tensor, *layout_and_count: Any) -> Tensor:
    """The inactive blocks of largest mean gradient (RigL, Evci et al. 2020), best first."""
    layout = Layout.of_lists(*layout_and_count[:3])
    scores = all_block_means(grad_dense, layout)
    scores.masked_fill_(unpack_bits(topology, layout.num_blocks), -1)
    return scores.topk(layout_and_count[3]).indices


@torch.library.register_fake("smet::growth_candidates", lib=_library)
def _(grad_dense: Tensor, topology: Tensor, *layout_and_count: Any) -> Tensor:
    return topology.new_empty(layout_and_count[3], dtype=torch.int64)


_library.impl("growth_candidates", _growth_candidates, "CompositeExplicitAutograd")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inputs = inputs[1:]


def _no_gradients(ctx: Any) -> tuple[Any, ...]:
    """None for the leaf and all other inputs; for a list of tensors, a list of None."""
    return None, *([None] * len(each) if _holds_tensors(each) else None for each in ctx.inputs)


def _holds_tensors(each: Any) -> bool:
    return isinstance(each, list) and isinstance(each[0], Tensor)


def _update_by_active_adamw(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, *rest = ctx.inputs
    with torch.no_grad():
        torch.ops.smet.active_adamw_(values.detach(), grad, *rest)
    return _no_gradients(ctx)


def _update_by_torch_optim(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, *rest = ctx.inputs
    with torch.no_grad():
        torch.ops.smet.torch_optim_(values.detach(), grad, *rest)
    return _no_gradients(ctx)


def _choose_candidates(ctx: Any, grad_dense: Tensor) -> tuple[Any, ...]:
    candidates, *topology_and_layout = ctx.inputs
    with torch.no_grad():
        found = torch.ops.smet.growth_candidates(grad_dense, *topology_and_layout, candidates.shape[0])
        candidates.copy_(found)
    return _no_gradients(ctx)


def _open(name: str, *inputs: Any) -> Tensor:
    sink: Tensor = getattr(torch.ops.smet, f"new_{name}")(*inputs)
    if sink.grad_fn is not None:
        sink.grad_fn._set_sequence_nr(_AT_ONCE)  # type: ignore[attr-defined]
    return sink


def _open_growth_sink(leaf: Tensor, candidates: Tensor, *topology_and_layout: Any) -> Tensor:
    """The sink that fills ``candidates``: one for all reads of a weight whose graphs are alive together."""
    known = _growth_sinks.get(candidates)
    sink = None if known is None else known()
    if sink is None or not sink.requires_grad:
        sink = _open("growth_sink", leaf, candidates, *topology_and_layout)
        _growth_sinks[candidates] = weakref.ref(sink)
    return sink


_growth_sinks = WeakIdKeyDictionary()

# A sink is two ops: one that is opened where autograd records, in eager and when a compiler traces, and one below it.
for _name, _opened, _make, _backward in (
    ("active_adamw_sink", partial(_open, "active_adamw_sink"), _like_values, _update_by_active_adamw),
    ("torch_optim_sink", partial(_open, "torch_optim_sink"), _like_values, _update_by_torch_optim),
    ("growth_sink", _open_growth_sink, _like_dense, _choose_candidates),
):
    _library.define(f"{_name}({_SINKS[_name]}) -> Tensor")
    _library.impl(_name, _opened, "CompositeImplicitAutograd")
    _library.define(f"new_{_name}({_SINKS[_name]}) -> Tensor")
    _library.impl(f"new_{_name}", _make, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smet::new_{_name}", _make, lib=_library)
    torch.library.register_autograd(f"smet::new_{_name}", _backward, setup_context=_keep, lib=_library)
