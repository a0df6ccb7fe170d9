"""Defines the compact format: which tensors stand for a sparse weight, and how they relate to the dense one.

Imports torch and the standard library only.
"""

from smet_compile.format.blocks import all_block_means, block_means, block_sizes, pack, unpack
from smet_compile.format.change import TopologyChange
from smet_compile.format.layout import WEIGHTS_OF_A_GROUP, Layout, Slabs
from smet_compile.format.part import Part
from smet_compile.format.sampling import sample_evenly, sample_positions
from smet_compile.format.slabs import Band, bands_of
from smet_compile.format.topology import (
    Topology,
    count_active,
    digest_bits,
    empty_lists,
    pack_bits,
    positions_of,
    spare_bits,
    unpack_bits,
    write_lists,
)

__all__ = [
    "WEIGHTS_OF_A_GROUP",
    "Band",
    "Layout",
    "Part",
    "Slabs",
    "Topology",
    "TopologyChange",
    "all_block_means",
    "bands_of",
    "block_means",
    "block_sizes",
    "count_active",
    "digest_bits",
    "empty_lists",
    "pack",
    "pack_bits",
    "positions_of",
    "sample_evenly",
    "sample_positions",
    "spare_bits",
    "unpack",
    "unpack_bits",
    "write_lists",
]
