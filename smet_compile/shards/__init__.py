"""Says which rows of a compact weight each rank holds, and which ranks train one model together."""

from smet_compile.shards.ranks import ALONE, Ranks, reduce_over_groups
from smet_compile.shards.rows import (
    Rows,
    cut_like,
    is_nonzero,
    is_sharded,
    local,
    make_whole,
    reshard,
    set_gradient_sync,
)

__all__ = [
    "ALONE",
    "Ranks",
    "Rows",
    "cut_like",
    "is_nonzero",
    "is_sharded",
    "local",
    "make_whole",
    "reduce_over_groups",
    "reshard",
    "set_gradient_sync",
]
