"""Turns nested state into JSON and tensors, and back: dicts, lists, tuples, numbers, strings, None and tensors.

What comes back is exactly what was given, the versions of modules that a state dict carries included. ``torch`` keeps
those in a private attribute, which only ``versions_of`` and ``set_versions`` touch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops.loaded import kind_of, plain_number
from smet_compile.shards import local

_TENSOR, _TUPLE, _ITEMS, _CLASS, _METADATA = "$tensor", "$tuple", "$items", "$class", "$metadata"
_DICTS: dict[str, type[dict[Any, Any]]] = {"OrderedDict": OrderedDict, "Counter": Counter}
_MAX_DEPTH = 100
_MAX_BITS = 10_000
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Reordered:
    """Holds a sharded tensor whose rows are stored in another order than its shards have; ``order`` puts them in it."""

    tensor: Tensor
    order: Callable[[Tensor], Tensor]


class Flattener:
    """Collects the tensors of several trees; a tensor that is there twice (tied weights) is stored once.

    Of a sharded tensor every rank collects its shard, under one name.

    Args:
        dtypes: the dtypes that the file can hold.
    """

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.orders: dict[str, Callable[[Tensor], Tensor]] = {}
        self._dtypes = dtypes
        self._names: dict[tuple[Any, ...], str] = {}

    def flatten(self, tree: Any, path: str, depth: int = 0) -> Any:
        """Returns ``tree`` with each tensor replaced by its name; ``path`` is the start of the names.

        Raises ValueError for anything that JSON and safetensors cannot hold exactly.
        """
        tree = plain_number(tree)
        if depth > _MAX_DEPTH:
            raise ValueError(f"{path[:200]}: expected at most {_MAX_DEPTH} dicts and lists in one another, got more")
        if isinstance(tree, Tensor):
            if tree.is_meta:
                raise ValueError(f"{path}: expected a tensor with data, got one on the meta device; move it first")
            return {_TENSOR: self._add(tree.detach(), path)}
        if isinstance(tree, Reordered):
            name = self._add(tree.tensor.detach(), path)
            self.orders[name] = tree.order
            return {_TENSOR: name}
        if type(tree) in (dict, *_DICTS.values()):
            return self._flatten_dict(tree, path, depth + 1)
        if type(tree) in (tuple, torch.Size):
            return {_TUPLE: [self.flatten(value, f"{path}.{i}", depth + 1) for i, value in enumerate(tree)]}
        if type(tree) is list:
            return [self.flatten(value, f"{path}.{i}", depth + 1) for i, value in enumerate(tree)]
        if type(tree) in _PLAIN and not (type(tree) is int and tree.bit_length() > _MAX_BITS):
            return tree
        raise ValueError(
            f"{path}: expected numbers, strings, tensors, or dicts and lists of them, got {type(tree).__qualname__}; "
            "a checkpoint holds JSON and tensors only"
        )

    def _flatten_dict(self, tree: dict[Any, Any], path: str, depth: int) -> Any:
        values = [self.flatten(value, f"{path}.{key}", depth) for key, value in tree.items()]
        if type(tree) is dict and all(type(key) is str and not key.startswith("$") for key in tree):
            return dict(zip(tree, values, strict=True))
        keys = [self.flatten(_checked_key(key, path), path, depth) for key in tree]
        flat: dict[str, Any] = {_ITEMS: [list(item) for item in zip(keys, values, strict=True)]}
        if type(tree) is not dict:
            flat[_CLASS] = type(tree).__name__
        versions = versions_of(tree)
        if versions is not None:
            flat[_METADATA] = self.flatten(versions, f"{path}._metadata", depth)
        return flat

    def _add(self, tensor: Tensor, path: str) -> str:
        here = local(tensor)
        self._check(here, path)
        place = (here.data_ptr(), tensor.device, tensor.shape, tensor.stride())
        where = (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if here.numel() == 0 or where not in self._names:
            path = path.encode(errors="replace").decode()  # the header of a file is UTF-8
            name, number = path, 1
            while name in self.tensors:  # other keys may join to the same path
                number += 1
                name = f"{path}#{number}"
            self._names[where] = name
            self.tensors[name] = tensor
        return self._names[where]

    def _check(self, tensor: Tensor, path: str) -> None:
        got = ""
        if type(tensor) not in (Tensor, nn.Parameter):
            got = f"a {type(tensor).__name__}"
        elif tensor.is_nested or tensor.layout != torch.strided:
            got = f"one of layout {tensor.layout}"
        elif tensor.dtype not in self._dtypes:
            got = f"one of {tensor.dtype}"
        if got:
            raise ValueError(f"{path}: expected a plain dense tensor that safetensors can hold, got {got}; convert it")


def _checked_key(key: Any, path: str) -> Any:
    key = plain_number(key)
    if type(key) is tuple:
        return tuple(_checked_key(part, path) for part in key)
    if type(key) not in _PLAIN or key != key:
        raise ValueError(f"{path}: expected numbers, strings or tuples of them as keys, got {kind_of(key)} {key!r:.40}")
    return key


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns the tree that ``flatten`` was given. No two tensors of it share memory.

    Raises ValueError for a tree that ``flatten`` never makes.
    """
    return _Unflattener(tensors).unflatten(tree, "checkpoint")


class _Unflattener:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def unflatten(self, tree: Any, path: str, depth: int = 0) -> Any:
        if depth > 3 * _MAX_DEPTH:
            raise ValueError(f"{path[:200]}: expected at most {_MAX_DEPTH} dicts and lists in one another, got more")
        if isinstance(tree, list):
            return [self.unflatten(value, f"{path}.{i}", depth + 1) for i, value in enumerate(tree)]
        if not isinstance(tree, dict):
            return tree
        marks = {key for key in tree if key.startswith("$")}
        if not marks:
            return {key: self.unflatten(value, f"{path}.{key}", depth + 1) for key, value in tree.items()}
        if set(tree) == {_TENSOR} and isinstance(tree[_TENSOR], str):
            return self._take(tree[_TENSOR], path)
        if set(tree) == {_TUPLE} and isinstance(tree[_TUPLE], list):
            return tuple(self.unflatten(tree[_TUPLE], path, depth + 1))
        if _ITEMS in tree and set(tree) <= {_ITEMS, _CLASS, _METADATA}:
            return self._items(tree, path, depth + 1)
        raise ValueError(f"{path}: expected a tensor, a tuple or items, got {', '.join(sorted(marks))}")

    def _take(self, name: str, path: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(f"{path}: expected a tensor {name!r} in the file, found none")
        tensor = self._tensors[name]
        if name in self._taken:
            return tensor.clone()
        self._taken.add(name)
        return tensor

    def _items(self, tree: dict[str, Any], path: str, depth: int) -> dict[Any, Any]:
        items, kind = tree[_ITEMS], tree.get(_CLASS)
        if not isinstance(items, list) or not all(isinstance(item, list) and len(item) == 2 for item in items):
            raise ValueError(f"{path}: expected pairs of a key and a value, got {kind_of(items)} of something else")
        if kind is not None and not (isinstance(kind, str) and kind in _DICTS):
            raise ValueError(f"{path}: expected one of {', '.join(_DICTS)}, got {kind!r}; upgrade smet_compile")
        loaded: dict[Any, Any] = dict() if kind is None else _DICTS[kind]()
        for saved_key, value in items:
            key = _checked_key(self.unflatten(saved_key, path, depth), path)
            if key in loaded:
                raise ValueError(f"{path}: expected each key once, got {key!r} twice")
            loaded[key] = self.unflatten(value, f"{path}.{key}", depth)
        if _METADATA in tree:
            if kind != "OrderedDict":
                raise ValueError(f"{path}: expected metadata with an OrderedDict only, got it with {kind}")
            set_versions(loaded, self.unflatten(tree[_METADATA], path, depth))
        return loaded


def versions_of(state: Mapping[Any, Any]) -> Any:
    """Returns the versions of modules that a state dict carries, by the modules' names; None where it has none."""
    return getattr(state, "_metadata", None)


def set_versions(state: dict[Any, Any], versions: Any) -> None:
    """Makes ``state`` carry the versions of modules, for ``nn.Module.load_state_dict`` to read."""
    state.__dict__["_metadata"] = versions


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor, uncopied where its strides are the usual ones."""
    flat = tensor.reshape(-1)
    if flat.stride() != (1,):  # a single entry of a longer row counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)
