"""The kernel named "reference": the definitions of ``reference.py`` as the ops call them, for any device and dtype.

Slow and plain: what a faster kernel is suspected of can be tried again with this one.
"""

from __future__ import annotations

from torch import Tensor

from smet_compile.format import Layout, blocks, unpack_bits
from smet_compile.ops import reference as ref


def unpack(
    values: Tensor, topology: Tensor, index: list[Tensor], shape: list[int], matrix: list[int], block_shape: list[int]
) -> Tensor:
    layout = Layout.of_lists(shape, matrix, block_shape)
    return blocks.unpack(values, unpack_bits(topology, layout.num_blocks), layout)


def pack(
    dense: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
) -> Tensor:
    layout = Layout.of_lists(shape, matrix, block_shape)
    return blocks.pack(dense, unpack_bits(topology, layout.num_blocks), layout)


def masked_matmul(
    input: Tensor,
    values: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    transposed: bool,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    layout = Layout.of_lists(shape, matrix, block_shape)
    mask, (input_, values_, bias_) = unpack_bits(topology, layout.num_blocks), _exact(input, values, bias)
    assert input_ is not None and values_ is not None
    return ref.masked_matmul(input_, values_, mask, layout, transposed, bias_, offsets).to(input.dtype)


def sampled_matmul(
    left: Tensor,
    right: Tensor,
    topology: Tensor,
    index: list[Tensor],
    shape: list[int],
    matrix: list[int],
    block_shape: list[int],
    num_active: int,
    offsets: Tensor | None = None,
) -> Tensor:
    layout = Layout.of_lists(shape, matrix, block_shape)
    mask, (left_, right_) = unpack_bits(topology, layout.num_blocks), _exact(left, right)
    assert left_ is not None and right_ is not None
    return ref.sampled_matmul(left_, right_, mask, layout, offsets).to(left.dtype)


def _exact(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the dtype that the definition computes in."""
    return [None if t is None else t.to(ref.compute_dtype(t.dtype)) for t in tensors]
