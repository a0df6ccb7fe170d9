"""Sees every dense weight that a forward makes, and whether it is still alive."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smet_compile.ops import find_sites


class WeightSized(TorchDispatchMode):
    """Remembers the storage of every tensor of a dense weight's size that any op makes, copies too."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() in self.sizes:
                self.storages.append(StorageWeakRef(leaf.untyped_storage()))
        return out

    def num_alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


def dense_sizes(model: nn.Module) -> set[int]:
    return {torch.Size(site.layout.shape).numel() for site in find_sites(model).values()}
