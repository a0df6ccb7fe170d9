"""Plans a switch between two meshes from the sizes of a model alone, without a process group or a model on any rank.

Regions are those that ``fully_shard`` and tensor parallelism make. Ranks of "tp" are neighbours, then come those of
"dp", then the copies, as in ``DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))``.

Bytes are exact, with one exception: where a switch changes into how many parts the columns of a compact weight are cut,
they depend on where its active blocks are. They are then those of blocks that lie as evenly as there can be: each part
has as many of the first n rows as any other. Random ones send a few percent more, where ranks hold few rows of blocks.
"""

from __future__ import annotations

import math

import torch

from smet_compile.distributed.space import Item, Placed, Region, SwitchPlan, plan_switch
from smet_compile.plan.mesh import Mesh
from smet_compile.plan.placement import Placement, State

_ALL_AT_ONCE = 1 << 62


def switch_between(placement: Placement, old: Mesh, new: Mesh) -> SwitchPlan:
    """Plans a switch of parameters, moments, ages and buffers; what every rank has whole, as topologies, is left out.

    Tensors that are cut alike are counted as one, so ``peak`` is higher than that of a switch in windows.

    Raises:
        ValueError: tensor parallelism cannot cut the model among so many ranks.
    """
    row_bytes: dict[tuple[int, int, bool, int | None], int] = {}
    for state in placement.state(math.lcm(old.parts, new.parts)):
        key = _shape(state, old, new)
        row_bytes[key] = row_bytes.get(key, 0) + state.row_bytes // (key[1] if state.parameter.layout is None else 1)
    items = [
        Item(
            f"{num_rows:,} rows of {count:,} bytes",
            (num_rows, width, count),
            torch.uint8,
            *(Placed(_regions(mesh, num_rows, width, is_compact, dim)) for mesh in (old, new)),
        )
        for (num_rows, width, is_compact, dim), count in row_bytes.items()
    ]
    whole = Region(0, placement.run.buffers)
    every = [Placed(dict.fromkeys(range(mesh.size), whole)) for mesh in (old, new)]
    items.append(Item("buffers", (whole.stop,), torch.uint8, *every))
    return plan_switch(items, _ALL_AT_ONCE)


def _shape(state: State, old: Mesh, new: Mesh) -> tuple[int, int, bool, int | None]:
    """Returns rows, columns, whether they are those of a compact weight, and the dimension that is cut.

    A compact weight has a column for each part of it, and is cut by rows where the parts stay as they are.
    """
    parameter, dim = state.parameter, state.dim
    if dim != 1:
        return parameter.num_stored_rows, 1, False, dim
    if parameter.layout is None:
        return parameter.num_rows, parameter.num_weights // parameter.num_rows, False, 1
    if old.parts == new.parts:
        return parameter.num_active, 1, False, 0
    width = math.lcm(old.parts, new.parts)
    return parameter.num_active // width, width, True, 1


def _regions(mesh: Mesh, num_rows: int, width: int, is_compact: bool, dim: int | None) -> dict[int, Region]:
    """Returns the region of each rank: tensor parallelism cuts first, and ``fully_shard`` what that has left."""
    parts = 1 if dim is None else mesh.parts
    columns = width // parts if dim == 1 else width
    stored_rows = num_rows // parts if dim == 0 else num_rows * columns if is_compact else num_rows
    chunk, per_row = mesh.chunk(stored_rows), columns if is_compact else 1
    found = {}
    for rank in range(mesh.size):
        part, shard = rank % mesh.parts, rank // mesh.parts % mesh.shards
        start, stop = (min(each * chunk, stored_rows) // per_row for each in (shard, shard + 1))
        if dim == 1:
            found[rank] = Region(start, stop, part % parts * columns, (part % parts + 1) * columns)
        else:
            low = part * stored_rows if dim == 0 else 0
            found[rank] = Region(low + start, low + stop)
    return found
