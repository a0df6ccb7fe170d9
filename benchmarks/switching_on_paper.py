"""Computes what switches of large models send on many ranks: the table "On paper" of docs/switching.md."""

from __future__ import annotations

from collections.abc import Iterator

import smet_compile as smet
from smet_compile.distributed.sizes import switch_between
from smet_compile.plan.card import seconds_text
from smet_compile.plan.mesh import check_mesh
from smet_compile.plan.stored import bytes_text

SIZES = ("7b", "70b")
DENSITIES = (1.0, 0.25)
TILE, LINK = 32, 25e9
"""Tiles, whose borders 8 parts of every layer keep; bytes a second of a link of 200 Gb/s."""
SWITCHES = (
    ({"dp": 128}, {"dp": 64, "tp": 2}),
    ({"dp": 128}, {"dp": 16, "tp": 8}),
    ({"dp": 16, "tp": 8}, {"dp": 32, "tp": 4}),
    ({"dp": 128}, {"dp": 64}),
    ({"dp": 64}, {"dp": 128}),
)
HEAD = (
    "| model | density | state | from | to | sent | at least | by the rank with most | seconds |",
    "|---|---|---|---|---|---|---|---|---|",
)


def rows(size: str, density: float) -> Iterator[str]:
    """Yields a row for each switch of a model whose weights and moments are in fp32."""
    plan = smet.plan(size, density, block_shape=TILE, batch=1, compiled=False)
    for pair in SWITCHES:
        old, new = map(check_mesh, pair)
        switch = switch_between(plan.placement(), old, new)
        state = sum(each.row_bytes * each.parameter.num_stored_rows for each in plan.placement().state(1))
        numbers = map(bytes_text, (switch.total_sent, switch.lower_bound, switch.seconds(1)))
        seconds = seconds_text(switch.seconds(LINK))
        yield f"| {size} | {density:g} | {bytes_text(state)} | {old} | {new} | {' | '.join(numbers)} | {seconds} |"


def table() -> list[str]:
    """Returns the lines of the table."""
    return [*HEAD, *(row for size in SIZES for density in DENSITIES for row in rows(size, density))]
