"""Carries what each share of the data has for itself: random states, places in the data, gradients for growth.

The ranks that read share d of the data have stream d. As long as the number of shares stays, every stream goes on, and
a run with dropout draws what it would have drawn. Where there are fewer shares, the last streams end; where there are
more, the new ones begin with a seed that follows from the first stream.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Stream:
    """Holds the random states of a rank, by their kind, and the states of further objects, by name.

    Args:
        collected: what the manager's policies have collected on this rank before an update; None where all ranks have
            the same.
    """

    random: dict[str, Any]
    others: dict[str, Any]
    collected: Any = None

    @classmethod
    def of(cls, others: Mapping[str, Any], device_type: str, collected: Any = None) -> Stream:
        """Returns that of this rank."""
        states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
        if "numpy" in sys.modules:
            states["numpy"] = sys.modules["numpy"].random.get_state()
        if device_type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return cls(states, {name: each.state_dict() for name, each in others.items()}, collected)

    def resume(self) -> None:
        """Sets the random states of this process."""
        torch.set_rng_state(self.random["cpu"])
        random.setstate(self.random["python"])
        if "numpy" in self.random and "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(self.random["numpy"])
        if "cuda" in self.random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.random["cuda"])


def resume(streams: Mapping[int, Stream], number: int, count: int, others: Mapping[str, Any]) -> None:
    """Gives this rank its random states, and further objects their state.

    Args:
        streams: those of the run so far, by share of the data. number, count: which share this rank reads now, and
            of how many. others: they get what the same share had if the number of shares is the same, else what the
            first had.
    """
    first = streams[0]
    if number in streams:
        streams[number].resume()
    else:
        seed = zlib.crc32(first.random["cpu"].numpy().tobytes(), number)
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
    of = streams[number] if len(streams) == count else first
    for name, each in others.items():
        each.load_state_dict(of.others[name])
