"""Triton's unpack and pack give the bits of the plain ones, for every kind of block."""

import pytest
import torch

from tests.ops.kernels import cases
from tests.ops.kernels.device import DEVICE, combinations, new_memory_is_nan, on_device
from tests.ops.matmul_cases import MASKS
from tests.support.snapshots import same_bits

pytestmark = [on_device, pytest.mark.usefixtures(new_memory_is_nan.__name__)]
SIZES = [(37, 29), (3, 21, 29)]
BLOCK_SHAPES = [(1, 1), (1, 8), (8, 1), (1, 3), (3, 1), (1, 700), (8, 8), (3, 5), (32, 32), (16, 24)]
every_weight = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)


@pytest.mark.parametrize(("block_shape", "size", "mask"), combinations(BLOCK_SHAPES, SIZES, MASKS), ids=str)
def test_both_ways(block_shape: tuple[int, int], size: tuple[int, ...], mask: str) -> None:
    from smet_compile.ops.kernels.triton.expand import pack, unpack

    each = cases.weight(size, block_shape, mask)
    values, topology = each.values(torch.float32), each.on_device
    dense = unpack(values, topology)
    assert torch.equal(dense.cpu(), each.dense.view(size).float())
    grad = torch.randn(size)
    packed = pack(grad.to(DEVICE), topology)
    assert same_bits(packed.cpu(), each.gather(grad))


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 8), (2, 1), (1, 3), (32, 32), (100, 300)], ids=str)
def test_several_programs(block_shape: tuple[int, int]) -> None:
    """There may be more groups than one program takes, and more block columns than are counted at once."""
    from smet_compile.ops.kernels.triton.expand import pack, unpack

    size = (2, 9000) if block_shape != (100, 300) else (120, 310)
    each = cases.weight(size, block_shape)
    values, topology = each.values(torch.float32), each.on_device
    assert torch.equal(unpack(values, topology).cpu(), each.dense.view(size).float())
    grad = torch.randn(size)
    assert same_bits(pack(grad.to(DEVICE), topology).cpu(), each.gather(grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_weight
def test_dtypes(block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    from smet_compile.ops.kernels.triton.expand import pack, unpack

    each = cases.weight((37, 29), block_shape)
    values, topology = each.values(dtype), each.on_device
    dense = unpack(values, topology)
    assert dense.dtype == dtype and torch.equal(dense.cpu(), each.dense.view(37, 29).to(dtype))
    assert same_bits(pack(dense, topology), values)


@every_weight
def test_a_transposed_gradient_is_read_as_it_lies(block_shape: tuple[int, int]) -> None:
    from smet_compile.ops.kernels.triton.expand import pack

    for size in ((40, 30), (3, 21, 29)):
        each = cases.weight(size, block_shape)
        grad = torch.randn(size).mT.contiguous().mT
        packed = pack(grad.to(DEVICE), each.on_device)
        assert same_bits(packed.cpu(), each.gather(grad))


def test_values_without_memory_of_their_own() -> None:
    """Values may be an expanded scalar, as autograd makes of the gradient of a sum."""
    from smet_compile.ops.kernels.triton.expand import unpack

    for block_shape in ((1, 1), (8, 8)):
        each = cases.weight((37, 29), block_shape, "all")
        values = torch.ones((), device=DEVICE).expand(each.values(torch.float32).shape)
        assert bool((unpack(values, each.on_device) == 1).all())


def test_a_sampled_product_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows or matrices may be of any number: no scratch is larger than is allowed, the result is the same."""
    from smet_compile.ops.kernels.triton import matmul_expanded

    monkeypatch.setattr(matmul_expanded, "_ROWS_OF_A_GEMM", 4)
    for size in ((37, 29), (5, 6, 7)):
        for block_shape in ((1, 1), (1, 8), (3, 1), (2, 8)):
            each = cases.weight(size, block_shape)
            left, right = (each.tokens(11, number, torch.float32) for number in size[-2:])
            whole = matmul_expanded.sampled_matmul(left, right, each.on_device)
            with monkeypatch.context() as patch:
                patch.setattr(matmul_expanded, "SCRATCH_BYTES", 600)
                patch.setattr(matmul_expanded, "CACHED_BYTES", 600)
                assert len(list(matmul_expanded._pieces(each.layout, 4, sms=1))) > 1
                in_pieces = matmul_expanded.sampled_matmul(left, right, cases.on_device(each.topology))
                torch.testing.assert_close(in_pieces, whole, rtol=1e-6, atol=1e-6)
