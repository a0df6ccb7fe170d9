"""The benchmark of switches runs, and counts no more bytes than need be."""

import pytest

from benchmarks.switching import run_all, width_for
from benchmarks.switching_on_paper import HEAD, rows
from tests.support.fresh_process import ROOT


def test_a_small_run() -> None:
    head, files, *of_ways = run_all(megabytes=1, turns=1)
    assert "4 processes over gloo" in head and files.startswith("DCP on a memory disk: save")
    for way, (counts, ratios) in zip(("pairs", "all_to_all"), (of_ways[:2], of_ways[2:]), strict=True):
        assert counts.startswith(f"{way}: prepared in") and "1.000 of the fewest" in counts
        assert ratios.startswith(f"{way}: save and load over the pause ")


def test_the_width_follows_from_the_bytes() -> None:
    assert width_for(200) ** 2 * 8 * 0.25 * 12.25 / 1e6 == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_the_rows_of_7b_are_on_the_page(density: float) -> None:
    page = (ROOT / "docs/switching.md").read_text().splitlines()
    assert {*HEAD, *rows("7b", density)} <= set(page)
