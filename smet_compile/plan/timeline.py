"""Describes memory during a training step as polynomials in batch, sequence and density, moment after moment.

The polynomials are read off the shapes of one run. Its batch and its sequence are primes that divide no dimension of
the model, so every factor of them in a shape comes from them: 11 sequences of 251 tokens make hidden states of shape
(2761, 4096), which grow with batch * sequence. Neither prime is 2 or 5, the numbers of products that attention has in
forward and backward, and the batch is not 7, the number of pixels that images are wide in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_LEAST_BATCH, _LEAST_SEQUENCE, _NUM_TRIED = 11, 7, 200


class Term(NamedTuple):
    """Multiplies a coefficient by batch ** ``batch`` * sequence ** ``sequence``, and by the density if ``compact``."""

    batch: int
    sequence: int
    compact: bool = False


Amount = Mapping[Term, float]
"""Maps each term to its coefficient: bytes or operations as a polynomial."""


@dataclass(frozen=True)
class Degrees:
    """Finds the batch and the sequence of a run again in shapes. ``sequence`` is 1 where the model has none."""

    batch: int
    sequence: int

    def of_shape(self, shape: Iterable[int]) -> tuple[float, Term]:
        """Returns (coefficient, term) of the product of ``shape``. A length of s - 1 or s + 1 counts as s."""
        product, batches, sequences = 1.0, 0, 0
        for length in shape:
            length, times = _divide(_nearby(length, self.sequence), self.batch)
            batches += times
            length, times = _divide(_nearby(length, self.sequence), self.sequence)
            sequences += times
            product *= length
        return product, Term(batches, sequences)

    def of_product(self, product: int) -> tuple[float, Term]:
        """Returns (coefficient, term) of a number whose factors are not known one by one."""
        rest, batches = _divide(product, self.batch)
        rest, sequences = _divide(rest, self.sequence)
        return float(rest), Term(batches, sequences)


def choose_degrees(sequence: int | None, dimensions: Iterable[int]) -> Degrees:
    """Chooses a batch, and a sequence near the wanted one, whose factors do not occur in the model's ``dimensions``.

    The sequence is shorter than the wanted one where possible, because a model may not take longer ones.
    """
    taken = set(dimensions)
    chosen = 1 if sequence is None else _distinct_prime(_down_then_up(sequence), taken, near=True)
    return Degrees(_distinct_prime(range(_LEAST_BATCH, _NUM_TRIED), taken | {chosen}), chosen)


def _divide(number: int, prime: int) -> tuple[int, int]:
    """Returns (rest, times): ``number`` without its factors ``prime``, and how many there were."""
    times = 0
    while prime > 1 and number and number % prime == 0:
        number, times = number // prime, times + 1
    return number, times


def _nearby(length: int, sequence: int) -> int:
    """Returns ``sequence`` for a length of one position more or less, as a loss of shifted labels has."""
    return sequence if sequence > 2 and abs(length - sequence) == 1 else length


def _down_then_up(start: int) -> Iterable[int]:
    yield from range(start, _LEAST_SEQUENCE - 1, -1)
    yield from range(max(start + 1, _LEAST_SEQUENCE), start + _NUM_TRIED)


def _distinct_prime(candidates: Iterable[int], taken: set[int], near: bool = False) -> int:
    for prime in candidates:
        around = (-1, 0, 1) if near else (0,)
        distinct = all(length % prime for length in taken) and not any(prime + step in taken for step in around)
        if distinct and all(prime % divisor for divisor in range(2, int(prime**0.5) + 1)):
            return prime
    raise AssertionError("among that many numbers there is a prime that divides none of a model's dimensions")


@dataclass(frozen=True)
class Point:
    """Evaluates polynomials at a batch, a sequence and a density.

    Args:
        density_ratio: the density divided by the density of the run that the polynomials were read from.
    """

    batch: int
    sequence: int
    density_ratio: float = 1.0

    def value(self, amount: Amount) -> float:
        return sum(
            coefficient
            * self.batch**term.batch
            * self.sequence**term.sequence
            * (self.density_ratio if term.compact else 1)
            for term, coefficient in amount.items()
        )


class Phase(NamedTuple):
    """Holds the states of memory in forward or backward, and the (bytes, term) that was made to reach each of them."""

    states: list[dict[Term, float]]
    made: list[tuple[float, Term]]


@dataclass
class Timeline:
    """Records what is in memory beside parameters and optimizer state while a step is followed.

    Args:
        now: what is in memory at present. states: what was in memory after each tensor was made.
        made: (bytes, term) of these tensors. saved: what forward left for backward.
        backward_from: the number of states when backward began.
    """

    now: dict[Term, float] = field(default_factory=dict)
    states: list[dict[Term, float]] = field(default_factory=list)
    made: list[tuple[float, Term]] = field(default_factory=list)
    saved: dict[Term, float] = field(default_factory=dict)
    backward_from: int = 0

    def add(self, bytes: float, term: Term) -> None:
        self.now[term] = self.now.get(term, 0.0) + bytes
        self.states.append(dict(self.now))
        self.made.append((bytes, term))

    def remove(self, bytes: float, term: Term) -> None:
        self.now[term] -= bytes

    def begin_backward(self) -> None:
        self.saved, self.backward_from = dict(self.now), len(self.states)

    def phases(self) -> tuple[Phase, Phase]:
        """Returns forward and backward."""
        cut = self.backward_from
        return Phase(self.states[:cut], self.made[:cut]), Phase(self.states[cut:], self.made[cut:])


@dataclass(frozen=True)
class LayeredTimeline:
    """Computes the timeline of a model whose layers repeat from those of models with fewer layers.

    In equal layers one after another, memory is fullest in the first or in the last. Both are in a model of two layers,
    and each further layer changes them by the same amount.

    Args:
        fewest: the timeline of the model with the fewest layers.
        longer: (number of layers that the whole model has more, timeline of the model with one of them more), for
            each list of layers.
    """

    fewest: Timeline
    longer: list[tuple[int, Timeline]] = field(default_factory=list)

    @property
    def saved(self) -> Amount:
        return _extended(self.fewest.saved, [(extra, timeline.saved) for extra, timeline in self.longer])

    def fullest(self, point: Point) -> Amount:
        """Returns what is in memory at the fullest moment."""
        others = [timeline.phases() for _, timeline in self.longer]
        found: Amount = {}
        for number, phase in enumerate(self.fewest.phases()):
            longer = [other[number] for other in others]
            partners = [_partners(phase, other) for other in longer]
            for i, state in enumerate(phase.states):
                more = []
                for (extra, _), other, partner in zip(self.longer, longer, partners, strict=True):
                    more.append((extra, max((other.states[k] for k in partner[i]), key=point.value)))
                found = max(found, _extended(state, more), key=point.value)
        return found


def _partners(phase: Phase, longer: Phase) -> list[list[int]]:
    """Returns, for each state of ``phase``, the states of ``longer`` that may be the same moment.

    Moments before the additional layer have the same number, moments after it the same number counted from the end.
    """
    same_begin = _num_same(phase.made, longer.made)
    same_end = _num_same(phase.made[::-1], longer.made[::-1])
    more = len(longer.made) - len(phase.made)
    found = []
    for i in range(len(phase.made)):
        near_end = len(phase.made) - i <= same_end or i >= same_begin
        found.append([i] * (i < same_begin) + [i + more] * near_end)
    return found


def _num_same(first: list[tuple[float, Term]], second: list[tuple[float, Term]]) -> int:
    """Returns the length of the beginning that two lists share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _extended(fewest: Amount, longer: Sequence[tuple[int, Amount]]) -> Amount:
    """Returns ``fewest`` and what each further layer adds to it."""
    parts = [(1, fewest)]
    for extra, amount in longer:
        parts += [(extra, amount), (-extra, fewest)]
    return weighted_sum(parts)


def weighted_sum(parts: Iterable[tuple[int, Amount]]) -> Amount:
    """Returns the sum of factor times amount."""
    total: dict[Term, float] = {}
    for factor, amount in parts:
        for term, coefficient in amount.items():
            total[term] = total.get(term, 0.0) + factor * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient}
