"""Who is ahead at equal bytes and at equal time, by arithmetic on the scaling law."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from smet_compile.plan.advantage import Advantage
from smet_compile.plan.scaling_law import density_factor, predict_loss

DENSE = 1e9
BYTES_OF_A_WEIGHT = 12
"""fp32 weights and moments, no gradient. Single weights add a bit for each dense weight, and a byte of age."""
DENSITIES, PER_WEIGHT, EFFICIENCIES = (0.5, 0.25, 0.1), (5, 20, 100, 1000), (0.3, 0.5, 0.7, 0.9)


def as_many_active(density: float, per_weight: float, efficiency: float, more_bytes: float = 0.0) -> Advantage:
    """Compares with a dense model of 1B weights in the time in which it reads so many tokens for each of them."""
    active = DENSE * BYTES_OF_A_WEIGHT / (BYTES_OF_A_WEIGHT + more_bytes)
    return Advantage(active / density, density, DENSE, efficiency * per_weight * DENSE, 1 / efficiency)


def test_the_losses_are_those_of_the_law() -> None:
    one = Advantage(4e9, 0.25, 1e9, 14e9, 10 / 7)
    assert one.sparse_loss == predict_loss(4e9, 14e9, 0.25)
    assert one.dense_loss == predict_loss(1e9, 14e9)
    assert one.dense_tokens_in_time == pytest.approx(20e9)
    assert one.dense_loss_in_time == pytest.approx(predict_loss(1e9, 20e9))
    assert one.at_equal_tokens == pytest.approx(one.dense_loss - one.sparse_loss)
    assert one.at_equal_time == pytest.approx(one.dense_loss_in_time - one.sparse_loss)


def test_an_advantage_by_hand() -> None:
    """As many active weights: A / N^α = 0.2161 times 1 - 0.7996, at any number of tokens."""
    for per_weight in PER_WEIGHT:
        assert as_many_active(0.25, per_weight, 0.7).at_equal_tokens == pytest.approx(0.2161 * (1 - 0.7996), abs=2e-4)
    assert density_factor(0.25) == pytest.approx(0.7996, abs=1e-4)


@pytest.mark.parametrize(("per_weight", "share"), [(20, 0.65), (100, 0.38)])
def test_the_known_shares_of_1b(per_weight: float, share: float) -> None:
    """Density .25, tiles at .7, and single weights that store their index and ages in the same bytes."""
    index_and_ages = 0.125 / 0.25 + 1
    assert as_many_active(0.25, per_weight, 0.7, index_and_ages).break_even_share == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(("per_weight", "share"), [(20, 0.549), (100, 0.324)])
def test_the_shares_of_as_many_single_weights(per_weight: float, share: float) -> None:
    assert as_many_active(0.25, per_weight, 0.7).break_even_share == pytest.approx(share, abs=5e-4)


def test_shares_depend_on_tokens_per_weight_alone() -> None:
    small = Advantage(4e8, 0.25, 1e8, 1.4e9, 10 / 7)
    assert small.break_even_share == pytest.approx(as_many_active(0.25, 20, 0.7).break_even_share)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("per_weight", PER_WEIGHT)
@pytest.mark.parametrize("efficiency", EFFICIENCIES)
def test_break_even_is_where_the_sign_changes(density: float, per_weight: float, efficiency: float) -> None:
    one = as_many_active(density, per_weight, efficiency)
    assert (one.at_equal_time > 0) == (one.time_ratio < one.break_even_time)
    assert (one.at_equal_time > 0) == (one.break_even_share < 1)
    assert (one.at_equal_time > 0) == (one.tokens > one.tokens_to_break_even)
    assert (one.at_equal_time > 0) == (one.dense_time_to_loss > 1)
    reached = one.dense_time_to_loss * one.dense_tokens_in_time
    assert predict_loss(one.dense_weights, reached) == pytest.approx(one.sparse_loss)
    assert replace(one, time_ratio=one.break_even_time).at_equal_time == pytest.approx(0, abs=1e-12)
    assert replace(one, tokens=one.tokens_to_break_even).at_equal_time == pytest.approx(0, abs=1e-12)
    kept = one.dense_loss - one.break_even_share * one.at_equal_tokens
    assert kept == pytest.approx(one.dense_loss_in_time)


@pytest.mark.parametrize("density", DENSITIES)
def test_more_tokens_and_faster_tiles_help_sparse(density: float) -> None:
    for efficiency in EFFICIENCIES:
        shares = [as_many_active(density, each, efficiency).break_even_share for each in PER_WEIGHT]
        assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)
    for per_weight in PER_WEIGHT:
        shares = [as_many_active(density, per_weight, each).break_even_share for each in EFFICIENCIES]
        assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)


def test_sparse_that_is_as_fast_has_nothing_to_keep() -> None:
    for ratio in (0.8, 1.0):
        one = Advantage(4e9, 0.25, 1e9, 14e9, ratio)
        assert (one.break_even_share, one.tokens_to_break_even) == (0, 0)
    assert one.at_equal_time == pytest.approx(one.at_equal_tokens)


def test_without_an_advantage_there_is_nothing_to_keep_enough_of() -> None:
    """Half as many active weights as the dense model has."""
    one = Advantage(2e9, 0.25, 1e9, 14e9, 10 / 7)
    assert one.at_equal_tokens < 0
    assert (one.break_even_share, one.tokens_to_break_even) == (math.inf, math.inf)
    assert one.break_even_time < 1


def test_dense_may_never_catch_up() -> None:
    """More tokens bring the dense model nearer to its limit, which the sparse one has passed."""
    one = Advantage(4e9, 0.25, 1e9, 1e14, 100.0)
    assert one.break_even_time == one.dense_time_to_loss == math.inf and one.at_equal_time > 0
