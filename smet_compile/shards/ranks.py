"""Finds the ranks that train one model together, and has them agree.

Every rank makes the same calls in the same order. A model that is trained by one process needs no rank's agreement:
every function then returns what it is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from smet_compile.shards.rows import is_sharded, named

_groups: dict[str, Any] = {}
"""Process groups by their names, which an op takes."""
_meshes: Any = weakref.WeakKeyDictionary()
"""The mesh of the ranks that train a model, where somebody said it."""


def train_on(model: nn.Module, mesh: Any) -> None:
    """Says that the ranks of ``mesh`` train ``model``, for one that is whole on each of them."""
    _meshes[model] = mesh


class Ranks:
    """Holds the process groups over which ranks agree, one for each dimension of the mesh that they form.

    Args:
        groups: a reduction over one after the other is a reduction over all ranks.
        run_all_layers: whether every rank is known to run every layer in each step, so that backward may reduce.
    """

    def __init__(self, groups: Iterable[Any], run_all_layers: bool = False) -> None:
        self.run_all_layers = run_all_layers
        self.groups = [group for group in groups if distributed.get_world_size(group) > 1]
        for group in self.groups:
            _groups[group.group_name] = group

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Finds the ranks that train ``model``.

        They are those of the mesh on which it is sharded, of the group of ``DistributedDataParallel``, or of the mesh
        that ``train_on`` named; otherwise all, where ``torch.distributed`` is initialised.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(())
        together = cls.of_tensors(model.parameters())
        if together.run_all_layers:
            return together
        wrapper = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
        if wrapper is None:
            mesh = _meshes.get(model)
            return cls([distributed.group.WORLD] if mesh is None else map(mesh.get_group, range(mesh.ndim)))
        return cls([wrapper.process_group], run_all_layers=not wrapper.find_unused_parameters)

    @classmethod
    def of_tensors(cls, tensors: Iterable[Any]) -> Ranks:
        """Finds the ranks of the mesh on which some of the tensors are sharded; this one alone where none is."""
        meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]
        if not meshes:
            return cls(())
        largest = max(meshes, key=lambda mesh: mesh.ndim)
        return cls([largest.get_group(dim) for dim in range(largest.ndim)], run_all_layers=True)

    def without(self, groups: Iterable[Any]) -> Ranks:
        """Returns the ranks that hold the same parts of weights, which tensor parallelism cuts over ``groups``."""
        names = {group.group_name for group in groups}
        return Ranks([group for group in self.groups if group.group_name not in names], self.run_all_layers)

    @property
    def is_first(self) -> bool:
        """Tells whether this rank is the first of all."""
        return all(distributed.get_rank(group) == 0 for group in self.groups)

    @property
    def num_ranks(self) -> int:
        size = 1
        for group in self.groups:
            size *= distributed.get_world_size(group)
        return size

    @property
    def names(self) -> str:
        """Returns the names of the groups, as ``reduce_over_groups`` takes them."""
        return ",".join(group.group_name for group in self.groups)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensor of every rank, all of one shape; every rank gets them in the same order."""
        found = [tensor]
        for group in self.groups:
            stacked = torch.stack(found).contiguous()
            parts = [torch.empty_like(stacked) for _ in range(distributed.get_world_size(group))]
            with named("gathering what every rank collected"):
                distributed.all_gather(parts, stacked, group=group)
            found = [each for part in parts for each in part]
        return found

    def least(self, numbers: list[int], device: torch.device) -> list[int]:
        """Returns the least of each number over all ranks; ``device`` is that of the model."""
        for group in self.groups:
            on_device = distributed.get_backend(group) == "nccl"
            tensor = torch.tensor(numbers, device=device if on_device else "cpu")
            with named("comparing the ranks"):
                distributed.all_reduce(tensor, distributed.ReduceOp.MIN, group=group)
            numbers = tensor.tolist()
        return numbers

    def from_first(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the first rank, on every rank; all are of one shape."""
        for group in self.groups:
            with named("sending the first rank's choice"):
                distributed.broadcast(tensor, group=group, group_src=0)
        return tensor


ALONE = Ranks(())
"""The ranks of a model that one process trains."""


def reduce_over_groups(tensor: Tensor, names: str) -> Tensor:
    """Returns the mean of ``tensor`` over the ranks of the groups with these names, given in one text."""
    groups = [_groups[name] for name in names.split(",") if name]
    if not groups:
        return tensor
    total, num_ranks = tensor.clone(memory_format=torch.contiguous_format), 1
    for group in groups:
        with named("averaging a dense gradient over the ranks"):
            distributed.all_reduce(total, group=group)
        num_ranks *= distributed.get_world_size(group)
    return total.div_(num_ranks)
