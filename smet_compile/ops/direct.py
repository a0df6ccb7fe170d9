"""Makes linear layers multiply with their values in eager mode, instead of unpacking the weight for each product.

It concerns ``nn.Linear`` and Hugging Face's ``Conv1D``, also subclasses, whose forward is that class's own. The forward
is replaced in the class that ``shared_class`` makes for such modules. The module reads its weight as before where
somebody has to see that: a compiler or another tracer, a transform of ``torch.func``, forward-mode AD, a
``TorchFunctionMode``, a further parametrization, a hook on the parametrization, a policy that collects the dense
gradient, tensors of unusual kinds; and where no kernel does better than torch's own products. What else reads
``module.weight`` unpacks it.

``SMET_COMPILE_EAGER=unpack`` in the environment, or ``with unpacked():``, makes every module read its weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smet_compile.ops import choose, plain, saved_weights
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.ops.environment import Variable
from smet_compile.ops.products import Factor, are_shown_as_ops, multiply
from smet_compile.ops.torch_insides import is_ordinary, is_traced_or_transformed

_UNPACK = "unpack"
_variable = Variable("SMET_COMPILE_EAGER")
_num_unpacked = 0
_linear, _linear_forward = F.linear, nn.Linear.forward


@contextmanager
def unpacked() -> Iterator[None]:
    """Makes all modules read their weights within, for debugging: the same results up to rounding."""
    global _num_unpacked
    _num_unpacked += 1
    try:
        yield
    finally:
        _num_unpacked -= 1


def _is_on() -> bool:
    """Tells whether modules may multiply directly. Raises ValueError for an unknown value in the environment."""
    if _num_unpacked:
        return False
    if _variable.raw() is None:
        return True
    setting = _variable.text()
    if setting not in (None, _UNPACK):
        raise ValueError(f"{_variable.name}: expected {_UNPACK}, got {setting!r}; unset it to multiply with the values")
    return setting is None


def install(own: Any) -> None:
    """Makes modules of the class ``own`` multiply directly if the forward of its base is one of the two known ones.

    The class was made for modules whose weight is parametrized.
    """
    parent = own.__mro__[1]
    if parent.forward is _linear_forward:
        own.forward = _forward_of_linear(parent)
    elif parent.forward is _conv1d_forward():
        own.forward = _forward_of_conv1d(parent)


def is_installed(module: nn.Module) -> bool:
    """Tells whether calls of ``module`` go through a forward that multiplies directly."""
    return getattr(module.forward, "__code__", None) in _CODES


def _conv1d_forward() -> Any:
    """Returns the forward of Hugging Face's Conv1D; None where nobody has imported it."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return None if conv1d is None else conv1d.forward


def _forward_of_linear(parent: Any) -> Callable[..., Any]:
    """Returns a forward in place of that of ``nn.Linear``, which the class ``parent`` has."""

    def forward(self: nn.Module, input: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return parent.forward(self, input)
        is_original = parent.forward is _linear_forward and F.linear is _linear
        product = _product(self, input, transposed=True) if is_original else None
        return saved_weights.run(parent.forward, self, input) if product is None else product

    return forward


def _forward_of_conv1d(parent: Any) -> Callable[..., Any]:
    """Returns a forward in place of that of Conv1D, which the class ``parent`` has."""
    original = parent.forward

    def forward(self: nn.Module, x: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return parent.forward(self, x)
        product = _product(self, x, transposed=False) if parent.forward is original else None
        return saved_weights.run(parent.forward, self, x) if product is None else product

    return forward


RUN_IN_EAGER = (_forward_of_linear(nn.Linear), _forward_of_conv1d(nn.Linear))
"""Functions that Dynamo must not compile by themselves after a graph break; those of all classes share their code."""
_CODES = [function.__code__ for function in RUN_IN_EAGER]


def _product(module: nn.Module, input: Tensor, transposed: bool) -> Tensor | None:
    """Returns what ``module`` computes; None where it has to read its weight, be it to raise the error of a misfit."""
    if not _is_on() or is_traced_or_transformed():
        return None
    found = _compact_of(module)
    if found is None:
        return None
    compact, values = found
    bias: Any = module.bias
    if not all(map(_can_be_read, (input, values) if bias is None else (input, values, bias))):
        return None
    input, bias = _as_in_autocast(input), None if bias is None else _as_in_autocast(bias)
    factor = Factor(compact.active, transposed, _dtype_in_autocast(values), compact, compact.scales_rows)
    if not (_fit(input, values, bias, factor) and _is_better(input, factor)):
        return None
    return multiply(input, *compact.in_step(values), bias, factor)


def _compact_of(module: nn.Module) -> tuple[CompactWeight, Tensor] | None:
    """Returns the compact weight of ``module`` and its values; None where its unpacked weight is not all there is."""
    chains = module._modules.get("parametrizations")
    chain = None if chains is None else chains._modules.get("weight")
    if chain is None or len(chain._modules) != 1:
        return None
    compact, values = chain._modules.get("0"), chain._parameters.get("original")
    if not isinstance(compact, CompactWeight) or values is None or _has_hooks(chain) or _has_hooks(compact):
        return None
    is_simple = compact.stand_in is None and compact.collected is None and _can_be_read(compact.topology)
    return (compact, values) if is_simple else None


def _can_be_read(tensor: Tensor) -> bool:
    """Tells whether a product takes ``tensor``: its memory is read, or the op is shown to somebody who knows it."""
    return is_ordinary(tensor) or (are_shown_as_ops() and isinstance(tensor, Tensor) and not tensor.is_meta)


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks)


def _dtype_in_autocast(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which a product reads ``tensor``."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def _as_in_autocast(tensor: Tensor) -> Tensor:
    dtype = _dtype_in_autocast(tensor)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _fit(input: Tensor, values: Tensor, bias: Tensor | None, factor: Factor) -> bool:
    """Tells whether shapes, dtypes and devices are those of a product."""
    layout, dtype, device = factor.topology.layout, factor.dtype, values.device
    if not input.shape or input.shape[-1] != factor.num_inputs or layout.matrix != layout.shape:
        return False
    if input.dtype is not dtype or input.device != device or values.shape != factor.topology.values_shape:
        return False
    return bias is None or (bias.dtype is dtype and bias.device == device and bias.shape == (factor.num_outputs,))


def _is_better(input: Tensor, factor: Factor) -> bool:
    """Tells whether the kernel for this product is another than the one of torch's own products, or was forced."""
    chosen = choose.compute("masked_matmul", input, factor.topology)
    return chosen is not plain.masked_matmul or choose.forced_kernel() is not None
