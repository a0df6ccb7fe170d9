"""Timeline: what is in memory beside parameters and optimizer state, state after state of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from smet_compile.plan.degrees import Term

Amount = Mapping[Term, float]
"""Bytes (or operations) as a polynomial in batch, sequence and density: term → coefficient."""


@dataclass(frozen=True)
class Point:
    """Where a polynomial is evaluated. ``compact``: the density beside that of the run it was read from."""

    batch: int
    sequence: int
    compact: float = 1.0

    def value(self, amount: Amount) -> float:
        return sum(
            coefficient * self.batch**term.batch * self.sequence**term.sequence * (self.compact if term.compact else 1)
            for term, coefficient in amount.items()
        )


@dataclass
class Timeline:
    """Grows by ``add`` and ``remove`` while a step is followed.

    Args:
        saved: what is held between forward and backward. states: after each thing that was made, in order.
        made: what that was.
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

    def halves(self) -> tuple[Half, Half]:
        """Forward and backward."""
        cut = self.backward_from
        return Half(self.states[:cut], self.made[:cut]), Half(self.states[cut:], self.made[cut:])


class Half(NamedTuple):
    """States of a forward or a backward, and what was made to reach each of them."""

    states: list[dict[Term, float]]
    made: list[tuple[float, Term]]


def _num_same(mine: list[tuple[float, Term]], other: list[tuple[float, Term]]) -> int:
    pairs = zip(mine, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))


@dataclass(frozen=True)
class Stack:
    """The timeline of a model whose layers repeat, from those of models with fewer of them.

    In equal layers one after another, memory is fullest in the first or in the last. Both are in a model of two layers,
    and change by the same amount with each layer more.

    Args:
        fewest: of the model with the fewest layers. longer: how many layers more the whole model has, and the timeline
            of the model with one of them more; for each list of layers.
    """

    fewest: Timeline
    longer: list[tuple[int, Timeline]] = field(default_factory=list)

    @property
    def saved(self) -> Amount:
        return _extended(self.fewest.saved, [(extra, timeline.saved) for extra, timeline in self.longer])

    def fullest(self, point: Point) -> Amount:
        """What is in memory at the fullest moment."""
        others = [timeline.halves() for _, timeline in self.longer]
        found: Amount = {}
        for number, half in enumerate(self.fewest.halves()):
            halves = [other[number] for other in others]
            partners = [self._partners(half, other) for other in halves]
            for i, state in enumerate(half.states):
                more = []
                for (extra, _), other, partner in zip(self.longer, halves, partners, strict=True):
                    more.append((extra, max((other.states[k] for k in partner[i]), key=point.value)))
                found = max(found, _extended(state, more), key=point.value)
        return found

    @staticmethod
    def _partners(half: Half, other: Half) -> list[list[int]]:
        first = _num_same(half.made, other.made)
        last = _num_same(half.made[::-1], other.made[::-1])
        more = len(other.made) - len(half.made)
        found = []
        for i in range(len(half.made)):
            near_end = len(half.made) - i <= last or i >= first
            found.append([i] * (i < first) + [i + more] * near_end)
        return found


def _extended(fewest: Amount, longer: Sequence[tuple[int, Amount]]) -> Amount:
    """``fewest`` and what each layer more adds to it."""
    parts = [(1, fewest)]
    for extra, amount in longer:
        parts += [(extra, amount), (-extra, fewest)]
    return weighted_sum(parts)


def weighted_sum(parts: Iterable[tuple[int, Amount]]) -> Amount:
    """The sum of factor times amount."""
    total: dict[Term, float] = {}
    for factor, amount in parts:
        for term, coefficient in amount.items():
            total[term] = total.get(term, 0.0) + factor * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient}
