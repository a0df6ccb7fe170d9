"""Few combinations of parameters hold every pair of values that the full product holds."""

import itertools

import pytest

from tests.support.pairs import pairwise


@pytest.mark.parametrize("sizes", [(3, 4), (2, 2, 2), (1, 5, 3), (34, 2, 4, 4), (17, 2, 3, 2, 5)], ids=str)
def test_every_pair_occurs(sizes: tuple[int, ...]) -> None:
    rows = pairwise(*map(range, sizes))
    for (one, first), (other, second) in itertools.combinations(enumerate(sizes), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(range(first), range(second)))
    largest, second_largest = sorted(sizes)[-1:-3:-1]
    assert len(rows) == len(set(rows)) <= 1.3 * largest * second_largest
