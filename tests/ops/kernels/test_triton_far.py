"""Triton's products reach numbers that lie more than 2^31 places from the first: by strides, or by rows of values.

Memory that nothing touches is not taken: a few rows of a storage of gigabytes are.
"""

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.format.topology import empty_lists
from smet_compile.ops import law
from tests.ops.kernels import cases
from tests.ops.kernels.device import DEVICE, on_device
from tests.ops.kernels.tolerances import assert_close

pytestmark = on_device
BF16, LIMIT = torch.bfloat16, 2**31
NUM_BEFORE = LIMIT // 32**2
"""Tiles of 32 x 32 before those that are used."""


def far_apart(near: Tensor, stride: int) -> Tensor:
    """Returns a copy of ``near`` whose rows are ``stride`` numbers apart, the last one beyond the limit."""
    rows, columns = near.shape
    assert (rows - 1) * stride >= LIMIT
    storage = torch.empty((rows - 1) * stride + columns, dtype=near.dtype, device=DEVICE)
    return storage.as_strided((rows, columns), (stride, 1)).copy_(near)


@pytest.mark.parametrize(("num_tokens", "stride"), [(300, 2**23 - 16), (10, 2**28), (10, 2**28 + 1)])
@pytest.mark.parametrize("block_shape", [(32, 32), (5, 3)], ids=str)
def test_tokens_far_apart(block_shape: tuple[int, int], num_tokens: int, stride: int) -> None:
    from smet_compile.ops.kernels.triton import matmul_tiles, sampled_tiles

    size = (64, 80) if block_shape == (32, 32) else (14, 17)
    each = cases.weight(size, block_shape)
    left, right = each.tokens(num_tokens, size[0], BF16), each.tokens(num_tokens, size[1], BF16)
    values, exact = each.values(BF16), each.exact_values()
    far = far_apart(right, stride)
    out = matmul_tiles.masked_matmul(far, values, each.on_device, True)
    assert_close("transposed", out.cpu(), law.masked_matmul(right.double().cpu(), exact, each.topology, True))
    out = sampled_tiles.sampled_matmul(left, far, each.on_device)
    assert_close("sampled", out.cpu(), law.sampled_matmul(left.double().cpu(), right.double().cpu(), each.topology))
    del far
    far = far_apart(left, stride)
    out = matmul_tiles.masked_matmul(far, values, each.on_device, False)
    assert_close("plain", out.cpu(), law.masked_matmul(left.double().cpu(), exact, each.topology, False))


def last_of_many(topology: Topology, num_before: int) -> Topology:
    """Returns a topology of more blocks than there are positions, of which kernels meet only the last ones."""
    layout, num_active = topology.layout, topology.num_active
    total = num_before + num_active
    lists = empty_lists(layout, total, DEVICE).zero_()
    found = Topology(layout, topology.bits.to(DEVICE), lists.long() if layout.single_weights else lists, total)
    if topology.group_starts is not None and found.group_starts is not None:
        found.group_starts.copy_(topology.group_starts).add_(num_before)
        return found
    for name, added in (("positions", 0), ("by_column", num_before), ("rows_by_column", 0)):
        getattr(found, name)[num_before:] = getattr(topology, name).to(DEVICE) + added
    for name in ("row_starts", "column_starts"):
        getattr(found, name).copy_(getattr(topology, name)).add_(num_before)
    return found


def after_others(values: Tensor, num_before: int) -> Tensor:
    found = torch.empty(num_before + values.shape[0], *values.shape[1:], dtype=values.dtype, device=DEVICE)
    found[num_before:] = values
    return found


def test_tiles_after_many_others() -> None:
    from smet_compile.ops.kernels.triton import expand, matmul_tiles, sampled_tiles

    each = cases.weight((64, 96), (32, 32))
    many = last_of_many(each.topology, NUM_BEFORE)
    left, right = each.tokens(20, 64, BF16), each.tokens(20, 96, BF16)
    values, exact = after_others(each.values(BF16), NUM_BEFORE), each.exact_values()
    for name, input, transposed in (("transposed", right, True), ("plain", left, False)):
        out = matmul_tiles.masked_matmul(input, values, many, transposed)
        assert_close(name, out.cpu(), law.masked_matmul(input.double().cpu(), exact, each.topology, transposed))
    assert torch.equal(expand.unpack(values, many).double().cpu(), each.dense[0])
    del values
    out = sampled_tiles.sampled_matmul(left, right, many)[NUM_BEFORE:]
    assert_close("sampled", out.cpu(), law.sampled_matmul(left.double().cpu(), right.double().cpu(), each.topology))


def test_single_weights_after_many_others() -> None:
    from smet_compile.ops.kernels.triton import expand

    each = cases.weight((64, 96), (1, 1))
    many = last_of_many(each.topology, LIMIT)
    values = after_others(each.values(BF16), LIMIT)
    dense = expand.unpack(values, many)
    assert torch.equal(dense.double().cpu(), each.dense[0])
    del values
    assert torch.equal(expand.pack(dense, many)[LIMIT:].double().cpu(), each.exact_values())


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 8), (8, 1), (32, 32)], ids=str)
def test_a_dense_weight_of_rows_far_apart(block_shape: tuple[int, int]) -> None:
    from smet_compile.ops.kernels.triton import expand

    each = cases.weight((40, 96), block_shape)
    dense = far_apart(each.dense[0].to(DEVICE, BF16), 2**26)
    assert torch.equal(expand.pack(dense, each.on_device).double().cpu(), each.exact_values())


def test_a_matrix_after_many_others() -> None:
    """The stride from matrix to matrix may exceed the limit, too."""
    from smet_compile.ops.kernels.triton import matmul_tiles, sampled_tiles

    each = cases.weight((3, 32, 64), (32, 32))
    left, right = each.tokens(20, 32, BF16), each.tokens(20, 64, BF16)
    storage = torch.empty(2 * 2**30 + 20 * 64, dtype=BF16, device=DEVICE)
    far = storage.as_strided(right.shape, (2**30, 64, 1)).copy_(right)
    out = matmul_tiles.masked_matmul(far, each.values(BF16), each.on_device, True)
    expected = law.masked_matmul(right.double().cpu(), each.exact_values(), each.topology, True)
    assert_close("transposed", out.cpu(), expected)
    out = sampled_tiles.sampled_matmul(left, far, each.on_device)
    assert_close("sampled", out.cpu(), law.sampled_matmul(left.double().cpu(), right.double().cpu(), each.topology))


def test_the_layout_says_how_wide_its_index_is() -> None:
    layout = Layout.of((2**17, 2**16), (2, 2))
    assert empty_lists(layout, 1, torch.device("meta")).dtype == torch.int64
