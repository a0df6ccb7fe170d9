"""Multiplies tokens with the values of a compact weight in eager mode, with autograd.

Forward and both gradients call the kernels that passes put into compiled graphs. What autograd keeps is the input; the
values are kept by reference and their version is checked, as ``unpack`` does. Where a kernel cannot be called the same
is computed from the unpacked weight: for a gradient of a gradient, for gradients in batches, and where a
``TorchDispatchMode`` is to see every op. One that knows this library's ops sees these instead (``shown_as_ops``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops import choose, gate
from smet_compile.ops.library import CHANGED, CountsChanges
from smet_compile.ops.row_scale import scaled
from smet_compile.ops.torch_insides import a_mode_sees_ops, is_ordinary, reshape_new

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients of the input, the values and the bias; None where one is not needed."""


class Factor(NamedTuple):
    """Describes the compact weight W of a product.

    Args:
        transposed: whether the product is input Wᵀ, as in ``nn.Linear``, or input W.
        dtype: of the product; the values are converted to it (autocast).
        owner: counts the changes of the values.
        scales_rows: whether the gradient of the values is corrected for batch norm (``ops.row_scale``).
    """

    topology: Topology
    transposed: bool
    dtype: torch.dtype
    owner: CountsChanges
    scales_rows: bool = False

    @property
    def num_inputs(self) -> int:
        layout = self.topology.layout
        return layout.cols if self.transposed else layout.rows

    @property
    def num_outputs(self) -> int:
        layout = self.topology.layout
        return layout.rows if self.transposed else layout.cols


_num_shown = 0


@contextmanager
def shown_as_ops() -> Iterator[None]:
    """Makes a product within one op of ``torch.ops.smet``, which a ``TorchDispatchMode`` sees; of fake tensors too."""
    global _num_shown
    _num_shown += 1
    try:
        yield
    finally:
        _num_shown -= 1


def are_shown_as_ops() -> bool:
    """Tells whether products are ops for a mode that knows them."""
    return _num_shown > 0


def multiply(input: Tensor, values: Tensor, update_sink: Tensor | None, bias: Tensor | None, factor: Factor) -> Tensor:
    """Returns input W + bias, or input Wᵀ + bias. The gradient of the values goes to the sink where there is one."""
    product: Tensor
    if torch.is_grad_enabled():
        for tensor in (input, values, update_sink, bias):
            if tensor is not None and tensor.requires_grad:
                product = _Product.apply(input, values, update_sink, bias, factor)
                return product
    product = _without_autocast(_forward, input, values, bias, factor)
    return product


class _Product(torch.autograd.Function):
    """Records a product for backward."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, values: Tensor, update_sink: Tensor | None, bias: Tensor | None, factor: Factor
    ) -> Tensor:
        _, needs_values, needs_sink, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_values or needs_sink else None)
        ctx.values, ctx.version, ctx.factor = values, values._version, factor
        ctx.num_changes = factor.owner.num_changes
        ctx.has_update_sink = update_sink is not None
        ctx.input_shape = input.shape
        product: Tensor = _without_autocast(_forward, input, values, bias, factor)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.values._version != ctx.version or ctx.factor.owner.num_changes != ctx.num_changes:
            raise RuntimeError(CHANGED)
        (input,) = ctx.saved_tensors
        needs_input, _, _, needs_bias, _ = ctx.needs_input_grad
        needed, factor = (needs_input, needs_bias), _checked(ctx.factor)
        compute = _gradients if _can_call_kernels(grad) else _differentiable_gradients
        to_input, to_values, to_bias = _without_autocast(compute, grad, input, ctx.values, factor, needed)
        to_input = None if to_input is None else to_input.reshape(ctx.input_shape)
        if to_values is not None and factor.scales_rows:
            to_values = _scaled(to_values, factor.topology, is_new=compute is _gradients)
        if ctx.has_update_sink:
            return to_input, None, to_values, to_bias, None
        return to_input, to_values, None, to_bias, None


RUN_IN_EAGER = (_Product.forward, _Product.backward)
"""Functions that Dynamo must not compile by themselves after a graph break."""


def _can_call_kernels(grad: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return are_shown_as_ops() or (is_ordinary(grad) and not a_mode_sees_ops())


def _checked(factor: Factor) -> Factor:
    """Checks the topology again where its buffers were written since the forward, be it with what they held."""
    known = factor.topology
    if known.is_unchanged():
        return factor
    return factor._replace(topology=gate.find(known.bits, known.lists, known.layout.text, known.num_active))


def _forward(input: Tensor, values: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
    if a_mode_sees_ops() and not are_shown_as_ops():
        return _by_ops(input, _unpacked(values, factor), bias, factor)
    return _shaped(
        _masked(_rows(input), _converted(values, factor.dtype), factor.topology, factor.transposed, bias), input
    )


def _gradients(
    grad: Tensor, input: Tensor | None, values: Tensor, factor: Factor, needed: tuple[bool, bool]
) -> Gradients:
    """Computes the gradients by kernels: of the values where there is an ``input``, of the others where needed."""
    needs_input, needs_bias = needed
    topology, grad_TO = factor.topology, _rows(grad)
    to_input = to_values = None
    if needs_input:
        to_input = _masked(grad_TO, _converted(values, factor.dtype), topology, not factor.transposed)
    if input is not None:
        left, right = _left_and_right(grad_TO, _rows(input), factor)
        to_values = _sampled(left, right, topology).to(values.dtype)
    return to_input, to_values, grad_TO.sum(0) if needs_bias else None


def _differentiable_gradients(
    grad: Tensor, input: Tensor | None, values: Tensor, factor: Factor, needed: tuple[bool, bool]
) -> Gradients:
    """Computes the same by ops that have gradients themselves."""
    needs_input, needs_bias = needed
    topology, grad_TO = factor.topology, _rows(grad)
    to_input = to_values = None
    if needs_input:
        dense = _unpacked(values, factor)
        to_input = grad_TO @ (dense if factor.transposed else dense.mT)
    if input is not None:
        left, right = _left_and_right(grad_TO, _rows(input), factor)
        packed = torch.ops.smet.pack(
            left.mT @ right, topology.bits, topology.lists, topology.layout.text, topology.num_active
        )
        to_values = packed.to(values.dtype)
    return to_input, to_values, grad_TO.sum(0) if needs_bias else None


def _masked(tokens: Tensor, values: Tensor, topology: Topology, transposed: bool, bias: Tensor | None = None) -> Tensor:
    compute = _masked_op if are_shown_as_ops() else choose.compute("masked_matmul", tokens, topology)
    out: Tensor = compute(tokens, values, topology, transposed, bias)
    return out


def _masked_op(tokens: Tensor, values: Tensor, topology: Topology, *rest: Any) -> Any:
    return torch.ops.smet.masked_matmul(tokens, values, topology.bits, topology.lists, topology.layout.text, *rest)


def _sampled(left: Tensor, right: Tensor, topology: Topology) -> Tensor:
    compute = _sampled_op if are_shown_as_ops() else choose.compute("sampled_matmul", left, topology)
    values: Tensor = compute(left, right, topology)
    return values


def _scaled(grad: Tensor, topology: Topology, is_new: bool) -> Tensor:
    """Scales the rows of a gradient, over itself where it ``is_new`` and nobody records the ops."""
    if is_new and not are_shown_as_ops():
        return scaled(grad, topology)
    out: Tensor = torch.ops.smet.scale_rows(grad, topology.bits, topology.lists, topology.layout.text)
    return out


def _sampled_op(left: Tensor, right: Tensor, topology: Topology) -> Any:
    where = topology.bits, topology.lists, topology.layout.text
    return torch.ops.smet.sampled_matmul(left, right, *where, topology.num_active)


def _by_ops(input: Tensor, dense: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
    """Computes the product as the module itself does with its unpacked weight."""
    if factor.transposed:
        return F.linear(input, dense, bias)
    rows = _rows(input)
    out = rows @ dense if bias is None else torch.addmm(bias, rows, dense)
    return _shaped(out, input)


def _unpacked(values: Tensor, factor: Factor) -> Tensor:
    topology = factor.topology
    text = topology.layout.text
    dense: Tensor = torch.ops.smet.unpack(
        _converted(values, factor.dtype), topology.bits, topology.lists, text, None, None, False
    )
    return dense


def _left_and_right(grad_TO: Tensor, input_TI: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Returns the two matrices whose product, the left one transposed, is the gradient of the weight."""
    return (grad_TO, input_TI) if factor.transposed else (input_TI, grad_TO)


def _shaped(out_TO: Tensor, input: Tensor) -> Tensor:
    """Returns the new tensor ``out_TO`` in the shape for ``input``, and no view of it: autograd treats views apart."""
    return out_TO if input.dim() == 2 else reshape_new(out_TO, (*input.shape[:-1], out_TO.shape[-1]))


def _rows(tokens: Tensor) -> Tensor:
    return tokens if tokens.dim() == 2 else tokens.reshape(-1, tokens.shape[-1])


def _converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype is dtype else values.to(dtype)


def _without_autocast(compute: Callable[..., Any], tensor: Tensor, *rest: Any) -> Any:
    """Calls ``compute(tensor, *rest)``, in which autocast would convert what has the dtype of the product already."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind):
        return compute(tensor, *rest)
    with torch.autocast(kind, enabled=False):
        return compute(tensor, *rest)
