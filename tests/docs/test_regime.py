"""The table of docs/choosing.md on sparse models and dense ones of as many bytes is what the planner computes."""

from __future__ import annotations

from benchmarks import regime
from tests.support.fresh_process import ROOT


def test_the_rows_are_on_the_page() -> None:
    page = (ROOT / "docs/choosing.md").read_text().splitlines()
    assert {*regime.HEAD, *regime.rows()} <= set(page)


def test_the_measured_share_is_on_the_page() -> None:
    share, low, high = regime.measured_share()
    page = (ROOT / "docs/choosing.md").read_text()
    assert f"Tiles kept {share:.2f} of the advantage" in page
    assert f"(95% interval {low:.2f} to {high:.2f}, five seeds)" in page
