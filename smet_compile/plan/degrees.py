"""Degrees: how a size depends on batch and sequence, read off the shapes of one run.

The run is made with a batch and a sequence that are primes and divide no dimension of the model, so that every factor
of them in a shape comes from them: 11 sequences of 251 tokens make (2761, 4096) of hidden states, of degrees (1, 1).
Neither is 2 or 5, as many products as attention has in forward and backward, nor is the batch 7, as many pixels as
images are wide in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_LEAST_BATCH, _LEAST_SEQUENCE, _MOST_TRIED = 11, 7, 200


class Term(NamedTuple):
    """What multiplies a coefficient: batch ** ``batch`` * sequence ** ``sequence``, and the density if ``compact``."""

    batch: int
    sequence: int
    compact: bool = False


@dataclass(frozen=True)
class Degrees:
    """The batch and the sequence of a run. ``sequence`` is 1 where the model has none."""

    batch: int
    sequence: int

    def of(self, shape: Iterable[int]) -> tuple[float, Term]:
        """(coefficient, term) of the product of ``shape``. A length of s - 1 or s + 1 counts as s."""
        product, batches, sequences = 1.0, 0, 0
        for length in shape:
            length, times = _divide(_near(length, self.sequence), self.batch)
            batches += times
            length, times = _divide(_near(length, self.sequence), self.sequence)
            sequences += times
            product *= length
        return product, Term(batches, sequences)

    def of_product(self, product: int) -> tuple[float, Term]:
        """The same of a product alone."""
        rest, batches = _divide(product, self.batch)
        rest, sequences = _divide(rest, self.sequence)
        return float(rest), Term(batches, sequences)


def _divide(number: int, prime: int) -> tuple[int, int]:
    """(rest, times): ``number`` without its factors ``prime``, and how many there were."""
    times = 0
    while prime > 1 and number and number % prime == 0:
        number, times = number // prime, times + 1
    return number, times


def _near(length: int, sequence: int) -> int:
    """``sequence`` for one position more or less, as a loss of shifted labels has."""
    return sequence if sequence > 2 and abs(length - sequence) == 1 else length


def telling_degrees(sequence: int | None, dimensions: Iterable[int]) -> Degrees:
    """A batch, and a sequence near the wanted one, whose factors are told from the model's ``dimensions``.

    The sequence is shorter where possible: a model may not take longer ones.
    """
    taken = set(dimensions)
    telling = 1 if sequence is None else _telling(_down_then_up(sequence), taken, near=True)
    return Degrees(_telling(range(_LEAST_BATCH, _MOST_TRIED), taken | {telling}), telling)


def _down_then_up(start: int) -> Iterable[int]:
    yield from range(start, _LEAST_SEQUENCE - 1, -1)
    yield from range(max(start + 1, _LEAST_SEQUENCE), start + _MOST_TRIED)


def _telling(candidates: Iterable[int], taken: set[int], near: bool = False) -> int:
    for prime in candidates:
        around = (-1, 0, 1) if near else (0,)
        clear = all(length % prime for length in taken) and not any(prime + step in taken for step in around)
        if clear and all(prime % divisor for divisor in range(2, int(prime**0.5) + 1)):
            return prime
    raise AssertionError("among that many numbers there is a prime that divides none of a model's dimensions")
