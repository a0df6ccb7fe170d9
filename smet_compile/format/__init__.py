"""The compact format: what is stored of a sparse weight, and what it means.

Imports torch and the standard library only.
"""

from smet_compile.format.blocks import all_block_means, block_means, block_sizes, pack, unpack
from smet_compile.format.change import TopologyChange
from smet_compile.format.layout import Layout
from smet_compile.format.sampling import sample_positions
from smet_compile.format.topology import count_active, pack_bits, positions_of, unpack_bits

__all__ = [
    "Layout",
    "TopologyChange",
    "all_block_means",
    "block_means",
    "block_sizes",
    "count_active",
    "pack",
    "pack_bits",
    "positions_of",
    "sample_positions",
    "unpack",
    "unpack_bits",
]
