"""unpack and pack, for every kind of block."""

from __future__ import annotations

from torch import Tensor

from smet_compile.format import Layout, split_index
from smet_compile.ops.kernels.triton import device
from smet_compile.ops.kernels.triton.expand_bits import Span, expand_bits
from smet_compile.ops.kernels.triton.expand_tiles import expand_tiles


def unpack(
    values: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
) -> Tensor:
    """The dense weight of ``values``, as ``format.unpack`` defines it. Values may be of any strides."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    dense = values.new_empty(layout.shape)
    everything = Span(0, layout.num_blocks)
    move(values.contiguous(), dense.view(-1, *layout.matrix), topology, index, layout, everything, packs=False)
    return dense


def pack(
    dense: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
) -> Tensor:
    """The active blocks of ``dense``, as ``format.pack`` defines it. A transposed matrix is read as it lies."""
    layout = Layout.of_lists(shape, matrix, block_shape)
    values = dense.new_empty(layout.values_shape(num_active))
    everything = Span(0, layout.num_blocks)
    move(values, dense.reshape(-1, *layout.matrix), topology, index, layout, everything, packs=True)
    return values


def move(
    values: Tensor, dense_SRC: Tensor, topology: Tensor, index: list[Tensor], layout: Layout, span: Span, packs: bool
) -> None:
    """Writes ``dense_SRC``, which begins with the first block of ``span``, from ``values``; ``packs``: the reverse."""
    lists = split_index(index[0], layout, values.shape[0])
    with device.on_device_of(values):
        if layout.tiles:
            expand_tiles(values, dense_SRC, topology, lists, layout, span, packs)
        else:
            assert lists.group_starts is not None
            expand_bits(values, dense_SRC, topology, lists.group_starts, layout, span, packs)
