"""The compact format: what is stored of a sparse weight, and what it means.

Imports torch and the standard library only.
"""

from smet_compile.format.blocks import all_block_means, block_means, block_sizes, pack, unpack
from smet_compile.format.change import TopologyChange
from smet_compile.format.index import (
    Index,
    blocks_per_group,
    empty_index,
    num_groups,
    split_index,
    whole_index,
    write_index,
)
from smet_compile.format.layout import Layout
from smet_compile.format.sampling import sample_evenly, sample_positions
from smet_compile.format.topology import (
    count_active,
    digest_bits,
    pack_bits,
    positions_of,
    spare_bits,
    unpack_bits,
)

__all__ = [
    "Index",
    "Layout",
    "TopologyChange",
    "all_block_means",
    "block_means",
    "block_sizes",
    "blocks_per_group",
    "count_active",
    "digest_bits",
    "empty_index",
    "num_groups",
    "pack",
    "pack_bits",
    "positions_of",
    "sample_evenly",
    "sample_positions",
    "spare_bits",
    "split_index",
    "unpack",
    "unpack_bits",
    "whole_index",
    "write_index",
]
