"""Products with compact weights: equal to products with the dense weight, and to the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.ops import law
from tests.ops.matmul_cases import BLOCK_SHAPES, MASKS, SHAPES, TILES, Case, case, relative_error
from tests.support.scratch import Scratch
from tests.support.snapshots import same_bits
from tests.support.updates import after_gradient, settings

ops = torch.ops.smet
CLOSE = {"atol": 1e-12, "rtol": 1e-12}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OFFSETS = {  # over 20 rows, for three matrices
    "even": [6, 13, 20],
    "empty_groups": [0, 20, 20],
    "trailing_rows": [4, 4, 11],
    "no_token": [0, 0, 0],
}
every_block_shape = pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
every_tile = pytest.mark.parametrize("block_shape", TILES, ids=str)
both_ways = pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])


def product(each: Case, tokens: Tensor, transposed: bool) -> Tensor:
    """Returns tokens Wᵀ or tokens W with the dense weight, in fp64."""
    weight = each.dense.mT if transposed else each.dense
    return (tokens.double() @ weight).reshape(*tokens.shape[:-1], weight.shape[-1])


def sides(each: Case, transposed: bool) -> tuple[int, int]:
    """Sizes of what goes in and what comes out."""
    _, rows, cols = each.grid.matrix
    return (cols, rows) if transposed else (rows, cols)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("mask", MASKS)
@every_block_shape
@pytest.mark.parametrize("shape", list(SHAPES))
def test_masked_matmul(shape: str, block_shape: tuple[int, int], mask: str, num_tokens: int) -> None:
    each = case(shape, block_shape, mask)
    for transposed in (True, False):
        size_in, size_out = sides(each, transposed)
        x, bias = each.tokens(num_tokens, size_in), torch.randn(size_out, dtype=torch.float64)
        expected = product(each, x, transposed)
        plain = ops.masked_matmul(x, each.values(), *each.topology, transposed)
        biased = ops.masked_matmul(x, each.values(), *each.topology, transposed, bias)
        by_law = law.masked_matmul(x, each.values(), each.compact.active, transposed, bias)
        torch.testing.assert_close(plain, expected, **CLOSE)
        torch.testing.assert_close(biased, expected + bias, **CLOSE)
        torch.testing.assert_close(by_law, expected + bias, **CLOSE)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("mask", MASKS)
@every_block_shape
@pytest.mark.parametrize("shape", list(SHAPES))
def test_sampled_matmul(shape: str, block_shape: tuple[int, int], mask: str, num_tokens: int) -> None:
    each = case(shape, block_shape, mask)
    _, rows, cols = each.grid.matrix
    left, right = each.tokens(num_tokens, rows), each.tokens(num_tokens, cols)
    out = ops.sampled_matmul(left, right, *each.topology, each.compact.num_active)
    expected = each.gather(left.mT @ right)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(law.sampled_matmul(left, right, each.compact.active), expected, **CLOSE)


@pytest.mark.parametrize("offsets", list(OFFSETS))
@every_block_shape
@pytest.mark.parametrize("shape", ["stack", "ragged"])
def test_grouped(shape: str, block_shape: tuple[int, int], offsets: str) -> None:
    """Each token meets its own matrix; those past the last offset none, whatever they hold."""
    each = case(shape, block_shape)
    num_matrices, rows, cols = each.grid.matrix
    ends = OFFSETS[offsets][-num_matrices:]
    groups = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    ends_S = torch.tensor(ends, dtype=torch.int32)
    both = {size: torch.randn(20, size, dtype=torch.float64) for size in (rows, cols)}
    for tokens in both.values():
        tokens[ends[-1] :] = torch.nan
    left, right = both[rows], both[cols]
    for transposed in (True, False):
        size_in, size_out = sides(each, transposed)
        x, bias = both[size_in], torch.randn(size_out, dtype=torch.float64)
        expected = torch.zeros(20, size_out, dtype=torch.float64)
        for weight_RC, group in zip(each.dense, groups, strict=True):
            expected[group] = x[group] @ (weight_RC.mT if transposed else weight_RC)
        plain = ops.masked_matmul(x, each.values(), *each.topology, transposed, None, ends_S)
        biased = ops.masked_matmul(x, each.values(), *each.topology, transposed, bias, ends_S)
        by_law = law.masked_matmul(x, each.values(), each.compact.active, transposed, bias, ends_S)
        torch.testing.assert_close(plain, expected, **CLOSE)
        torch.testing.assert_close(biased, expected + bias, **CLOSE)
        torch.testing.assert_close(by_law, expected + bias, **CLOSE)
    expected = each.gather(torch.stack([left[group].mT @ right[group] for group in groups]))
    out = ops.sampled_matmul(left, right, *each.topology, each.compact.num_active, ends_S)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(law.sampled_matmul(left, right, each.compact.active, ends_S), expected, **CLOSE)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@every_block_shape
@pytest.mark.parametrize("shape", ["ragged", "stack"])
def test_precision(shape: str, block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    each = case(shape, block_shape)
    _, rows, cols = each.grid.matrix
    left, right = each.tokens(7, rows, dtype), each.tokens(7, cols, dtype)
    for transposed, x in ((True, right), (False, left)):
        bias = torch.randn(sides(each, transposed)[1]).to(dtype)
        out = ops.masked_matmul(x, each.values(dtype), *each.topology, transposed, bias)
        assert out.dtype == dtype
        assert relative_error(out, product(each, x, transposed) + bias.double()) < TOLERANCES[dtype]
    out = ops.sampled_matmul(left, right, *each.topology, each.compact.num_active)
    assert out.dtype == dtype
    assert relative_error(out, each.gather(left.double().mT @ right.double())) < TOLERANCES[dtype]


@both_ways
def test_sums_are_rounded_once(transposed: bool) -> None:
    """In bf16, a sum over many tiles is as good as its exact value rounded."""
    each = case("fitting", (3, 2), "all")
    x = each.tokens(64, sides(each, transposed)[0], torch.bfloat16)
    expected = product(each, x, transposed)
    out = ops.masked_matmul(x, each.values(torch.bfloat16), *each.topology, transposed)
    assert relative_error(out, expected) < 1.1 * relative_error(expected.bfloat16(), expected)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda x: x.mT.contiguous().mT,
    "every_second": lambda x: torch.stack((x, x.neg()), -1).flatten(-2)[..., ::2],
    "within_more": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "stack_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("strides", list(STRIDES))
@every_block_shape
@pytest.mark.parametrize("shape", ["ragged", "fitting", "stack"])
def test_strided_inputs(shape: str, block_shape: tuple[int, int], strides: str) -> None:
    each = case(shape, block_shape)
    _, rows, cols = each.grid.matrix
    left, right = each.tokens(7, rows), each.tokens(7, cols)
    strided_left, strided_right = STRIDES[strides](left), STRIDES[strides](right)
    assert torch.equal(strided_left, left) and not strided_left.is_contiguous()
    for transposed, x in ((True, strided_right), (False, strided_left)):
        out = ops.masked_matmul(x, each.values(), *each.topology, transposed)
        assert out.is_contiguous()
        torch.testing.assert_close(out, product(each, x, transposed), **CLOSE)
    out = ops.sampled_matmul(strided_left, strided_right, *each.topology, each.compact.num_active)
    assert out.is_contiguous()
    torch.testing.assert_close(out, each.gather(left.mT @ right), **CLOSE)


@pytest.mark.parametrize("number", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("block_shape", [(1, 8), (8, 1), *TILES], ids=str)
@pytest.mark.parametrize("shape", ["ragged", "stack"])
def test_what_hangs_over_an_edge_is_zero(shape: str, block_shape: tuple[int, int], number: float) -> None:
    each = case(shape, block_shape, "all")
    _, rows, cols = each.grid.matrix
    left, right = (torch.full_like(each.tokens(7, size), number) for size in (rows, cols))
    out = ops.sampled_matmul(left, right, *each.topology, each.compact.num_active)
    inside = each.gather(torch.ones_like(each.dense)) == 1
    assert bool((out[~inside] == 0).all()) and bool((out[inside] != 0).all())


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@every_tile
@pytest.mark.parametrize("shape", ["ragged", "fitting", "stack"])
def test_tiles_make_no_dense_matrix(
    monkeypatch: pytest.MonkeyPatch, shape: str, block_shape: tuple[int, int], grouped: bool
) -> None:
    """In plain torch no tensor as large as one matrix is made but the result: neither a weight nor a gradient."""
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
    each = case(shape, block_shape)
    num_matrices, rows, cols = each.grid.matrix
    ends_S = torch.arange(1, num_matrices + 1, dtype=torch.int32) if grouped else None
    left, right = torch.randn(num_matrices, rows), torch.randn(num_matrices, cols)
    if not grouped and num_matrices > 1:
        left, right = left[:, None], right[:, None]
    values = each.values(torch.float32)
    with Scratch() as scratch:
        ops.masked_matmul(right, values, *each.topology, True, None, ends_S)
        ops.masked_matmul(left, values, *each.topology, False, None, ends_S)
        grad = ops.sampled_matmul(left, right, *each.topology, each.compact.num_active, ends_S)
    sizes = {numel for dtype, numel in scratch.made if dtype.is_floating_point}
    assert grad.numel() in sizes and max(sizes - {grad.numel()}) < rows * cols


@pytest.mark.parametrize("noise_seed", [None, 3])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@every_block_shape
def test_sampled_update(block_shape: tuple[int, int], grouped: bool, noise_seed: int | None) -> None:
    """The bits are those of the product followed by the update."""
    each = case("stack", block_shape)
    _, rows, cols = each.grid.matrix
    ends_S = torch.tensor([3, 3, 11], dtype=torch.int32) if grouped else None
    dtype = torch.bfloat16 if noise_seed else torch.float32
    left, right = each.tokens(12, rows, torch.bfloat16), each.tokens(12, cols, torch.bfloat16)
    if grouped:
        left, right = left[0], right[0]
    num_active = each.compact.num_active
    births = torch.tensor([0, 2])
    ages = torch.arange(num_active) % 2
    numbers = settings(1.5, (0.9, 0.999, 1e-8, 0.1), 10, noise_seed)

    def rest(state: list[Tensor | None]) -> tuple[Any, ...]:
        return after_gradient(state, torch.tensor(0.1), (ages.byte(), births), each.topology, numbers)

    def state() -> list[Tensor | None]:
        moments = [torch.full_like(each.values(), 0.01, dtype=torch.float32) for _ in range(2)]
        return [*moments, None, torch.tensor(0), torch.tensor(3)]

    twice, once = each.values(dtype), each.values(dtype)
    state_of_twice, state_of_once = state(), state()
    grad = ops.sampled_matmul(left, right, *each.topology, num_active, ends_S)
    ops.update_(twice, grad.to(dtype), *rest(state_of_twice))
    ops.sampled_update_(once, left, right, ends_S, *rest(state_of_once))
    assert not same_bits(once, each.values(dtype)) and state_of_once[-1] == 4
    for a, b in zip([once, *state_of_once], [twice, *state_of_twice], strict=True):
        assert a is b is None or same_bits(a, b)
