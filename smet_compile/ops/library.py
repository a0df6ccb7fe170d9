"""Registers the ops under ``torch.ops.smet``: schemas with true mutations, fakes, autograd.

A layout travels as three lists of integers (shape, matrix, block_shape), since a schema knows no classes.
``index`` holds the lists derived from the topology (``CompactWeight.index``) for whatever kernel wants them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import adamw_all, check, choose, gate

CHANGED = (
    "a compact weight was changed between its forward and its backward; call backward() before optimizer.step() and "
    "TopologyManager.step()"
)
_LAYOUT = "int[] shape, int[] matrix, int[] block_shape"
_library = torch.library.Library("smet", "DEF")
_library.define(
    f"unpack(Tensor values, Tensor topology, Tensor[] index, {_LAYOUT}, "
    "Tensor? update_sink, Tensor? growth_sink, bool traced) -> Tensor"
)
_library.define(f"pack(Tensor dense, Tensor topology, Tensor[] index, {_LAYOUT}, int num_active) -> Tensor")
_library.define(
    "active_adamw_(Tensor(a!) values, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(f!)? scales, "
    "Tensor(d!) num_skipped, Tensor(e!) step, Tensor lr, Tensor? generation, Tensor? births, Tensor? topology, "
    f"Tensor[] index, {_LAYOUT}, float density_rate, float beta1, float beta2, float eps, float weight_decay, "
    "int warmup_steps, bool shared_step, int? noise_seed) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # kernels read tables that the host writes anew
)


def on_unseen_graph() -> None:
    """Called when a compiled graph runs that the compiler passes never saw. They put their warning here."""


def _unpack(values: Tensor, topology: Tensor, index: list[Tensor], *layout_and_more: Any) -> Tensor:
    layout = layout_and_more[:3]
    if layout_and_more[-1]:
        on_unseen_graph()
    case = choose.case_of(values, layout, values.shape[0])
    check.unpack(values, case.layout)
    gate.check_topology(topology, index, case.layout, case.num_active)
    dense: Tensor = choose.compute("unpack", case)(values, topology, index, *layout)
    return dense


def _pack(dense: Tensor, topology: Tensor, index: list[Tensor], *layout_and_count: Any) -> Tensor:
    case = choose.case_of(dense, layout_and_count[:3], layout_and_count[3])
    check.pack(dense, case.layout)
    gate.check_topology(topology, index, case.layout, case.num_active)
    values: Tensor = choose.compute("pack", case)(dense, topology, index, *layout_and_count)
    return values


for _name, _implementation in (("unpack", _unpack), ("pack", _pack), ("active_adamw_", adamw_all.active_adamw_)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::unpack", lib=_library)
def _(values: Tensor, topology: Tensor, index: list[Tensor], *layout_and_more: Any) -> Tensor:
    return values.new_empty(layout_and_more[0])


@torch.library.register_fake("smet::pack", lib=_library)
def _(dense: Tensor, topology: Tensor, index: list[Tensor], *layout_and_count: Any) -> Tensor:
    *layout, num_active = layout_and_count
    return dense.new_empty(Layout.of_lists(*layout).values_shape(num_active))


@torch.library.register_fake("smet::active_adamw_", lib=_library)
def _(*args: Any) -> None:
    return None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Not by ``save_for_backward``: DistributedDataParallel rewrites buffers in every forward, with what they hold,
    and autograd would take that for a change of topology. A real one moves the values too, which is looked at."""
    ctx.values, ctx.topology, ctx.index, *ctx.layout = inputs[:6]
    ctx.has_update_sink = inputs[6] is not None
    ctx.growth_sink = inputs[7]  # other reads find it while this graph is alive
    ctx.version = ctx.values._version


def _unpack_backward(ctx: Any, grad_dense: Tensor) -> tuple[Any, ...]:
    """The compact gradient goes to the update sink where there is one, else to the values; the dense one to the
    growth sink."""
    if ctx.values._version != ctx.version:
        raise RuntimeError(CHANGED)
    wanted = ctx.needs_input_grad
    grad = None
    if wanted[0] or wanted[6]:
        grad = torch.ops.smet.pack(grad_dense, ctx.topology, ctx.index, *ctx.layout, ctx.values.shape[0])
    to_values, to_sink = (None, grad) if ctx.has_update_sink else (grad, None)
    to_growth = grad_dense if wanted[7] else None
    return to_values, None, [None] * len(ctx.index), None, None, None, to_sink, to_growth, None


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.topology, ctx.index, *ctx.layout, _ = inputs


def _pack_backward(ctx: Any, grad_values: Tensor) -> tuple[Any, ...]:
    grad = torch.ops.smet.unpack(grad_values, ctx.topology, ctx.index, *ctx.layout, None, None, False)
    return grad, None, [None] * len(ctx.index), None, None, None, None


torch.library.register_autograd("smet::unpack", _unpack_backward, setup_context=_save_unpack, lib=_library)
torch.library.register_autograd("smet::pack", _pack_backward, setup_context=_save_pack, lib=_library)
