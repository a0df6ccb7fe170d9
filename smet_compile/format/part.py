"""Describes the part of a weight that tensor parallelism leaves on a rank, and converts between it and the whole.

A weight that torch's ``parallelize_module`` has cut by rows or by columns is made compact part by part: each rank has a
compact weight of its own part. What is stored for the whole, as in a checkpoint, has the order of the whole weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smet_compile.format.layout import Layout
from smet_compile.format.slabs import Band
from smet_compile.format.topology import Topology, pack_bits, positions_of, unpack_bits
from smet_compile.shards.rows import Rows, is_sharded, ranks_ascend


@dataclass(frozen=True)
class Part:
    """Holds where a rank's part lies in a weight.

    Args:
        mesh: the one-dimensional mesh of tensor parallelism. placements: those of the dense weight on it.
        band: the part within the whole weight.
    """

    mesh: Any
    placements: tuple[Any, ...]
    band: Band

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        """Returns itself: it is immutable, and a mesh cannot be copied."""
        return self

    @classmethod
    def of(cls, name: str, weight: Tensor, whole: Layout) -> Part | None:
        """Describes the part of a dense weight that ``parallelize_module`` left here; None where it is whole.

        Args:
            whole: the layout of the whole weight, with its slabs.

        Raises ValueError, which begins with ``name``, for a weight that is cut in another way than into equal parts by
        rows or by columns, each of whole slabs.
        """
        if not is_sharded(weight):
            return None
        dtensor: Any = weight
        mesh, placements = dtensor.device_mesh, tuple(dtensor.placements)
        if mesh.ndim != 1 or not hasattr(placements[0], "dim") or placements[0].dim not in (0, 1):
            raise ValueError(
                f"{name}: expected a weight that tensor parallelism cuts by rows or by columns over one dimension of "
                f"the mesh, got {placements} over {mesh}; use ColwiseParallel or RowwiseParallel, or exclude it"
            )
        if not ranks_ascend(mesh):
            raise ValueError(
                f"{name}: expected a mesh whose ranks ascend, got {mesh.mesh.tolist()}; make it with init_device_mesh"
            )
        dim, count, slabs = placements[0].dim, mesh.size(), whole.slabs
        if count == 1:
            return cls(mesh, placements, Band(whole, whole))
        if slabs is None or slabs.dim != dim or slabs.num % count:
            raise ValueError(
                f"{name}: expected slabs along dimension {dim} whose number {count} divides, as the weight is cut, got "
                f"{slabs}; leave slabs= out for it, or take ({count}, {dim})"
            )
        here = slabs.num // count
        number = mesh.get_local_rank()
        layout = whole.cut(dim, count, slabs._replace(num=here, first=here * number))
        return cls(mesh, placements, Band(whole, layout, dim, number))

    @property
    def layout(self) -> Layout:
        """Returns the layout of the part here."""
        return self.band.layout

    @property
    def whole(self) -> Layout:
        """Returns the layout of the whole weight."""
        return self.band.whole

    @property
    def count(self) -> int:
        """Counts the parts."""
        count: int = self.mesh.size()
        return count

    @property
    def group(self) -> Any:
        """Returns the process group of the ranks that hold the parts."""
        return self.mesh.get_group()

    def holds_all(self, values: Tensor) -> bool:
        """Tells whether all rows of this part are here, as in a forward pass; ``fully_shard`` adds a dimension."""
        dtensor: Any = values
        return is_sharded(values) and bool(dtensor.device_mesh.ndim == 1)

    def wrap_dense(self, here: Tensor) -> Tensor:
        """Returns the dense weight as a DTensor, of which ``here`` is the part on this rank."""
        return self._wrap(here, self.placements)

    def here(self, name: str, dense: Tensor) -> Tensor:
        """Returns the part here of a dense weight, which is cut as this one is; raises ValueError where it is not."""
        dtensor: Any = dense
        if tuple(dense.shape) != self.whole.shape or tuple(dtensor.placements) != self.placements:
            raise ValueError(
                f"{name}: expected a weight of shape {self.whole.shape} cut by {self.placements}, got "
                f"{tuple(dense.shape)} by {dtensor.placements}; assign one that is cut alike"
            )
        here: Tensor = dtensor.to_local()
        return here

    def wrap_rows(self, here: Tensor) -> Tensor:
        """Returns rows as a DTensor cut along its first dimension, of which ``here`` are those of this rank."""
        from torch.distributed.tensor import Shard

        return self._wrap(here, (Shard(0),))

    def _wrap(self, here: Tensor, placements: Sequence[Any]) -> Tensor:
        from torch.distributed.tensor import DTensor

        wrapped: Tensor = DTensor.from_local(here, self.mesh, placements, run_check=False)
        return wrapped

    def bits_of_all(self, bits: Tensor) -> Tensor:
        """Returns the bits (ceil(num_blocks / 8),) of the whole weight from those of each part; every rank calls."""
        mask = torch.zeros(self.whole.num_blocks, dtype=torch.bool, device=bits.device)
        for number, each in enumerate(self.gather(bits).view(self.count, -1)):
            self._band_of(number).paste_(mask, unpack_bits(each, self.layout.num_blocks))
        return pack_bits(mask)

    def gather(self, here: Tensor) -> Tensor:
        """Returns the rows (n, ...) of all parts, part by part, of which ``here`` are this one's; every rank calls."""
        cuts = tuple(number * len(here) for number in range(self.count + 1))
        return Rows(cuts, self.band.number, self.group).gather(here)

    def split_bits(self, bits: Tensor) -> Tensor:
        """Returns the bits of all parts (count, ceil(num_blocks of a part / 8)) from those of the whole weight."""
        mask = unpack_bits(bits, self.whole.num_blocks)
        return torch.stack([pack_bits(self._band_of(number).cut(mask)) for number in range(self.count)])

    def bits_here(self, bits: Tensor) -> Tensor:
        """Returns the bits of this part from those of the whole weight."""
        return pack_bits(self.band.cut(unpack_bits(bits, self.whole.num_blocks)))

    def in_order(self, rows: Tensor, bits: Tensor) -> Tensor:
        """Returns the rows (N, ...) of all parts, which come part by part, in the order of the whole weight.

        ``bits`` is the topology of the whole weight.
        """
        return rows[self._order(bits).to(rows.device)]

    def by_part(self, rows: Tensor, bits: Tensor) -> Tensor:
        """Returns the rows (N, ...) of the whole weight, which are in its order, part by part."""
        return rows[self._order(bits).argsort().to(rows.device)]

    def _order(self, bits: Tensor) -> Tensor:
        return order_of_parts(self.whole, self.band.dim, self.count, bits)

    def topology_here(self, active: Topology, rows: slice) -> Topology:
        """Returns the topology of some rows of this part in the whole weight, as if that had no other active block.

        Args:
            active: the topology of this part.
        """
        key = ("rows of the whole", rows.start, rows.stop)
        return active.constant(key, lambda: self._make_topology_here(active, rows))

    def _make_topology_here(self, active: Topology, rows: slice) -> Topology:
        positions = positions_of(active.mask()) if active.positions is None else active.positions.long()
        mask = torch.zeros(self.whole.num_blocks, dtype=torch.bool, device=active.bits.device)
        mask[self.band.place(positions[rows])] = True
        return Topology.from_bits(pack_bits(mask), self.whole, rows.stop - rows.start)

    def _band_of(self, number: int) -> Band:
        return Band(self.whole, self.layout, self.band.dim, number)


def order_of_parts(whole: Layout, dim: int, count: int, bits: Tensor) -> Tensor:
    """Returns which row each row of a whole weight (N,) is when they come part by part.

    Args:
        dim, count: how the weight is cut. bits: its topology.
    """
    mask, part = unpack_bits(bits, whole.num_blocks), whole.cut(dim, count)
    bands = [Band(whole, part, dim, number) for number in range(count)]
    return torch.cat([band.place(positions_of(band.cut(mask))) for band in bands]).argsort()
