"""Says which rows of a compact weight each rank holds, and which ranks train one model together."""

from smet_compile.shards.draws import DrawsWhole
from smet_compile.shards.ranks import ALONE, Ranks, reduce_over_groups, train_on
from smet_compile.shards.rows import (
    Rows,
    cut_like,
    ends_of_parts,
    is_fully_sharded,
    is_nonzero,
    is_sharded,
    local,
    make_whole,
    named,
    part_of,
    ranks_ascend,
    reshard,
    set_gradient_sync,
    unwrap,
)
from smet_compile.shards.unsharded import Unsharded, check_dtypes, forget_shards, has_shards

__all__ = [
    "ALONE",
    "DrawsWhole",
    "Ranks",
    "Rows",
    "Unsharded",
    "check_dtypes",
    "cut_like",
    "ends_of_parts",
    "forget_shards",
    "has_shards",
    "is_fully_sharded",
    "is_nonzero",
    "is_sharded",
    "local",
    "make_whole",
    "named",
    "part_of",
    "ranks_ascend",
    "reduce_over_groups",
    "reshard",
    "set_gradient_sync",
    "train_on",
    "unwrap",
]
