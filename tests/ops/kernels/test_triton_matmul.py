"""Triton's products with every kind of block equal the law in fp64."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import law
from tests.ops.kernels import cases
from tests.ops.kernels.cases import Weight
from tests.ops.kernels.device import DEVICE, HAS_GPU, new_memory_is_nan, on_device
from tests.ops.kernels.tolerances import assert_close
from tests.ops.matmul_cases import MASKS

pytestmark = [on_device, pytest.mark.usefixtures(new_memory_is_nan.__name__)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = [  # sizes that are not multiples of anything; blocks wider than the widest that a program takes
    ((37, 29), (8, 8)),
    ((48, 24), (16, 8)),
    ((11, 7), (3, 2)),
    ((50, 45), (24, 40)),
    ((70, 90), (32, 32)),
    ((70, 91), (64, 64)),
    ((170, 150), (160, 144)),
    ((3, 21, 29), (8, 16)),
    ((40, 88), (32, 32)),  # rows are aligned, and a block hangs over
    ((37, 29), (1, 1)),
    ((64, 48), (1, 8)),
    ((37, 29), (8, 1)),
    ((3, 21, 29), (1, 1)),
]
TILES = [each for each in WEIGHTS if min(each[1]) > 1]
NUM_TOKENS = [0, 1, *([37, 8192] if HAS_GPU else [])]
every_weight = pytest.mark.parametrize(("size", "block_shape"), WEIGHTS, ids=str)
every_tile = pytest.mark.parametrize(("size", "block_shape"), TILES, ids=str)


def kernel(name: str, each: Weight) -> Callable[..., Tensor]:
    """Returns ``masked_matmul`` or ``sampled_matmul`` of the module for this kind of block."""
    tiles = {"masked_matmul": "matmul_tiles", "sampled_matmul": "sampled_tiles"}[name]
    module = tiles if each.layout.tiles else "matmul_expanded"
    found: Any = importlib.import_module(f"smet_compile.ops.kernels.triton.{module}")
    function: Callable[..., Tensor] = getattr(found, name)
    return function


def check_masked(
    each: Weight, input: Tensor, transposed: bool, bias: Tensor | None, offsets: Tensor | None = None
) -> None:
    args = each.values(input.dtype), each.on_device, transposed, bias, offsets
    out = kernel("masked_matmul", each)(input, *args)
    exact = None if bias is None else bias.double().cpu()
    ends = None if offsets is None else offsets.cpu()
    expected = law.masked_matmul(input.double().cpu(), each.exact_values(), each.topology, transposed, exact, ends)
    assert out.is_contiguous() and out.dtype == input.dtype
    assert_close("transposed" if transposed else "plain", out.cpu(), expected)


def check_sampled(each: Weight, left: Tensor, right: Tensor, offsets: Tensor | None = None) -> None:
    out = kernel("sampled_matmul", each)(left, right, each.on_device, offsets)
    ends = None if offsets is None else offsets.cpu()
    expected = law.sampled_matmul(left.double().cpu(), right.double().cpu(), each.topology, ends)
    assert out.is_contiguous() and out.dtype == left.dtype
    assert_close("sampled", out.cpu(), expected)


def check_all(each: Weight, left: Tensor, right: Tensor, offsets: Tensor | None = None) -> None:
    """Checks the three products of a Linear's step, with and without a bias."""
    bias = torch.randn(right.shape[-1]).to(DEVICE, left.dtype)
    check_masked(each, right, True, None, offsets)
    check_masked(each, left, False, bias, offsets)
    check_sampled(each, left, right, offsets)


def both_sides(each: Weight, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _, rows, cols = each.grid.matrix
    return each.tokens(num_tokens, rows, dtype), each.tokens(num_tokens, cols, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_weight
def test_dtypes(size: tuple[int, ...], block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    each = cases.weight(size, block_shape)
    check_all(each, *both_sides(each, 37, dtype))


@pytest.mark.parametrize(("size", "block_shape"), [TILES[0], TILES[4], TILES[7]], ids=str)
def test_expanded_tiles(size: tuple[int, ...], block_shape: tuple[int, int]) -> None:
    """Tiles can be multiplied by expanding them, too, which suits dense ones."""
    from smet_compile.ops.kernels.triton import matmul_expanded

    each = cases.weight(size, block_shape)
    left, right = both_sides(each, 37, torch.float32)
    out = matmul_expanded.masked_matmul(right, each.values(torch.float32), each.on_device, True)
    expected = law.masked_matmul(right.double().cpu(), each.exact_values(), each.topology, True)
    assert_close("transposed", out.cpu(), expected)
    out = matmul_expanded.sampled_matmul(left, right, each.on_device)
    expected = law.sampled_matmul(left.double().cpu(), right.double().cpu(), each.topology)
    assert_close("sampled", out.cpu(), expected)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@every_weight
def test_numbers_of_tokens(size: tuple[int, ...], block_shape: tuple[int, int], num_tokens: int) -> None:
    each = cases.weight(size, block_shape)
    check_all(each, *both_sides(each, num_tokens, torch.float32))


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize(("size", "block_shape"), [each for each in WEIGHTS if max(each[1]) < 40], ids=str)
def test_masks(size: tuple[int, ...], block_shape: tuple[int, int], mask: str) -> None:
    """One block may be active, or all, or whole rows, columns and matrices may have none."""
    each = cases.weight(size, block_shape, mask)
    left, right = both_sides(each, 17, torch.float32)
    check_masked(each, right, True, torch.randn(left.shape[-1]).to(DEVICE))
    check_masked(each, left, False, None)
    check_sampled(each, left, right)


@pytest.mark.parametrize("num_tokens", [0, 17])
@pytest.mark.parametrize(
    ("size", "block_shape"), [WEIGHTS[0], WEIGHTS[4], WEIGHTS[7], WEIGHTS[9], WEIGHTS[10]], ids=str
)
def test_no_block_is_active(size: tuple[int, ...], block_shape: tuple[int, int], num_tokens: int) -> None:
    """A part of a weight may have none: its products are zero, or the bias."""
    from smet_compile.ops.kernels.triton import expand

    each = cases.weight(size, block_shape, "none")
    assert each.on_device.num_active == 0
    check_all(each, *both_sides(each, num_tokens, torch.float32))
    dense = expand.unpack(each.values(torch.float32), each.on_device)
    assert dense.shape == size and not dense.any()
    assert torch.equal(expand.pack(dense, each.on_device), each.values(torch.float32))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda x: x.mT.contiguous().mT,
    "every_second": lambda x: torch.stack((x, x.neg()), -1).flatten(-2)[..., ::2],
    "within_more": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "repeated": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize("strides", list(STRIDES))
@pytest.mark.parametrize(("size", "block_shape"), [WEIGHTS[0], WEIGHTS[4], WEIGHTS[7], WEIGHTS[9]], ids=str)
def test_strided_inputs(size: tuple[int, ...], block_shape: tuple[int, int], strides: str) -> None:
    each = cases.weight(size, block_shape)
    left, right = (STRIDES[strides](side) for side in both_sides(each, 37, torch.float32))
    assert not left.is_contiguous()
    check_all(each, left, right)


@pytest.mark.parametrize("num_tokens", [300, *([4096] if HAS_GPU else [])])
@pytest.mark.parametrize(("size", "block_shape"), [WEIGHTS[4], WEIGHTS[7], WEIGHTS[10]], ids=str)
def test_many_tokens(
    size: tuple[int, ...], block_shape: tuple[int, int], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens may come in several groups, of which the last is smaller."""
    from smet_compile.ops.kernels.triton import matmul_tiles

    monkeypatch.setattr(matmul_tiles, "_TOKENS_TOGETHER", 128)
    each = cases.weight(size, block_shape)
    check_all(each, *both_sides(each, num_tokens, torch.float32))


@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("architecture", ["hopper", "ampere"])
def test_configurations(architecture: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes in the table for each architecture give right products, wherever they run."""
    from smet_compile.ops.kernels.triton import supports

    monkeypatch.setattr(supports, "architecture", lambda _: architecture)
    each = cases.weight((min(140, 3 * side), 150), (side, side))
    check_all(each, *both_sides(each, 140, torch.float16))


@pytest.mark.parametrize("ends", [[6, 13, 40], [0, 40, 40], [4, 4, 11], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("block_shape", [(8, 16), (32, 32)], ids=str)
def test_tokens_sorted_by_matrix(block_shape: tuple[int, int], ends: list[int]) -> None:
    """Each token meets its own matrix; tokens past the last offset meet none, whatever they hold."""
    each = cases.weight((3, 45, 29), block_shape)
    offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    left, right = (each.tokens(40, size, torch.float32)[0].clone() for size in (45, 29))
    left[ends[-1] :], right[ends[-1] :] = torch.nan, torch.nan
    check_all(each, left, right, offsets)


@pytest.mark.parametrize("number", [1.0, torch.nan])
@every_tile
def test_what_hangs_over_an_edge_is_zero(size: tuple[int, ...], block_shape: tuple[int, int], number: float) -> None:
    each = cases.weight(size, block_shape, "all")
    left, right = (torch.full_like(side, number) for side in both_sides(each, 20, torch.float32))
    out = kernel("sampled_matmul", each)(left, right, each.on_device).cpu()
    inside = each.gather(torch.ones_like(each.dense)) == 1
    assert bool((out[~inside] == 0).all()) and bool((out[inside] != 0).all())


@pytest.mark.parametrize(("size", "block_shape"), [TILES[0], TILES[4], TILES[6]], ids=str)
def test_nan_beside_the_input_stays_there(size: tuple[int, ...], block_shape: tuple[int, int]) -> None:
    """Numbers that a kernel reads beside its block, if any, have no part in the result."""
    each = cases.weight(size, block_shape, "all")
    _, right = both_sides(each, 20, torch.float32)
    beside = torch.full((*right.shape[:-2], 24, right.shape[-1] + 64), torch.nan, device=DEVICE)
    beside[..., 2:22, 32:-32] = right
    check_masked(each, beside[..., 2:22, 32:-32], True, None)


@pytest.mark.parametrize(("size", "block_shape"), [((64, 64), (32, 32)), ((3, 45, 29), (8, 16))], ids=str)
def test_split_sums_have_the_same_bits_every_time(
    size: tuple[int, ...], block_shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smet_compile.ops.kernels.triton import sampled_tiles

    monkeypatch.setattr(sampled_tiles, "num_splits", lambda *_: 3)
    each = cases.weight(size, block_shape)
    left, right = both_sides(each, 200, torch.float32)
    check_sampled(each, left, right)
    product = kernel("sampled_matmul", each)
    first, second = (product(left, right, each.on_device) for _ in range(2))
    assert torch.equal(first, second)


def test_few_blocks_are_split() -> None:
    """One block of many tokens is split; many blocks, or few tokens, are not."""
    from smet_compile.ops.kernels.triton.sampled_tiles import num_splits

    layout = Layout.of((8192, 8192), (128, 128))
    assert num_splits(264, layout, 16384, 1, 1, 64) > 4
    assert num_splits(264, layout, 16384, 1056, 1, 64) == 1
    assert num_splits(264, layout, 64, 1, 1, 64) == 1
