"""Chooses few combinations of test parameters: each two values of two axes meet in at least one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

_Pair = tuple[tuple[int, int], tuple[int, int]]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns rows with one value of each of two or more axes, in which every pair of values of two axes occurs.

    A mistake nearly always shows with one value, or with two that meet. The full product of four axes repeats each
    such meeting many times; these rows repeat few. They are the same rows in every process.
    """
    ends = [[(axis, value) for value in range(len(values))] for axis, values in enumerate(axes)]
    missing = dict.fromkeys(
        pair for one, other in itertools.combinations(ends, 2) for pair in itertools.product(one, other)
    )
    uses: Counter[tuple[int, int]] = Counter()
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for axis in sorted(set(range(len(axes))) - row.keys(), key=lambda axis: -len(axes[axis])):
            chosen = max(ends[axis], key=lambda end: (sum(pair in missing for pair in _pairs(end, row)), -uses[end]))
            row[axis] = chosen[1]
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        uses.update(row.items())
        rows.append(tuple(values[row[axis]] for axis, values in enumerate(axes)))
    return rows


def _pairs(end: tuple[int, int], row: dict[int, int]) -> list[_Pair]:
    return [(min(end, other), max(end, other)) for other in row.items()]
