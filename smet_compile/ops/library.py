"""Registers the ops under ``torch.ops.smet``: schemas that declare mutations, fake implementations, and autograd.

A topology is passed as two tensors and a text: its bits, the lists derived from them, and its layout. Here they become
a ``Topology`` again. Only ``unpack`` and ``pack`` have gradients: passes put products and updates into compiled graphs,
which contain forward and backward already.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.ops import choose, gate, reads, updates
from smet_compile.ops.torch_insides import register_autograd

CHANGED = (
    "a compact weight was changed between its forward and its backward; call backward() before optimizer.step() and "
    "TopologyManager.step()"
)


class CountsChanges(Protocol):
    """Counts the changes of its values, of which ``fully_shard`` hides some: it keeps the version of a parameter."""

    num_changes: int


_TOPOLOGY = "Tensor topology, Tensor lists, str layout"
library = torch.library.Library("smet", "DEF")
library.define(
    f"unpack(Tensor values, {_TOPOLOGY}, Tensor? update_sink, Tensor? growth_sink, bool traced, "
    "bool scales_rows=False) -> Tensor"
)
library.define(f"pack(Tensor dense, {_TOPOLOGY}, int num_active) -> Tensor")
library.define(
    f"masked_matmul(Tensor input, Tensor values, {_TOPOLOGY}, bool transposed, Tensor? bias=None, "
    "Tensor? offsets=None) -> Tensor"
)
library.define(
    f"sampled_matmul(Tensor left, Tensor right, {_TOPOLOGY}, int num_active, Tensor? offsets=None) -> Tensor"
)
library.define(f"update_({updates.schema()}) -> ()")
library.define(f"sampled_update_({updates.schema('Tensor left, Tensor right, Tensor? offsets')}) -> ()")


def on_unseen_graph() -> None:
    """Runs when a compiled graph that the passes did not see unpacks a weight. The passes replace it by a warning."""


def _unpack(
    values: Tensor,
    bits: Tensor,
    lists: Tensor,
    layout: str,
    update_sink: Tensor | None,
    growth_sink: Tensor | None,
    traced: bool,
    scales_rows: bool = False,
) -> Tensor:
    if traced:
        on_unseen_graph()
    if reads.any_live():
        reads.settle_in_graph(values)
    topology = _find("unpack: values", values, bits, lists, layout)
    dense: Tensor = choose.compute("unpack", values, topology)(values, topology)
    return dense


def _pack(dense: Tensor, bits: Tensor, lists: Tensor, layout: str, num_active: int) -> Tensor:
    topology = gate.find(bits, lists, layout, num_active)
    if dense.shape != topology.layout.shape:
        raise ValueError(f"pack: expected a weight of shape {topology.layout.shape}, got {tuple(dense.shape)}")
    values: Tensor = choose.compute("pack", dense, topology)(dense, topology)
    return values


def _masked_matmul(
    input: Tensor,
    values: Tensor,
    bits: Tensor,
    lists: Tensor,
    layout: str,
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    if reads.any_live():
        reads.settle_in_graph(values)
    topology = _find("masked_matmul: values", values, bits, lists, layout)
    rows, cols = topology.layout.matrix
    _check_alike("masked_matmul", values, "input", input)
    _check_tokens("masked_matmul: input", input, cols if transposed else rows, topology, offsets)
    if bias is not None:
        num_outputs = rows if transposed else cols
        _check_alike("masked_matmul", values, "bias", bias)
        if bias.shape != (num_outputs,):
            raise ValueError(f"masked_matmul: expected a bias of ({num_outputs},), got {tuple(bias.shape)}")
    compute = choose.compute("masked_matmul", values, topology, offsets is not None)
    out: Tensor = compute(input, values, topology, transposed, bias, offsets)
    return out


def _sampled_matmul(
    left: Tensor,
    right: Tensor,
    bits: Tensor,
    lists: Tensor,
    layout: str,
    num_active: int,
    offsets: Tensor | None = None,
) -> Tensor:
    topology = gate.find(bits, lists, layout, num_active)
    _check_factors("sampled_matmul", left, right, topology, offsets)
    values: Tensor = choose.compute("sampled_matmul", left, topology, offsets is not None)(
        left, right, topology, offsets
    )
    return values


def _update_(values: Tensor, grad: Tensor, *rest: Any) -> None:
    update = updates.unflatten(values, grad, rest)
    choose.update_kernel_of(update).function("update_all")([update])


def _sampled_update_(values: Tensor, left: Tensor, right: Tensor, offsets: Tensor | None, *rest: Any) -> None:
    """Makes the update by the gradient pack(leftᵀ right), which is freed at once or never stored."""
    update = updates.unflatten(values, values, rest)
    topology = update.topology
    if topology is None:
        raise ValueError("sampled_update_: expected a topology, got none; a plain parameter is updated by update_")
    fused = choose.fused_update(left, offsets, update)
    if fused is not None:
        _check_factors("sampled_update_", left, right, topology, offsets)
        fused(left, right, offsets, update)
        return
    text = topology.layout.text
    grad = _sampled_matmul(left, right, topology.bits, topology.lists, text, topology.num_active, offsets)
    update.grad = grad.to(values.dtype)
    choose.update_kernel_of(update).function("update_all")([update])


for _name, _implementation in (
    ("unpack", _unpack),
    ("pack", _pack),
    ("masked_matmul", _masked_matmul),
    ("sampled_matmul", _sampled_matmul),
    ("update_", _update_),
    ("sampled_update_", _sampled_update_),
):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")


def _find(name: str, values: Tensor, bits: Tensor, lists: Tensor, layout: str) -> Topology:
    """Returns the topology of ``values``. Raises ValueError where their shape is not that of its blocks."""
    shape = values.shape
    block = Layout.from_text(layout).values_shape(0)[1:]
    if not shape or shape[1:] != block:
        raise ValueError(f"{name}: expected shape (N, *{block}) for the layout {layout}, got {tuple(shape)}")
    return gate.find(bits, lists, layout, shape[0])


def _check_alike(op: str, tensor: Tensor, name: str, other: Tensor | None) -> None:
    if other is not None and (other.dtype is not tensor.dtype or other.device != tensor.device):
        raise ValueError(
            f"{op}: expected {name} of {tensor.dtype} on {tensor.device}, got {other.dtype} on {other.device}"
        )


def _check_factors(op: str, left: Tensor, right: Tensor, topology: Topology, offsets: Tensor | None) -> None:
    _check_alike(op, left, "right", right)
    _check_tokens(f"{op}: left", left, topology.layout.rows, topology, offsets)
    _check_tokens(f"{op}: right", right, topology.layout.cols, topology, offsets)
    if left.shape[:-1] != right.shape[:-1]:
        raise ValueError(
            f"{op}: expected as many tokens on both sides, got {tuple(left.shape)} and {tuple(right.shape)}"
        )


def _check_tokens(name: str, tokens: Tensor, width: int, topology: Topology, offsets: Tensor | None) -> None:
    """Checks for (T, width) with one matrix or with offsets, else (S, T, width); a stack of one may have either."""
    shape, stack = tokens.shape, topology.num_matrices
    if len(shape) == 2:
        fits = offsets is not None or stack == 1
    else:
        fits = len(shape) == 3 and offsets is None and shape[0] == stack
    if not fits or shape[-1] != width:
        expected = f"(tokens, {width})" if offsets is not None or stack == 1 else f"({stack}, tokens, {width})"
        raise ValueError(f"{name}: expected {expected}, got {tuple(shape)}")


@torch.library.register_fake("smet::unpack", lib=library)
def _(values: Tensor, bits: Tensor, lists: Tensor, layout: str, *sinks: Any) -> Tensor:
    return values.new_empty(Layout.from_text(layout).shape)


@torch.library.register_fake("smet::pack", lib=library)
def _(dense: Tensor, bits: Tensor, lists: Tensor, layout: str, num_active: int) -> Tensor:
    return dense.new_empty(Layout.from_text(layout).values_shape(num_active))


@torch.library.register_fake("smet::masked_matmul", lib=library)
def _(
    input: Tensor, values: Tensor, bits: Tensor, lists: Tensor, layout: str, transposed: bool, *rest: Tensor | None
) -> Tensor:
    rows, cols = Layout.from_text(layout).matrix
    return input.new_empty(*input.shape[:-1], rows if transposed else cols)


@torch.library.register_fake("smet::sampled_matmul", lib=library)
def _(
    left: Tensor,
    right: Tensor,
    bits: Tensor,
    lists: Tensor,
    layout: str,
    num_active: int,
    offsets: Tensor | None = None,
) -> Tensor:
    return left.new_empty(Layout.from_text(layout).values_shape(num_active))


@torch.library.register_fake("smet::update_", lib=library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("smet::sampled_update_", lib=library)
def _(*args: Any) -> None:
    return None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs as attributes, since ``save_for_backward`` checks that nobody writes to them.

    DistributedDataParallel copies rank 0's buffers in every forward, which autograd would take for a change of the
    topology even with the same content. A real change also changes ``values``, whose version is checked.
    """
    ctx.values, ctx.bits, ctx.lists, ctx.layout, update_sink, growth_sink, _, ctx.scales_rows = inputs
    ctx.has_update_sink = update_sink is not None
    ctx.growth_sink = growth_sink  # other reads find it while this graph is alive
    ctx.version = ctx.values._version


def _unpack_backward(ctx: Any, grad_dense: Tensor) -> tuple[Any, ...]:
    """Sends the compact gradient to the update sink if there is one, else to the values, and the dense gradient to the
    growth sink if there is one. The rows of the compact one are scaled where the site asks for it (``row_scale``)."""
    if ctx.values._version != ctx.version:
        raise RuntimeError(CHANGED)
    needs_values, _, _, _, needs_update_sink, needs_growth_sink, *_ = ctx.needs_input_grad
    grad = None
    if needs_values or needs_update_sink:
        grad = torch.ops.smet.pack(grad_dense, ctx.bits, ctx.lists, ctx.layout, ctx.values.shape[0])
        if ctx.scales_rows:
            grad = torch.ops.smet.scale_rows(grad, ctx.bits, ctx.lists, ctx.layout)
    to_values, to_sink = (None, grad) if ctx.has_update_sink else (grad, None)
    to_growth = grad_dense if needs_growth_sink else None
    return to_values, None, None, None, to_sink, to_growth, None, None


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.bits, ctx.lists, ctx.layout, _ = inputs


def _pack_backward(ctx: Any, grad_values: Tensor) -> tuple[Any, ...]:
    grad = torch.ops.smet.unpack(grad_values, ctx.bits, ctx.lists, ctx.layout, None, None, False)
    return grad, None, None, None, None


register_autograd(library, "smet::unpack", _unpack_backward, _save_unpack, _unpack)
register_autograd(library, "smet::pack", _pack_backward, _save_pack, _pack)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "masked_matmul and sampled_matmul have no gradients, since compiled graphs contain them already; multiply with "
        "the module's weight instead"
    )


register_autograd(library, "smet::masked_matmul", _no_gradient, None, _masked_matmul)
register_autograd(library, "smet::sampled_matmul", _no_gradient, None, _sampled_matmul)
