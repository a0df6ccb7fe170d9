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
_LINE = "|---|---|---|---|---|---|---|"
HEAD = ("| model | ranks | dense | single weights | of it topology | tiles of 64 | of it topology |", _LINE)
TRAFFIC_HEAD = (
    "| model | whole on a rank: dense | sparse | sent in a step: dense | sparse | in an update: single | tiles |",
    _LINE,
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


def main() -> None:
    argparse.ArgumentParser(description="Print the tables of docs/scaling.md.").parse_args()
    of_sizes = {size: costs(size) for size in SIZES}
    print(*HEAD, *(row for size, found in of_sizes.items() for row in rows(size, found)), "", sep="\n")
    print(*TRAFFIC_HEAD, *(traffic_row(size, found) for size, found in of_sizes.items()), sep="\n")


if __name__ == "__main__":
    main()
