"""Describes how the rows of one parameter are shared out among ranks, and moves rows from rank to rank.

The rows of a compact weight are sorted by position, a shard is an interval of them, and every rank knows the topology.
So every rank knows where each row lies, before and after a change, and needs no message to plan who sends what.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Any) -> bool:
    """Tells whether ``tensor`` is a DTensor. Its module is not imported where nobody else did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Returns the part of a DTensor that this rank holds, when it has come; anything else as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        here = tensor.to_local()
    return here.wait() if type(here).__name__ == "AsyncCollectiveTensor" else here


def unwrap(tensor: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Returns the part of a DTensor that this rank holds, in the same memory, and how to make a DTensor of another.

    Anything else is returned as it is. Autograd records nothing.
    """
    if not is_sharded(tensor):
        return tensor, _itself
    return tensor._local_tensor, partial(
        _wrap_alike, tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _wrap_alike(mesh: Any, placements: Any, shape: Any, stride: Any, here: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    wrapped: Tensor = DTensor.from_local(here, mesh, placements, run_check=False, shape=shape, stride=stride)
    return wrapped


def reshard(model: nn.Module) -> bool:
    """Has every FSDP2 module free whole parameters, which a forward pass without backward leaves.

    Returns whether the model has such a module.
    """
    found = _sharded_modules(model)
    for module in found:
        module.reshard()
    return bool(found)


def set_gradient_sync(model: nn.Module, is_on: bool) -> None:
    """Has FSDP2 reduce gradients over the ranks in the next backward, or add them up on each rank."""
    for module in _sharded_modules(model):
        module.set_requires_gradient_sync(is_on, recurse=False)


def is_fully_sharded(model: nn.Module) -> bool:
    """Tells whether ``fully_shard`` was called on a module of ``model``."""
    return bool(_sharded_modules(model))


def is_fully_sharded_itself(module: nn.Module) -> bool:
    """Tells whether ``fully_shard`` was called on ``module``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _sharded_modules(model: nn.Module) -> list[Any]:
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    return [module for module in model.modules() if is_fully_sharded_itself(module)]


@contextmanager
def named(what: str) -> Iterator[None]:
    """Says in the error of a collective which one it was: a rank that does not take part makes the others time out."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"smet_compile: {what} failed ({error}); every rank has to make the same steps, call manager.step() after "
            "each of them, and save or load checkpoints together"
        ) from error


@dataclass(frozen=True)
class Rows:
    """Says which rows of a parameter (N, ...) each rank of a process group holds.

    Args:
        cuts: rank r of the group holds the rows ``cuts[r]`` to ``cuts[r + 1]``. rank: this rank's number in the group.
        group: the process group; None where all rows are here.
        copies: groups of ranks that hold the same rows (HSDP).
        first: the number in the whole parameter of the first of these rows, where tensor parallelism cut it before.
        others: the groups over which tensor parallelism cut it.
        column_part: the number of the part of the columns that is here, and of how many parts.
    """

    cuts: tuple[int, ...]
    rank: int = 0
    group: Any = None
    copies: tuple[Any, ...] = ()
    first: int = 0
    others: tuple[Any, ...] = ()
    column_part: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, parameter: Any, slabs_over: Any = None) -> Rows:
        """Describes a parameter as ``fully_shard`` left it; any other has all of its rows here.

        Args:
            slabs_over: the mesh over which a compact weight is cut into slabs (tensor parallelism), where it is: the
                rows are then those of this rank's slabs, and no other rank of this mesh holds any of them.

        Raises ValueError for a parameter that is cut in a way that neither ``fully_shard`` nor tensor parallelism does.
        """
        num_rows = parameter.shape[0] if parameter.dim() else 1
        if not is_sharded(parameter):
            return cls((0, num_rows))
        cuts, mesh = cuts_of(parameter), parameter.device_mesh
        cut_dims = {cut.mesh_dim for cut in cuts}
        copies = tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if dim not in cut_dims)
        first, others, column_part = 0, [], (0, 1)
        if slabs_over is not None:
            num_rows //= slabs_over.size()
            others.append(slabs_over.get_group())
            cuts = [cut for cut in cuts if cut.group.group_name != others[0].group_name]
        cuts = [cut for cut in cuts if cut.size > 1]
        while len(cuts) > 1 or (cuts and cuts[0].dim != 0):  # tensor parallelism comes first
            outer = cuts.pop(0)
            others.append(outer.group)
            if outer.dim == 0:
                first, num_rows = outer.interval(num_rows)
            else:
                column_part = outer.rank, outer.size
        ends = cuts[0].ends(num_rows) if cuts else (0, num_rows)
        rank, group = (cuts[0].rank, cuts[0].group) if cuts else (0, None)
        return cls(ends, rank, group, copies, first, tuple(others), column_part)

    @property
    def are_whole(self) -> bool:
        """Tells whether all rows are here."""
        return self.group is None

    @property
    def are_first(self) -> bool:
        """Tells whether this rank is the first of all that hold a part of the parameter."""
        return self.rank == 0 and all(distributed.get_rank(group) == 0 for group in self.others)

    @property
    def here(self) -> slice:
        """Returns the rows of this rank."""
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    @property
    def num_here(self) -> int:
        return self.here.stop - self.here.start

    def among(self, rows: Tensor) -> Tensor:
        """Returns, of ascending numbers of rows, those that are here, counted from the first row here."""
        if self.are_whole:
            return rows
        ends = torch.tensor([self.here.start, self.here.stop], device=rows.device)
        first, last = torch.searchsorted(rows, ends).tolist()
        return rows[first:last] - self.here.start

    def gather(self, here: Tensor) -> Tensor:
        """Returns the rows (N, ...) of all ranks, in order, on every rank; ``here`` are those of this one."""
        if self.are_whole:
            return here
        sizes = [last - first for first, last in itertools.pairwise(self.cuts)]
        padded = here.new_zeros(max(sizes), *here.shape[1:])
        padded[: len(here)] = here
        parts = [torch.empty_like(padded) for _ in sizes]
        with named("gathering rows"):
            distributed.all_gather([_as_bytes(part) for part in parts], _as_bytes(padded), group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def exchange(self, rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Sends each row to the rank that holds it next, and returns the rows that come here, in order.

        Args:
            rows: (n, ...), this rank's rows of those numbered ``old``, in order.
            old, new: (K,) ascending, on every rank: row ``old[k]`` becomes row ``new[k]``.
        """
        if self.are_whole:
            return rows
        sent, received = self._plan(old, new)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        with named("moving rows"):
            distributed.all_to_all_single(
                _as_bytes(arrived), _as_bytes(rows.contiguous()), received, sent, group=self.group
            )
        return arrived

    def _plan(self, old: Tensor, new: Tensor) -> tuple[list[int], list[int]]:
        """Returns how many rows go from here to each rank, and come here from each.

        Rows keep their order, so what one rank sends to another is an interval of ``old`` and of ``new``.
        """
        cuts = torch.tensor(self.cuts, device=old.device)
        before, after = torch.searchsorted(old, cuts).tolist(), torch.searchsorted(new, cuts).tolist()
        mine_before, mine_after = before[self.rank : self.rank + 2], after[self.rank : self.rank + 2]
        return _overlaps(mine_before, after), _overlaps(mine_after, before)

    @property
    def groups(self) -> tuple[Any, ...]:
        """Returns the groups of the ranks that hold other parts of the parameter."""
        return self.others if self.group is None else (self.group, *self.others)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds ``tensor`` up over the ranks that hold other parts of the parameter, in place."""
        for group in self.groups:
            with named("adding up over shards"):
                distributed.all_reduce(tensor, group=group)
        return tensor

    def wrap(self, like: Any, here: Tensor) -> Tensor:
        """Returns a tensor (N, ...) that is cut as ``like`` is, of whose rows this rank holds ``here``."""
        if not is_sharded(like):
            return here
        from torch.distributed.tensor import DTensor

        shape = like.shape if here.dim() == like.dim() else torch.Size((like.shape[0], *here.shape[1:]))
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return DTensor.from_local(here, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


class Cut(NamedTuple):
    """Describes how one dimension of a mesh cuts a tensor.

    Args:
        dim: the tensor's dimension. mesh_dim: the mesh's. size: number of parts. rank: the number of the part here.
        group: the ranks that hold the parts.
    """

    dim: int
    mesh_dim: int
    size: int
    rank: int
    group: Any

    def ends(self, length: int) -> tuple[int, ...]:
        """Returns where the parts of a dimension of this length begin, and where the last one ends."""
        return ends_of_parts(length, self.size)

    def interval(self, length: int) -> tuple[int, int]:
        """Returns where the part that is here begins in a dimension of this length, and its length."""
        first, end = self.ends(length)[self.rank : self.rank + 2]
        return first, end - first

    def part(self, tensor: Tensor) -> Tensor:
        """Returns the part that is here, a view."""
        return tensor.narrow(self.dim, *self.interval(tensor.shape[self.dim]))

    def gather(self, here: Tensor, length: int) -> Tensor:
        """Returns the tensor of this length along the dimension, of which ``here`` is the part on this rank."""
        rows = Rows(self.ends(length), self.rank, self.group)
        if self.dim == 0:
            return rows.gather(here)
        return rows.gather(here.movedim(self.dim, 0).contiguous()).movedim(0, self.dim).contiguous()


def ends_of_parts(length: int, count: int) -> tuple[int, ...]:
    """Returns where the parts of an interval begin that torch cuts in ``count``, and where the last one ends."""
    chunk = -(-length // count)
    return tuple(min(number * chunk, length) for number in range(count + 1))


def cuts_of(tensor: Any) -> list[Cut]:
    """Returns how the mesh of a DTensor cuts it, tensor parallelism first and ``fully_shard`` last.

    ``fully_shard`` adds its dimension to the left of that of tensor parallelism, but cuts what that has left.

    Raises ValueError for ranks of a mesh that do not ascend, and for parts that no cut of either kind makes.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if not ranks_ascend(mesh):
        raise ValueError(
            f"expected a mesh whose ranks ascend along each dimension, got {mesh.mesh.tolist()}; make it with "
            "init_device_mesh"
        )
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) > 2 or any(not hasattr(placements[dim], "dim") for dim in cut):
        raise ValueError(
            f"expected a parameter that fully_shard cuts along its first dimension, and tensor parallelism along one, "
            f"got {placements}; shard with fully_shard, without shard_placement_fn"
        )
    found = [
        Cut(placements[dim].dim, dim, mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))
        for dim in reversed(cut)
    ]
    if found and found[-1].dim != 0 and len(found) > 1:
        raise ValueError(
            f"expected fully_shard to cut along the first dimension, got {placements}; leave out shard_placement_fn"
        )
    return found


def ranks_ascend(mesh: Any) -> bool:
    """Tells whether ranks ascend along each dimension of a mesh, as the order of parts within a process group does."""
    ranks = mesh.mesh
    return all(bool((ranks.diff(dim=dim) > 0).all()) for dim in range(ranks.dim()))


def make_whole(tensor: Any) -> Any:
    """Returns a DTensor whole, on every rank, bit for bit in any dtype; anything else as it is."""
    if not is_sharded(tensor):
        return tensor
    shape, lengths = list(tensor.shape), []
    for cut in cuts_of(tensor):
        lengths.append((cut, shape[cut.dim]))
        _, shape[cut.dim] = cut.interval(shape[cut.dim])
    here = local(tensor)
    for cut, length in reversed(lengths):
        here = cut.gather(here, length)
    return here


def cut_like(whole: Tensor, like: Any) -> Tensor:
    """Returns this rank's shard of ``whole``, sharded as ``like`` is; ``whole`` itself where that is no shard."""
    if not is_sharded(like):
        return whole
    return Rows.of(like).wrap(like, part_of(whole, like).to(like.device, copy=True).contiguous())


def part_of(whole: Tensor, like: Any) -> Tensor:
    """Returns the part of ``whole`` that this rank holds of a DTensor, a view."""
    for cut in cuts_of(like):
        whole = cut.part(whole)
    return whole


def is_nonzero(tensor: Tensor) -> bool:
    """Tells whether any entry is not zero, on whichever rank; every rank has to ask."""
    found: Tensor = local(tensor).any().to(torch.int64)
    return bool(Rows.of(tensor).sum_(found))


def _as_bytes(rows: Tensor) -> Tensor:
    """Returns a view (n, bytes of a row) uint8: neither gloo nor NCCL sends 16-bit integers."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _overlaps(mine: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """Returns how much of the interval ``mine`` lies between each pair of cuts."""
    return [max(0, min(mine[1], last) - max(mine[0], first)) for first, last in itertools.pairwise(cuts)]
