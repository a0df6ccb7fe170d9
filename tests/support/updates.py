"""Makes arguments of the ops ``update_`` and ``sampled_update_``, by default for the rule of AdamW."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

PLAIN = (None, None, "")
"""Stands for the topology of a parameter that has none."""


@dataclass(frozen=True)
class Settings:
    """The numbers of an update."""

    density_rate: float = 1.0
    options: tuple[float, ...] = (0.9, 0.999, 1e-8, 0.0)
    warmup_steps: int = 0
    noise_seed: int | None = None
    rule: str = "adamw"


def after_gradient(
    state: list[Any],
    lr: Tensor,
    ages: tuple[Tensor | None, Tensor | None],
    topology: tuple[Any, ...],
    numbers: Settings,
) -> tuple[Any, ...]:
    """Returns the arguments of an op that come after the gradient.

    Args:
        state: the slots, and then scales, num_skipped and step. ages: generation and births.
        topology: bits, lists and the text of the layout.
    """
    *slots, scales, num_skipped, step = state
    return (
        slots, scales, num_skipped, step, lr, *ages, *topology, False, numbers.rule, list(numbers.options),
        numbers.density_rate, numbers.warmup_steps, numbers.noise_seed,
    )  # fmt: skip
