"""unpack and pack in plain torch, on any device."""

from __future__ import annotations

from torch import Tensor

from smet_compile.format import Layout, blocks, split_index, unpack_bits


def active_blocks(topology: Tensor, index: list[Tensor], layout: Layout, num_active: int) -> Tensor:
    """The active blocks: their positions where they are at hand, else a mask."""
    if layout.single_weights or not index:
        return unpack_bits(topology, layout.num_blocks)
    positions = split_index(index[0], layout, num_active).positions
    assert positions is not None
    return positions.long()


def unpack(
    values: Tensor, topology: Tensor, index: list[Tensor], shape: list[int], matrix: list[int], block_shape: list[int]
) -> Tensor:
    """The dense weight of ``values``."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    return blocks.unpack(values, active_blocks(topology, index, layout, values.shape[0]), layout)


def pack(
    dense: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
) -> Tensor:
    """The active blocks of ``dense``."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    return blocks.pack(dense, active_blocks(topology, index, layout, num_active), layout)
