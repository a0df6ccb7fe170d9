"""Copies a model without the wrappers, shards and graphs that a deep copy would keep or refuse."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import Part, unpack_bits
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.ops.sites import Site, find_sites, without_wrappers
from smet_compile.shards import Unsharded, forget_shards

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_ENDS = (*_PLAIN, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
"""Types of objects that hold no tensor which a deep copy would have to copy."""
_DISTRIBUTED = "torch.distributed."


def plain_copy(model: nn.Module, tensors: Mapping[int, Any] | None = None) -> nn.Module:
    """Returns a deep copy without wrappers, without shards, and without the graphs of tensors that modules keep.

    Args:
        tensors: the copies of parameters, buffers and modules by the id of the original, where they are not to be
            plain ones.
            FSDP2's parameters have to be among them, and sharded (``smet_compile.shards.reshard``).
    """
    copies: dict[int, Any] = dict(tensors or {})
    for kept in _objects_in(model):
        if id(kept) in copies:
            continue
        if isinstance(kept, Tensor) and not kept.is_leaf:
            copies[id(kept)] = kept.detach().clone()
        elif isinstance(kept, torch.jit.ScriptFunction):  # cannot be copied, nor changed
            copies[id(kept)] = kept
    begun = _begin_copies(model, copies)
    for module in reversed(list(model.modules())):  # what is inside first
        inner = without_wrappers(module)
        if inner is not module:
            copies[id(module)] = copy.deepcopy(inner, copies)
    for replica, attributes in begun:
        replica.__dict__.update(copy.deepcopy(attributes, copies))
    copied = copy.deepcopy(model, copies)
    for module in copied.modules():
        forget_shards(module)
    return copied


def _begin_copies(model: nn.Module, copies: dict[int, Any]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Makes an empty copy of each module that FSDP2 has changed; returns them with the attributes to copy.

    All are made before any is filled, since modules may refer to one another.
    """
    begun = []
    for module in model.modules():
        plain = Unsharded.of(module) if without_wrappers(module) is module else None
        if plain is not None:
            copies[id(module)] = plain.kind.__new__(plain.kind)
            begun.append((copies[id(module)], plain.attributes))
    return begun


def without_data(model: nn.Module) -> nn.Module:
    """Returns a plain copy whose parameters are whole and on the meta device; its buffers have data, as topologies do.

    Under tensor parallelism every rank has to call, since the topologies of parts make those of whole weights.
    """
    tensors: dict[int, Any] = {}
    for site in find_sites(model).values():
        if site.part is not None:
            tensors[id(site.compact)] = whole_weight(site, site.part, site.bits_of_whole(site.compact.topology))
    for parameter in model.parameters():
        shape, stride = parameter.shape, parameter.stride()
        empty = torch.empty_strided(shape, stride, dtype=parameter.dtype, device="meta")
        tensors[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    return plain_copy(model, tensors)


def whole_weight(site: Site, part: Part, bits: Tensor) -> CompactWeight:
    """Returns the parametrization of a whole weight, which has the topology ``bits`` and of which a part is here."""
    mask = (
        torch.empty(part.whole.num_blocks, dtype=torch.bool, device="meta")
        if bits.is_meta
        else unpack_bits(bits, part.whole.num_blocks)
    )
    compact = CompactWeight(part.whole, mask, site.num_active_in_whole, site.name)
    compact.parameter_order = site.compact.parameter_order
    return compact


def _objects_in(model: nn.Module) -> Iterator[Any]:
    """Yields every object in the attributes and modules of ``model``, and in containers and objects in these."""
    waiting, seen = deque[Any]([model]), set[int]()
    while waiting:
        found = waiting.popleft()
        if id(found) in seen or isinstance(found, _ENDS) or type(found).__module__.startswith(_DISTRIBUTED):
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
