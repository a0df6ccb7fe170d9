"""Finds the parameters of a model that are tied: registered under several names, or lying in the same memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn

from smet_compile.shards import local


@dataclass(frozen=True)
class _Memory:
    """Describes the bytes from ``start`` to ``end`` that a parameter spans; views may leave gaps in them."""

    name: str
    tensor: Tensor
    start: int
    end: int


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Returns for each parameter that is tied the names of the others that it is tied to.

    A parameter without memory, on the meta device or of a lazy module, is tied to those alone that are the same object.
    """
    names: dict[int, list[str]] = defaultdict(list)
    parameters: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{prefix}.{name}" if prefix else name
            names[id(parameter)].append(full)
            parameters[full] = parameter
    found: dict[str, list[str]] = defaultdict(list)
    for same in names.values():
        for name in same if len(same) > 1 else ():
            found[name] = [other for other in same if other != name]
    all_names = {same[0]: same for same in names.values()}
    for pair in _overlaps({name: parameters[name] for name in all_names}):
        for one, other in (pair, pair[::-1]):
            for name in all_names[one]:
                found[name] += all_names[other]
    return dict(found)


def _overlaps(parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of parameters that have a byte in common."""
    by_device: dict[torch.device, list[_Memory]] = defaultdict(list)
    for name, parameter in parameters.items():
        if (memory := _memory(name, parameter)) is not None:
            by_device[memory.tensor.device].append(memory)
    for memories in by_device.values():
        before: list[_Memory] = []
        for memory in sorted(memories, key=lambda each: each.start):
            before = [each for each in before if each.end > memory.start]
            yield from ((each.name, memory.name) for each in before if _have_common_bytes(each, memory))
            before.append(memory)


def _memory(name: str, parameter: nn.Parameter) -> _Memory | None:
    """Returns where a parameter lies; None where it has no memory."""
    if nn.parameter.is_lazy(parameter):
        return None
    tensor = local(parameter.detach())
    if tensor.layout is not torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a fake tensor, or a subclass whose data lie in other tensors
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Memory(name, tensor, start, start + (last + 1) * tensor.element_size()) if start else None


def _have_common_bytes(one: _Memory, other: _Memory) -> bool:
    """Tells whether two views whose spans overlap do so themselves, and do not lie in the gaps of one another."""
    unit = gcd(one.tensor.element_size(), other.tensor.element_size(), other.start - one.start)
    start, end = min(one.start, other.start), max(one.end, other.end)
    taken = torch.zeros((end - start) // unit, dtype=torch.bool)
    _view(taken, one, start, unit).fill_(True)
    return bool(_view(taken, other, start, unit).any())


def _view(taken: Tensor, memory: _Memory, start: int, unit: int) -> Tensor:
    """Returns the entries of ``taken``, one for each ``unit`` of bytes after ``start``, that a parameter lies in."""
    parts = memory.tensor.element_size() // unit
    sides = [(size, stride) for size, stride in zip(memory.tensor.shape, memory.tensor.stride(), strict=True) if stride]
    shape, strides = [size for size, _ in sides], [stride * parts for _, stride in sides]
    return taken.as_strided([*shape, parts], [*strides, 1], (memory.start - start) // unit)
