"""Noise of rounding is uniform, and independent between places, blocks, steps, streams and seeds.

Seeds are fixed. Bounds are five standard errors of what independent uniform numbers would give.
"""

import functools

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import law
from smet_compile.ops.law_of_updates import Location

NUM_BLOCKS, NUM_PLACES = 64, 4096
NUM = NUM_BLOCKS * NUM_PLACES
FIVE_ERRORS = 5 / NUM**0.5
STREAMS = range(5)
"""Numbers of the streams: the weight's, and two pairs of slots, each pair with one hash."""
every_stream = pytest.mark.parametrize("stream", STREAMS)


@functools.cache
def noise(stream: int = 0, step: int = 7, first_block: int = 0, seed: int = 5, first_place: int = 0) -> Tensor:
    """Returns (blocks, places) int64, numbers of 16 bits."""
    blocks = torch.arange(first_block, first_block + NUM_BLOCKS)[:, None]
    keys = law.block_keys(law.noise_key(seed, torch.tensor(step)), blocks)
    return law.noise_bits(keys, torch.arange(first_place, first_place + NUM_PLACES), stream)


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack((x.reshape(-1), y.reshape(-1))).double())[0, 1].item()


def bits_of(x: Tensor) -> Tensor:
    """Returns (16, n) bool."""
    return (x.reshape(1, -1) >> torch.arange(16)[:, None] & 1).bool()


def assert_independent(x: Tensor, y: Tensor) -> None:
    """Compares the numbers, and each bit of one with each of the other: half of the pairs of bits are alike."""
    assert abs(correlation(x, y)) < FIVE_ERRORS
    a, b = (2.0 * bits_of(each) - 1 for each in (x, y))
    assert ((a @ b.mT) / a.shape[1]).abs().max() < 5 / a.shape[1] ** 0.5


@every_stream
def test_uniform(stream: int) -> None:
    x = noise(stream) / 2**16
    assert abs(x.mean() - (0.5 - 2**-17)) < FIVE_ERRORS * 12**-0.5
    assert abs(x.var() - 1 / 12) < FIVE_ERRORS * 180**-0.5
    counts = torch.bincount((noise(stream) >> 8).reshape(-1), minlength=256).double()
    chi_squared = ((counts - NUM / 256) ** 2 / (NUM / 256)).sum()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


@every_stream
def test_every_bit_is_balanced(stream: int) -> None:
    """Each is set in half of the numbers, of a block too, and any two of a number are independent."""
    bits = 2.0 * bits_of(noise(stream)) - 1
    together = bits @ bits.mT / NUM
    assert bits.mean(1).abs().max() < FIVE_ERRORS
    assert (together - torch.eye(16)).abs().max() < FIVE_ERRORS
    assert bits.view(16, NUM_BLOCKS, NUM_PLACES).mean(2).abs().max() < 5 / NUM_PLACES**0.5


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 64, 128, 1024])
@every_stream
def test_neighbouring_places(stream: int, distance: int) -> None:
    x = noise(stream)
    assert_independent(x[:, distance:], x[:, :-distance])


@pytest.mark.parametrize("distance", [1, 2, 4, 32, 2**16, 2**31, 2**32, 2**40])
@every_stream
def test_neighbouring_blocks(stream: int, distance: int) -> None:
    assert_independent(noise(stream), noise(stream, first_block=distance))


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@every_stream
def test_successive_steps(stream: int, steps: int) -> None:
    assert_independent(noise(stream), noise(stream, step=7 + steps))


@pytest.mark.parametrize("other", STREAMS)
@every_stream
def test_streams(stream: int, other: int) -> None:
    """Streams differ at one place, and at its neighbours."""
    if stream < other:
        assert_independent(noise(stream), noise(other))
    if stream != other:
        assert_independent(noise(stream), noise(other, first_place=1))


@every_stream
def test_seeds(stream: int) -> None:
    assert_independent(noise(stream), noise(stream, seed=6))


@every_stream
def test_one_place_over_many_steps(stream: int) -> None:
    """The noise of a single weight is uniform over time, and independent from step to step and of its neighbour."""
    steps = torch.arange(1, NUM // 4 + 1)
    keys = law.block_keys(law.noise_key(5, steps), torch.tensor(3))
    x, neighbour = (law.noise_bits(keys, torch.tensor(place), stream) for place in (17, 18))
    assert abs(x.double().mean() / 2**16 - 0.5) < 2 * FIVE_ERRORS * 12**-0.5
    assert abs(correlation(x[1:], x[:-1])) < 2 * FIVE_ERRORS
    assert abs(correlation(x, neighbour)) < 2 * FIVE_ERRORS


def test_sums_over_a_block_spread_as_those_of_independent_numbers() -> None:
    """The means of blocks vary by 1/12 over the number of places; a pattern in a block would show."""
    means = torch.cat([noise(step=step).double().mean(1) / 2**16 for step in range(40)])
    assert abs(means.var() * NUM_PLACES * 12 - 1) < 5 * (2 / len(means)) ** 0.5


def test_rounding_of_bfloat16_is_right_on_average() -> None:
    """The share of numbers that are rounded up is their part of the way to the next bf16; weight and moments alike."""
    for stream in range(3):
        for part in (2**-12, 0.1, 0.5, 0.9):
            x = torch.full((NUM,), 1 + part * 2**-7)
            up = law.round_stochastic(x, noise(stream).reshape(-1)) > 1
            exact = (x[0].double().item() - 1) * 2**7
            assert abs(up.double().mean() - exact) < 5 * (exact * (1 - exact) / NUM) ** 0.5


def test_golden_numbers() -> None:
    """The law is part of what makes runs repeatable: the numbers do not change unnoticed."""
    key = law.noise_key(1234, torch.tensor(56))
    keys = law.block_keys(key, torch.tensor([0, 2**33 + 7]))
    found = [law.noise_bits(keys, torch.tensor([3, 2**20 + 1]), stream).tolist() for stream in range(3)]
    assert found == [[30133, 49676], [20109, 17317], [25850, 13947]]


def test_noise_of_single_weights_follows_the_dense_position() -> None:
    """A single weight and an entry of a plain parameter at the same position have the same noise."""
    positions, key = torch.tensor([5, 2**16 - 1, 2**16, 2**32 + 3]), law.noise_key(3, torch.tensor(1))
    single = Location(positions, Layout.of((2**17, 2**16), (1, 1))).noise(key)
    plain = Location(positions, None).noise(key)
    assert torch.equal(single.bits(0), plain.bits(0))
    assert torch.equal(single.bits(0)[:1], law.noise_bits(law.block_keys(key, torch.tensor(0)), torch.tensor([5]), 0))
    assert torch.equal(
        single.bits(0)[3:], law.noise_bits(law.block_keys(key, torch.tensor(2**16)), torch.tensor(3), 0)[None]
    )


def test_noise_of_a_block_does_not_follow_its_row_in_memory() -> None:
    layout, key = Layout.of((3, 64, 96), (16, 32)), law.noise_key(3, torch.tensor(1))
    both = Location(torch.tensor([4, 30]), layout).noise(key).bits(1)
    alone = Location(torch.tensor([30]), layout).noise(key).bits(1)
    assert torch.equal(both[1:], alone) and not torch.equal(both[:1], alone)
