"""Describes how the rows of one parameter are shared out among ranks, and moves rows from rank to rank.

The rows of a compact weight are sorted by position, a shard is an interval of them, and every rank knows the topology.
So every rank knows where each row lies, before and after a change, and needs no message to plan who sends what.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Any) -> bool:
    """Tells whether ``tensor`` is a DTensor. Its module is not imported where nobody else did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Returns the part of a DTensor that this rank holds; anything else as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


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


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


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
    """

    cuts: tuple[int, ...]
    rank: int = 0
    group: Any = None
    copies: tuple[Any, ...] = ()

    @classmethod
    def of(cls, parameter: Any) -> Rows:
        """Describes a parameter as ``fully_shard`` left it; any other has all of its rows here.

        Raises ValueError for a parameter that is cut along another dimension than its first, or twice.
        """
        num_rows = parameter.shape[0] if parameter.dim() else 1
        if not is_sharded(parameter):
            return cls((0, num_rows))
        mesh, placements = parameter.device_mesh, parameter.placements
        cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        copies = tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if dim not in cut)
        if not cut:
            return cls((0, num_rows), copies=copies)
        if len(cut) > 1 or not placements[cut[0]].is_shard(0):
            raise ValueError(
                f"expected a parameter cut along its first dimension by one dimension of the mesh, got {placements}; "
                "shard with fully_shard, without shard_placement_fn"
            )
        size = mesh.size(cut[0])
        if size == 1:
            return cls((0, num_rows), copies=copies)
        chunk = -(-num_rows // size)
        cuts = tuple(min(rank * chunk, num_rows) for rank in range(size + 1))
        return cls(cuts, mesh.get_local_rank(cut[0]), mesh.get_group(cut[0]), copies)

    @property
    def are_whole(self) -> bool:
        """Tells whether all rows are here."""
        return self.group is None

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

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds ``tensor`` up over the ranks that hold other rows, in place."""
        if not self.are_whole:
            with named("adding up over shards"):
                distributed.all_reduce(tensor, group=self.group)
        return tensor

    def wrap(self, like: Any, here: Tensor) -> Tensor:
        """Returns a tensor (N, ...) that is cut as ``like`` is, of whose rows this rank holds ``here``."""
        if not is_sharded(like):
            return here
        from torch.distributed.tensor import DTensor

        shape = torch.Size((like.shape[0], *here.shape[1:])) if like.dim() else here.shape
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return DTensor.from_local(here, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def make_whole(tensor: Any) -> Any:
    """Returns a DTensor whole, on every rank, bit for bit in any dtype; anything else as it is."""
    if not is_sharded(tensor):
        return tensor
    return Rows.of(tensor).gather(local(tensor))


def cut_like(whole: Tensor, like: Any) -> Tensor:
    """Returns this rank's shard of ``whole``, sharded as ``like`` is; ``whole`` itself where that is no shard."""
    if not is_sharded(like):
        return whole
    return Rows.of(like).wrap(like, whole[Rows.of(like).here].to(like.device, copy=True))


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
