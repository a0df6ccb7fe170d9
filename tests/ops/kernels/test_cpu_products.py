"""Tests products and moves in C++ against the law in fp64: by tiles summed in registers, and through dense rows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.format import Topology
from smet_compile.ops import choose, law
from smet_compile.ops.kernels.native import expand, single, tiles
from smet_compile.ops.kernels.native.build import library
from tests.ops.kernels.cpu_cases import Weight, weight
from tests.ops.kernels.tolerances import assert_close
from tests.ops.matmul_cases import MASKS
from tests.support.pairs import pairwise
from tests.support.scratch import Scratch

pytestmark = [
    pytest.mark.skipif(library("tiles") is None, reason="there is no C++ compiler"),
    pytest.mark.usefixtures("new_memory_is_nan"),
]
DTYPES = [torch.float32, torch.bfloat16]
TILES = [  # sizes that are not multiples of anything; widths of part of a vector, of one, two and more
    ((37, 29), (8, 8)),
    ((70, 50), (16, 16)),
    ((130, 70), (16, 32)),
    ((65, 129), (32, 32)),
    ((50, 45), (24, 40)),
    ((200, 331), (64, 64)),
    ((300, 170), (128, 128)),
    ((11, 7), (3, 2)),
    ((60, 60), (3, 40)),
    ((3, 21, 29), (8, 16)),
    ((2, 90, 70), (64, 32)),
]
OTHERS = [((37, 29), (1, 1)), ((3, 70, 50), (1, 1)), ((64, 1030), (1, 1)), ((64, 48), (1, 16)), ((37, 29), (16, 1))]
SINGLE = [  # rows that begin within a byte; several chunks and pieces; runs over an edge, cut in two, of whole vectors
    ((37, 29), (1, 1)),
    ((3, 70, 50), (1, 1)),
    ((200, 1030), (1, 1)),
    ((400, 19), (1, 1)),
    ((64, 48), (1, 16)),
    ((3, 37, 29), (1, 8)),
    ((30, 850), (1, 40)),
    ((300, 850), (1, 16)),
    ((3, 137, 75), (1, 32)),
    ((70, 300), (1, 128)),
]


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def kernel(name: str, op: str, dtype: torch.dtype, each: Weight, grouped: bool = False) -> Callable[..., Any]:
    """Returns the function of the kernel ``name``; skips where the processor has none for ``dtype``."""
    module = {"cpu_tiles": tiles, "cpu_single": single, "cpu_expand": expand}[name]
    case = choose.Case(torch.device("cpu"), dtype, each.layout, each.topology.num_active, grouped)
    if (reason := module.refusal(case)) is not None:
        pytest.skip(f"{name} {reason}")
    function: Callable[..., Any] = getattr(module, op)
    return function


def check_masked(
    name: str, each: Weight, input: Tensor, transposed: bool, bias: Tensor | None, ends: Tensor | None
) -> None:
    function = kernel(name, "masked_matmul", input.dtype, each, ends is not None)
    out = function(input, each.values(input.dtype), each.topology, transposed, bias, ends)
    exact = None if bias is None else bias.double()
    expected = law.masked_matmul(input.double(), each.values(), each.topology, transposed, exact, ends)
    assert out.is_contiguous() and out.dtype == input.dtype
    assert_close("transposed" if transposed else "plain", out, expected)


def check_sampled(name: str, each: Weight, left: Tensor, right: Tensor, ends: Tensor | None) -> None:
    function = kernel(name, "sampled_matmul", left.dtype, each, ends is not None)
    out = function(left, right, each.topology, ends)
    assert_close("weight gradient", out, law.sampled_matmul(left.double(), right.double(), each.topology, ends))


KERNELS = [
    *(("cpu_tiles", *each) for each in TILES),
    *(("cpu_single", *each) for each in SINGLE),
    *(("cpu_expand", *each) for each in TILES + OTHERS),
]
every_kernel = pytest.mark.parametrize(("name", "size", "block_shape"), KERNELS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.mark.parametrize(
    ("kernel_and_dtype", "mask", "num_tokens"),
    pairwise(list(itertools.product(KERNELS, DTYPES)), MASKS, [0, 1, 37, 530]),
    ids=str,
)
def test_products(
    kernel_and_dtype: tuple[tuple[str, tuple[int, ...], tuple[int, int]], torch.dtype], mask: str, num_tokens: int
) -> None:
    """Every kernel in every dtype meets every mask, and every number of tokens."""
    (name, size, block_shape), dtype = kernel_and_dtype
    each = weight(size, block_shape, mask)
    rows, cols = each.layout.matrix
    x, gy = each.tokens(num_tokens, cols, dtype), each.tokens(num_tokens, rows, dtype)
    for bias in (None, torch.randn(rows).to(dtype)):
        check_masked(name, each, x, True, bias, None)
    check_masked(name, each, gy, False, None, None)
    check_sampled(name, each, gy, x, None)


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits_are_multiplied_in_fp32_where_the_processor_does_not(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiplies: bool
) -> None:
    monkeypatch.setattr(expand, "multiplies_on_cpu", lambda dtype: multiplies)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out, mm=torch.mm: (seen.append(a.dtype), mm(a, b, out=out))[1])
    each = weight((37, 29), (1, 1))
    x, gy = each.tokens(19, 29, dtype), each.tokens(19, 37, dtype)
    check_masked("cpu_expand", each, x, True, torch.randn(37).to(dtype), None)
    check_masked("cpu_expand", each, gy, False, None, None)
    check_sampled("cpu_expand", each, gy, x, None)
    assert set(seen) == {dtype if multiplies else torch.float32}


@pytest.mark.parametrize("block_shape", [(8, 16), (16, 8), (1, 1), (1, 8), (1, 16)], ids=str)
@pytest.mark.parametrize("ends", [[6, 13, 20], [0, 20, 20], [4, 4, 11], [0, 0, 0]], ids=str)
@every_dtype
@pytest.mark.parametrize("name", ["cpu_tiles", "cpu_single", "cpu_expand"])
def test_grouped_tokens(name: str, dtype: torch.dtype, ends: list[int], block_shape: tuple[int, int]) -> None:
    each = weight((3, 21, 29), block_shape)
    x, gy, ends_S = torch.randn(20, 29).to(dtype), torch.randn(20, 21).to(dtype), torch.tensor(ends, dtype=torch.int32)
    check_masked(name, each, x, True, torch.randn(21).to(dtype), ends_S)
    check_masked(name, each, gy, False, None, ends_S)
    check_sampled(name, each, gy, x, ends_S)


@every_dtype
@every_kernel
def test_strided_inputs(name: str, size: tuple[int, ...], block_shape: tuple[int, int], dtype: torch.dtype) -> None:
    each = weight(size, block_shape)
    rows, cols = each.layout.matrix
    x = each.tokens(19, 2 * cols + 5, dtype)[..., 3 : 3 + cols]
    gy = (
        each.tokens(rows, 19, dtype).mT
        if each.tokens(1, rows, dtype).dim() == 2
        else each.tokens(19, rows, dtype)[..., :]
    )
    check_masked(name, each, x, True, None, None)
    check_masked(name, each, gy, False, None, None)
    check_sampled(name, each, gy, x, None)


@pytest.mark.parametrize("size", [(40, 50), (2048, 96)], ids=str)
@every_dtype
def test_many_tokens(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """8192 tokens are several chunks in each product."""
    each = weight(size, (32, 32))
    x, gy = each.tokens(8192, size[1], dtype), each.tokens(8192, size[0], dtype)
    check_masked("cpu_tiles", each, x, True, None, None)
    check_masked("cpu_tiles", each, gy, False, None, None)
    check_sampled("cpu_tiles", each, gy, x, None)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("size", "num_tokens"), [((40, 50), 2100), ((1100, 2000), 3)], ids=str)
def test_single_weights_in_several_parts(size: tuple[int, int], num_tokens: int, num_threads: int) -> None:
    """2100 tokens are three groups of blocks, two million weights are listed in three goes."""
    each = weight(size, (1, 1), "all")
    x, gy = each.tokens(num_tokens, size[1], torch.float32), each.tokens(num_tokens, size[0], torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        check_masked("cpu_single", each, x, True, torch.randn(size[0]), None)
        check_masked("cpu_single", each, gy, False, None, None)
        check_sampled("cpu_single", each, gy, x, None)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("size", "block_shape"), TILES + OTHERS, ids=str)
def test_moves_are_exact(size: tuple[int, ...], block_shape: tuple[int, int], mask: str, dtype: torch.dtype) -> None:
    each = weight(size, block_shape, mask)
    values = each.values(dtype)
    dense = kernel("cpu_expand", "unpack", dtype, each)(values, each.topology)
    assert torch.equal(dense, each.dense.to(dtype).reshape(size))
    noise = torch.randn(size).to(dtype)
    packed = kernel("cpu_expand", "pack", dtype, each)(noise, each.topology)
    assert torch.equal(packed, each.gather(noise))


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("name", "block_shape"), [("cpu_tiles", (16, 16)), ("cpu_expand", (16, 16)), ("cpu_single", (1, 16))], ids=str
)
def test_what_hangs_over_an_edge_is_zero(name: str, block_shape: tuple[int, int], number: float) -> None:
    each = weight((37, 29), block_shape, "all")
    left, right = torch.full((5, 37), number), torch.full((5, 29), number)
    out = kernel(name, "sampled_matmul", torch.float32, each)(left, right, each.topology)
    inside = each.gather(torch.ones(37, 29)) == 1
    assert bool((out[~inside] == 0).all()) and not bool(out[inside].isfinite().any())


def test_no_dense_matrix_is_made() -> None:
    each = weight((256, 256), (32, 32))
    x, gy = each.tokens(3, 256, torch.float32), each.tokens(3, 256, torch.float32)
    values = each.values(torch.float32)
    with Scratch() as scratch:
        tiles.masked_matmul(x, values, each.topology, True)
        tiles.masked_matmul(gy, values, each.topology, False)
        tiles.sampled_matmul(gy, x, each.topology)
    assert max(numel for dtype, numel in scratch.made if dtype.is_floating_point) < 256 * 256


def every_function(each: Weight, x: Tensor, gy: Tensor, values: Tensor) -> list[Tensor]:
    """Returns what each function of the kernels that take fp32 makes."""
    topology, dense = each.topology, each.dense.float().reshape(each.grid.shape)
    results = [expand.unpack(values, topology), expand.pack(dense, topology)]
    for module in (expand, tiles if each.layout.tiles else single):
        results += [module.masked_matmul(x, values, topology, True), module.masked_matmul(gy, values, topology, False)]
        results.append(module.sampled_matmul(gy, x, topology))
    return results


@pytest.mark.parametrize("block_shape", [(1, 1), (8, 8)], ids=str)
def test_a_call_leaves_what_the_topology_keeps_as_it_was(block_shape: tuple[int, int]) -> None:
    each = weight((130, 70), block_shape)
    for num_tokens in (5, 3, 5):  # other tokens, other values, and again in fp64
        x, gy = each.tokens(num_tokens, 70, torch.float32), each.tokens(num_tokens, 130, torch.float32)
        values = torch.randn_like(each.values(torch.float32))
        fresh = Weight(each.grid, each.mask, each.dense, Topology.from_mask(each.mask, each.layout))
        found, expected = every_function(each, x, gy, values), every_function(fresh, x, gy, values)
        assert all(map(torch.equal, found, expected))
        check_masked("cpu_expand", each, x.double(), True, None, None)


def test_threads_share_what_the_topology_keeps() -> None:
    each = weight((130, 70), (8, 8))
    x, gy = each.tokens(5, 70, torch.float32), each.tokens(5, 130, torch.float32)
    inputs = [each.values(torch.float32) * factor for factor in (1.0, -2.0, 3.0, 5.0)]
    expected = [every_function(each, x, gy, values) for values in inputs]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            found = every_function(each, x, gy, inputs[number])
            if not all(map(torch.equal, found, expected[number])):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
