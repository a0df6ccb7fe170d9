"""Sees every tensor that any op makes, inside our own ops too, and how many bytes are alive at once."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Scratch(TorchDispatchMode):
    """Follows the storages made under it: their live bytes at the peak, and (dtype, numel) of every tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.made: set[tuple[torch.dtype, int]] = set()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "smet":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        self.made.add((tensor.dtype, tensor.numel()))
        storage = StorageWeakRef(tensor.untyped_storage())
        self._storages[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._storages.values()))
