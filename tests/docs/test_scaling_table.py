"""The tables of docs/scaling.md are what the planner computes."""

from __future__ import annotations

import importlib

import pytest

from tests.support.fresh_process import ROOT


def test_the_rows_of_7b_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs/figures")
    table = importlib.import_module("scaling_table")
    page = (ROOT / "docs/scaling.md").read_text().splitlines()
    found = table.costs("7b")
    assert set(table.rows("7b", found)) | {table.traffic_row("7b", found)} <= set(page)
    assert {*table.HEAD, *table.TRAFFIC_HEAD} <= set(page)


def test_the_rows_of_7b_in_parts_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs/figures")
    table = importlib.import_module("scaling_table")
    page = (ROOT / "docs/scaling.md").read_text().splitlines()
    assert {*table.rows_of_parts("7b"), *table.PARTS_HEAD, *table.PARTS_TRAFFIC_HEAD} <= set(page)
