"""The benchmark of switches runs, and counts no more bytes than need be."""

import pytest

from benchmarks.switching import run_all, width_for
from benchmarks.switching_on_paper import HEAD, rows
from tests.support.fresh_process import ROOT


def test_a_small_run() -> None:
    head, switched, files, ratio = run_all(megabytes=1, turns=1)
    assert "4 processes over gloo" in head and "1.000 of the fewest" in switched
    assert files.startswith("DCP on a memory disk") and ratio.startswith("save and load over a switch: ")


def test_the_width_follows_from_the_bytes() -> None:
    assert width_for(200) ** 2 * 8 * 0.25 * 12.25 / 1e6 == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_the_rows_of_7b_are_on_the_page(density: float) -> None:
    page = (ROOT / "docs/switching.md").read_text().splitlines()
    assert {*HEAD, *rows("7b", density)} <= set(page)
