"""Exports a model with compact weights as a plain dense model."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smet_compile.convert.export_layouts import EXPORT_LAYOUTS, Exported, ExportLayout, convert
from smet_compile.convert.report import forget_reasons
from smet_compile.format import arguments
from smet_compile.ops import find_sites, reads, saved_weights
from smet_compile.ops.sites import check_sparsified, wrapped_child

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_ENDS = (*_PLAIN, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
"""Types of objects that hold no tensor which a deep copy would have to copy."""


@torch.no_grad()
def export_dense(model: nn.Module, layout: ExportLayout | None = None) -> nn.Module:
    """Returns a plain copy of ``model``: dense weights, zero where inactive, no trace of this library.

    ``model`` itself stays compact and trainable. For a Hugging Face model, ``save_pretrained`` of the copy
    loads anywhere. Takes the memory of the dense weights.

    The copy is of the module itself where ``model`` or a module in it is wrapped by ``torch.compile`` or by data
    parallelism. A tensor that a module keeps together with its graph (a loss, a recurrent state) is copied detached.

    Args:
        layout: None for dense weights; else the weights of ``nn.Linear`` that were compact become tensors that
            ``F.linear`` takes, without gradients: "csr" or "bsr" (blocks as in the model) for torch's sparse tensors;
            "2:4" on a GPU for those of ``torch.sparse.to_sparse_semi_structured``, in float16 or bfloat16. Elsewhere
            "2:4" leaves them dense and checks that this function will take them: at most two nonzero weights in every
            four along a row, and multiples of 32 rows and 64 columns. Other weights stay dense, with a warning.

    Raises:
        ValueError: no model, or one that was never made sparse; a weight that ``layout`` does not allow.
    """
    arguments.module("export_dense", model)
    if layout is not None:
        arguments.one_of("layout", layout, EXPORT_LAYOUTS)
    model = _unwrapped(model)
    check_sparsified("export_dense", model)
    reads.settle_live()
    dense = _plain_copy(model)
    exported = []
    for name, site in find_sites(dense).items():
        order = site.compact.parameter_order
        exported.append(Exported(name, site.module, site.tensor_name, site.layout))
        _give_own_class(site.module)
        parametrize.remove_parametrizations(site.module, site.tensor_name, leave_parametrized=True)
        _restore_order(site.module, order)
    for module in dense.modules():
        saved_weights.uninstall(module)
        forget_reasons(module)
    if layout is not None:
        convert(exported, layout)
    return dense


def _plain_copy(model: nn.Module) -> nn.Module:
    """Returns a deep copy without wrappers, and without the graphs of tensors that modules keep."""
    copies: dict[int, Any] = {}
    for kept in _objects_in(model):
        if isinstance(kept, Tensor) and not kept.is_leaf:
            copies[id(kept)] = kept.detach().clone()
        elif isinstance(kept, torch.jit.ScriptFunction):  # cannot be copied, nor changed
            copies[id(kept)] = kept
    for module in reversed(list(model.modules())):  # what is inside first
        inner = _unwrapped(module)
        if inner is not module:
            copies[id(module)] = copy.deepcopy(inner, copies)
    return copy.deepcopy(model, copies)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module that ``torch.compile`` or data parallelism wraps; ``module`` itself where none does."""
    while (child := wrapped_child(module)) is not None:
        inner = module._modules[child]
        assert inner is not None
        module = inner
    return module


def _objects_in(model: nn.Module) -> Iterator[Any]:
    """Yields every object in the attributes and modules of ``model``, and in containers and objects in these."""
    waiting, seen = deque[Any]([model]), set[int]()
    while waiting:
        found = waiting.popleft()
        if id(found) in seen or isinstance(found, _ENDS):
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, Tensor):
            waiting.append(found.grad if found.is_leaf else None)
        elif isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set | frozenset | deque):
            waiting.extend(found)
        elif not isinstance(found, torch.jit.ScriptFunction):
            waiting.extend(getattr(found, "__dict__", {}).values())
            slots = (name for base in type(found).__mro__ for name in _slots(base))
            waiting.extend(getattr(found, name) for name in slots if hasattr(found, name))


def _slots(base: type) -> tuple[str, ...]:
    names = vars(base).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _restore_order(module: nn.Module, order: list[str]) -> None:
    """Puts the parameters into the order they had, by which the state of a plain optimizer is keyed."""
    parameters = dict(module._parameters)
    places = {name: i for i, name in enumerate(order)}
    module._parameters.clear()
    for name in sorted(parameters, key=lambda name: places.get(name, len(places))):
        module._parameters[name] = parameters[name]


def _give_own_class(module: nn.Module) -> None:
    """Gives ``module`` a copy of its class: the original shares the class, and removal of parametrizations edits it."""
    shared = type(module)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)
