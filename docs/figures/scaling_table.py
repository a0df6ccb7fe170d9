"""Prints the tables of docs/scaling.md by ``smet_compile.plan``: bytes and traffic of a rank, by size, mesh and blocks.

python docs/figures/scaling_table.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import smet_compile as smet
from smet_compile.plan.per_rank import RankCost
from smet_compile.plan.stored import bytes_text

SIZES = ("7b", "13b", "34b", "70b")
RANKS = (8, 64, 256, 1024)
DENSITY, TILE = 0.25, 64
PARTS = {"7b": (64, 4), "70b": (256, 8)}
"""Maps a model to a number of ranks, and to that of tensor parallelism among them."""
_LINE = "|---|---|---|---|---|---|---|"
HEAD = ("| model | ranks | dense | single weights | of it topology | tiles of 64 | of it topology |", _LINE)
TRAFFIC_HEAD = (
    "| model | whole on a rank: dense | sparse | sent in a step: dense | sparse | in an update: single | tiles |",
    _LINE,
)

PARTS_HEAD = (
    "| model | mesh | blocks | dense | sparse | bits | own rows | topology | scales of 8-bit moments | "
    "whole on a rank: dense | sparse |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
PARTS_TRAFFIC_HEAD = (
    "| model | mesh | sent in a step: dense | sparse | of it activations | in an update: single | of it bits | tiles | "
    "more to grow by gradient |",
    "|---|---|---|---|---|---|---|---|---|",
)


def costs(size: str) -> dict[tuple[str, int], RankCost]:
    """Returns (what, ranks) → the cost of a rank."""
    found: dict[tuple[str, int], RankCost] = {}
    for name, block_shape in (("single", 1), ("tiles", TILE)):
        plan = smet.plan(
            size, DENSITY, block_shape=block_shape, batch=1, dtype="bfloat16", moment_dtype="bfloat16", compiled=False
        )
        for ranks in RANKS:
            on_mesh = plan.on_mesh({"dp": ranks})
            found[name, ranks], found["dense", ranks] = on_mesh.sparse, on_mesh.dense
    return found


def rows(size: str, of_size: dict[tuple[str, int], RankCost]) -> Iterator[str]:
    """Yields the rows of the first table for one model."""
    for ranks in RANKS:
        dense, single, tiles = (of_size[name, ranks] for name in ("dense", "single", "tiles"))
        numbers = dense.persistent, single.persistent, single.topology, tiles.persistent, tiles.topology
        yield f"| {size} | {ranks:,} | {' | '.join(map(bytes_text, numbers))} |"


def traffic_row(size: str, of_size: dict[tuple[str, int], RankCost]) -> str:
    """Returns the row of the second table for one model, on the mesh that is second in size."""
    dense, single, tiles = (of_size[name, RANKS[1]] for name in ("dense", "single", "tiles"))
    whole = [each.whole_parameters + each.whole_gradients for each in (dense, single)]
    steps = [sum(each.traffic.step.values()) for each in (dense, single)]
    updates = [sum(each.traffic.update.values()) for each in (single, tiles)]
    return f"| {size} | {' | '.join(map(bytes_text, [*whole, *steps, *updates]))} |"


def plan_of_parts(size: str, block_shape: int, moment_dtype: str = "bfloat16") -> smet.Plan:
    """Plans a run where ranks of tensor parallelism read as many sequences together as they would one by one."""
    return smet.plan(
        size,
        DENSITY,
        block_shape=block_shape,
        batch=PARTS[size][1],
        dtype="bfloat16",
        moment_dtype=moment_dtype,
        compiled=False,
    )


def rows_of_parts(size: str) -> Iterator[str]:
    """Yields the rows of the third and the fourth table for one model: without tensor parallelism, and with it."""
    ranks, parts = PARTS[size]
    meshes = {"dp": ranks}, {"dp": ranks // parts, "tp": parts}
    plans = {"single": plan_of_parts(size, 1), f"tiles of {TILE}": plan_of_parts(size, TILE)}
    of_8_bits = plan_of_parts(size, TILE, "int8")
    for blocks, plan in plans.items():
        for mesh in meshes:
            dense, sparse = plan.on_mesh(mesh).dense, plan.on_mesh(mesh).sparse
            scales = bytes_text(of_8_bits.on_mesh(mesh).sparse.stored["scales"]) if blocks != "single" else ""
            numbers = [dense.persistent, sparse.persistent, *(sparse.stored[kind] for kind in ("bits", "own rows"))]
            whole = [each.whole_parameters + each.whole_gradients for each in (dense, sparse)]
            texts = [*map(bytes_text, [*numbers, sparse.topology]), scales, *map(bytes_text, whole)]
            yield f"| {size} | {plan.on_mesh(mesh).mesh} | {blocks} | {' | '.join(texts)} |"
    for mesh in meshes:
        single, tiles = (plan.on_mesh(mesh) for plan in plans.values())
        step, update = single.sparse.traffic.step, single.sparse.traffic.update
        numbers = [sum(single.dense.traffic.step.values()), sum(step.values()), step["tensor parallel"]]
        numbers += [sum(update.values()), update["bits"], sum(tiles.sparse.traffic.update.values())]
        texts = map(bytes_text, [*numbers, single.sparse.traffic.growth])
        yield f"| {size} | {single.mesh} | {' | '.join(texts)} |"


def main() -> None:
    argparse.ArgumentParser(description="Print the tables of docs/scaling.md.").parse_args()
    of_sizes = {size: costs(size) for size in SIZES}
    print(*HEAD, *(row for size, found in of_sizes.items() for row in rows(size, found)), "", sep="\n")
    print(*TRAFFIC_HEAD, *(traffic_row(size, found) for size, found in of_sizes.items()), "", sep="\n")
    of_parts = [list(rows_of_parts(size)) for size in PARTS]
    print(*PARTS_HEAD, *(row for rows in of_parts for row in rows[:4]), "", sep="\n")
    print(*PARTS_TRAFFIC_HEAD, *(row for rows in of_parts for row in rows[4:]), sep="\n")


if __name__ == "__main__":
    main()
