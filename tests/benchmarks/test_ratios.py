"""Pairs, their ratios, and the tables that show them."""

import time
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.ratios import Clock, Pairs, in_turns
from benchmarks.tables import AWAITS_GPU, FOR_INFORMATION, Row, Table, at_least, at_most


def test_ratios_are_those_of_the_pairs_not_of_the_medians() -> None:
    pairs = Pairs((2.0, 30.0, 4.0), (1.0, 10.0, 1.0))
    assert pairs.speedups == [2, 3, 4]
    assert pairs.costs == [1 / 2, 1 / 3, 1 / 4]
    assert pairs.medians == (4, 1)


def test_a_sum_adds_what_belongs_to_the_same_turn() -> None:
    together = Pairs.of_sum([Pairs((1.0, 2.0), (10.0, 20.0)), Pairs((4.0, 8.0), (5.0, 6.0))])
    assert together == Pairs((5.0, 10.0), (15.0, 26.0))


class Counting:
    """A clock by which the n-th call that it measures takes n seconds."""

    def __init__(self) -> None:
        self.now = 0

    def seconds(self, work: Any) -> float:
        work()
        self.now += 1
        return float(self.now)


def test_turns_alternate_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    clock: Any = Counting()
    works = [partial(calls.append, name) for name in "abc"]
    pairs = in_turns(works[0], works[1:], 2, clock, warmup=1)
    assert "".join(calls) == "abc" * 3
    assert pairs == [Pairs((4.0, 7.0), (5.0, 8.0)), Pairs((4.0, 7.0), (6.0, 9.0))]


def test_the_clock_measures_seconds() -> None:
    assert 0.02 <= Clock(torch.device("cpu")).seconds(lambda: time.sleep(0.02)) < 2


@pytest.mark.parametrize(
    ("target", "ratio", "verdict"),
    [
        (at_least(2), 2.0, "yes"),
        (at_least(2), 1.5, "no, by 25%"),
        (at_most(1.1), 1.1, "yes"),
        (at_most(1.0), 1.25, "no, by 25%"),
    ],
)
def test_verdict(target: Any, ratio: float, verdict: str) -> None:
    assert target.verdict(ratio) == verdict


def test_the_median_is_what_is_compared_with_the_target() -> None:
    assert Row("", ratios=[1.0, 2.1, 9.0], target=at_least(2)).verdict == "yes"
    assert Row("", ratios=[1.9, 1.9, 9.0], target=at_least(2)).verdict.startswith("no")


def test_markdown() -> None:
    rows = [
        Row("one", "cpu_tiles", [2.0, 1.0, 4.0], at_least(1.5), {"bound": "3"}),
        Row("two", "torch", [2.0], more={"other": "x"}),
        Row("three", target=at_most(1), unmeasured=AWAITS_GPU),
    ]
    assert Table("Title", "a / b", "Note.", rows).markdown().splitlines() == [
        "### Title",
        "",
        "Note.",
        "",
        "| | kernel | a / b: median (least-largest) | target | met | bound | other |",
        "|---|---|---|---|---|---|---|",
        "| one | cpu_tiles | 2 (1-4) | ≥ 1.5 | yes | 3 | — |",
        f"| two | torch | 2 (2-2) | — | {FOR_INFORMATION} | — | x |",
        f"| three | — | — | ≤ 1 | {AWAITS_GPU} | — | — |",
    ]
