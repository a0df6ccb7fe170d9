"""The figure of sparse models beside dense ones of as many bytes: its points, and the measured share of tiles."""

from __future__ import annotations

import math
import statistics

import pytest

from benchmarks import regime
from benchmarks.studies.reports.interval import interval


@pytest.mark.parametrize("density", regime.DENSITIES)
@pytest.mark.parametrize("per_weight", [5, 20, 60])
def test_a_line_of_the_figure_is_where_neither_is_ahead(density: float, per_weight: float) -> None:
    found = regime.planned(regime.SIZE, density, regime.TILE)
    efficiency = regime.break_even_efficiency(found, per_weight)
    assert regime.at_time(found, per_weight, efficiency).at_equal_time == pytest.approx(0, abs=1e-9)
    assert regime.at_time(found, per_weight, efficiency).break_even_share == pytest.approx(1)
    assert regime.at_time(found, per_weight, 1.1 * efficiency).at_equal_time > 0
    assert regime.at_time(found, per_weight, 0.9 * efficiency).at_equal_time < 0


@pytest.mark.parametrize("efficiency", regime.EFFICIENCIES)
def test_a_time_is_that_of_the_dense_model(efficiency: float) -> None:
    found = regime.at_time(regime.planned(regime.SIZE, 0.25, regime.TILE), 20, efficiency)
    assert found.dense_tokens_in_time == pytest.approx(20 * found.dense_weights)


def test_single_weights_break_even_at_the_number_of_the_table() -> None:
    found = regime.planned(regime.SIZE, 0.5, 1)
    least = regime.least_tokens_per_weight(found)
    assert regime.at_time(found, least, None).at_equal_time == pytest.approx(0, abs=1e-9)
    assert regime.at_time(found, 1.1 * least, None).at_equal_time > 0


def test_the_share_of_constant_pairs_is_exact() -> None:
    """Every seed keeps half, so that the interval is that half, whatever the advantage of a seed."""
    share, low, high = regime.share_with_interval([1.0, 2.0, 1.5], [2.0, 4.0, 3.0])
    assert (share, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_ends_of_the_interval_are_shares_that_a_test_just_allows() -> None:
    kept, whole = [0.09, 0.05, 0.12, 0.07, 0.10], [0.10, 0.08, 0.11, 0.09, 0.12]
    share, low, high = regime.share_with_interval(kept, whole)
    assert share == pytest.approx(statistics.fmean(kept) / statistics.fmean(whole)) and low < share < high
    for end in (low, high):
        rest = interval([one - end * other for one, other in zip(kept, whole, strict=True)])
        assert abs(rest.mean) == pytest.approx(rest.half)


def test_no_interval_where_there_may_be_no_advantage() -> None:
    _, low, high = regime.share_with_interval([0.1, -0.1, 0.2], [0.3, -0.2, 0.1])
    assert (low, high) == (-math.inf, math.inf)


def test_the_share_of_the_records_is_that_of_the_study_page() -> None:
    """Dense of N weights is 0.0863 above tiles and 0.0965 above single weights (docs/results/topology.md)."""
    share, low, high = regime.measured_share()
    assert share == pytest.approx(0.0863 / 0.0965, abs=0.002) and 0 < low < share < high


def test_the_figure_has_five_panels_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regime, "SIZES", ("130m", "1b"))
    axes = regime.draw().axes
    assert len(axes) == 5 and all(each.get_xlabel() and each.get_title() for each in axes)
    rights = {round(float(line.get_ydata()[-1]), 3) for line in axes[3].lines if len(line.get_xdata()) > 2}
    found = regime.planned(regime.SIZE, 0.25, regime.TILE)
    assert rights == {round(regime.at_time(found, 1000, each).break_even_share, 3) for each in regime.EFFICIENCIES}
