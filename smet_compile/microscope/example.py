"""The tensors in what a model is called with and in what it returns, in whatever they are wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Make = Callable[[Tensor], Tensor]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Of pytrees, and of the attributes of other objects: dataclasses, batches of a tokenizer, graphs, caches."""
    seen: set[int] = set()
    for leaf in tree_leaves(tree):
        yield from _within(leaf, seen)


def _within(found: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    if isinstance(found, Tensor | nn.Module | type) or id(found) in seen:
        return
    seen.add(id(found))
    parts = list(found.values()) if isinstance(found, Mapping) else list(getattr(found, "__dict__", {}).values())
    parts += [getattr(found, name, None) for name in getattr(type(found), "__slots__", ())]
    for part in (*parts, *(found if isinstance(found, list | tuple | set) else ())):
        yield from _within(part, seen)


def replaced(tree: Any, make: Make) -> Any:
    """The same with other tensors, and nothing shared that a forward could write to (a cache, say)."""
    memo = {id(tensor): made for tensor in tensors_in(tree) for made in (make(tensor),)}
    return tree_map(lambda leaf: memo[id(leaf)] if isinstance(leaf, Tensor) else _copied(leaf, dict(memo)), tree)


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    if isinstance(leaf, nn.Module | type) or not hasattr(leaf, "__dict__"):
        return leaf
    try:
        return copy.deepcopy(leaf, memo)
    except Exception:  # what cannot be copied (a lock, an open file) is given as it is
        return leaf
