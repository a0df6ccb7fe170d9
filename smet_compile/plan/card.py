"""Describes a card and its links, as far as the time of a training step depends on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smet_compile.format import arguments
from smet_compile.format.arguments import described
from smet_compile.plan.stored import parse_bytes

_PREFIXES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_MOST_CARDS = 2**20


@dataclass(frozen=True)
class Card:
    """Holds what a card does in a second at most. A model's own rates, as measured, make better estimates.

    Args:
        memory: the size of its memory, "80GB", or bytes.
        operations: floating-point operations a second of products in 16 bits.
        bandwidth: bytes a second to and from its memory.
        link: bytes a second that it sends to another machine, while it receives as many; 200 Gb/s are 25e9.
        operations_32: operations a second of products in 32 bits; None where they are as fast.
        near: (cards in a machine, bytes a second that one sends to another one there). None where each card is reached
            by ``link`` alone.
    """

    memory: str | float
    operations: float
    bandwidth: float
    link: float
    operations_32: float | None = None
    near: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        parse_bytes("memory", self.memory)
        rates = {name: getattr(self, name) for name in ("operations", "bandwidth", "link", "operations_32")}
        if self.operations_32 is None:
            del rates["operations_32"]
        for name, rate in rates.items():
            arguments.number(name, rate, above=0, advice="pass operations or bytes a second")
        if self.near is not None:
            if not isinstance(self.near, tuple) or len(self.near) != 2:
                raise ValueError(
                    f"near: expected (cards in a machine, bytes a second between them), got {described(self.near)}; "
                    "pass (8, 450e9), say"
                )
            arguments.whole_number("near[0]", self.near[0], at_least=1, at_most=_MOST_CARDS)
            arguments.number("near[1]", self.near[1], above=0, advice="pass bytes a second")

    @property
    def memory_bytes(self) -> int:
        return parse_bytes("memory", self.memory)

    def rate(self, itemsize: int) -> float:
        """Returns the operations a second of products of numbers that take so many bytes."""
        return self.operations_32 if self.operations_32 is not None and itemsize >= 4 else self.operations

    def link_among(self, num_ranks: int) -> float:
        """Returns the bytes a second from one rank to any other, where there are so many ranks."""
        return self.near[1] if self.near is not None and num_ranks <= self.near[0] else self.link

    def seconds_to_send(self, num_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """Returns the seconds of a ring among ``num_ranks`` of which each sends so many bytes.

        Ranks of the ring are ``stride`` apart, and those of a machine follow one another. A ring enters and leaves each
        machine once, and the ranks that it has there share their links to others.
        """
        per_machine, near_link = self.near or (1, math.inf)
        num_near = min(num_ranks, max(1, per_machine // stride))
        if num_near == num_ranks:
            return num_bytes / near_link
        return num_bytes / min(near_link, num_near * self.link)


CARDS = {
    "a100": Card("80GB", 312e12, 2.039e12, 25e9, operations_32=19.5e12, near=(8, 300e9)),
    "h100": Card("80GB", 989.4e12, 3.35e12, 50e9, operations_32=66.9e12, near=(8, 450e9)),
    "h200": Card("141GB", 989.4e12, 4.8e12, 50e9, operations_32=66.9e12, near=(8, 450e9)),
}
"""Rates of the data sheets (SXM, without 2:4 sparsity), eight in a machine with a network card each: 200 or 400 Gb/s.

In 32 bits they are those without TF32, which torch does not use by default.
"""


def find_card(card: object) -> Card:
    """Returns a card by its name, or one that is given; raises ValueError for anything else."""
    if isinstance(card, Card):
        return card
    if isinstance(card, str) and card in CARDS:
        return CARDS[card]
    raise ValueError(
        f"card: expected one of {', '.join(CARDS)} or a Card, got {described(card)}; describe yours by "
        'smet_compile.distributed.Card("24GB", operations=..., bandwidth=..., link=...)'
    )


def seconds_text(seconds: float) -> str:
    """Returns a text such as "12.3 ms" for 0.0123."""
    unit, name = next((each for each in _PREFIXES if abs(seconds) >= each[0] * 0.9995), _PREFIXES[-1])
    value = seconds / unit
    digits = 0 if value == 0 else max(0, 3 - len(str(round(abs(value)))))
    return f"{value:,.{digits}f} {name}"
