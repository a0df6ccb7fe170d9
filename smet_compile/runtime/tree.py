"""Nested state ↔ JSON and tensors: dicts, lists, tuples, numbers, strings, None, tensors, exactly as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


class Flattener:
    """Collects the tensors of several trees; a tensor that is there twice (tied weights) is stored once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def flatten(self, tree: Any, path: str) -> Any:
        """``tree`` with each tensor replaced by its name; ``path`` is the start of the names.

        Raises ValueError for anything that JSON and safetensors cannot hold.
        """
        if isinstance(tree, Tensor):
            if tree.is_meta:
                raise ValueError(f"{path}: expected a tensor with data, got one on the meta device; move it first")
            return {_TENSOR: self._add(tree.detach(), path)}
        if isinstance(tree, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in tree):
                return {key: self.flatten(value, f"{path}.{key}") for key, value in tree.items()}
            items = [[self.flatten(k, path), self.flatten(v, f"{path}.{k}")] for k, v in tree.items()]
            return {_ITEMS: items}
        if isinstance(tree, tuple):
            return {_TUPLE: [self.flatten(value, f"{path}.{i}") for i, value in enumerate(tree)]}
        if isinstance(tree, list):
            return [self.flatten(value, f"{path}.{i}") for i, value in enumerate(tree)]
        if tree is None or isinstance(tree, bool | int | float | str):
            return tree
        raise ValueError(
            f"{path}: expected numbers, strings, tensors, or dicts and lists of them, got {type(tree).__name__}; "
            "a checkpoint holds JSON and tensors only"
        )

    def _add(self, tensor: Tensor, path: str) -> str:
        tensor = tensor.contiguous()
        where = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.dtype)
        if tensor.numel() == 0 or where not in self._names:
            self._names[where] = path
            self.tensors[path] = tensor
        return self._names[where]


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Takes back ``flatten``."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(unflatten(value, tensors) for value in tree[_TUPLE])
    if _ITEMS in tree:
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in tree[_ITEMS]}
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, uncopied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
