"""Writes down every tensor op that runs under it, and which tensors each has read, made and written to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Ref:
    """A tensor of the forward by number, with its shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One op. Tensors in ``args``, ``kwargs``, ``outputs`` are ``Ref``.

    Args:
        written: tensors it wrote to, among its arguments. aliases: others that share memory with those.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Ref]
    written: list[Ref]
    aliases: list[Ref]


class Recorder(TorchDispatchMode):
    """``calls``: what ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._refs: dict[int, tuple[Tensor, Ref]] = {}  # holds the tensor, so that its id stays its own
        self._by_storage: dict[int, list[Ref]] = {}

    def ref(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self._refs:
            ref = Ref(len(self._refs), tuple(tensor.shape), tensor.dtype)
            self._refs[id(tensor)] = tensor, ref
            if tensor.layout == torch.strided:
                self._by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(ref)
        return self._refs[id(tensor)][1]

    def refs(self, tree: Any) -> Any:
        return tree_map_only(Tensor, self.ref, tree)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, named = self.refs(args), self.refs(kwargs)
        result = func(*args, **kwargs)
        outputs = [self.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = list(_written(func, args, kwargs)) if func._schema.is_mutable else []
        written = [self.ref(tensor) for tensor in tensors]
        self.calls.append(Call(func, given, named, outputs, written, self._aliases(tensors, written)))
        return result

    def _aliases(self, tensors: list[Tensor], written: list[Ref]) -> list[Ref]:
        storages = dict.fromkeys(t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided)
        return [ref for storage in storages for ref in self._by_storage.get(storage, []) if ref not in written]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Arguments that the op's schema says are written to; ``out=`` and lists of tensors as well."""
    for number, said in enumerate(func._schema.arguments):
        if said.alias_info is not None and said.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(said.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
