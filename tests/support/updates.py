"""Makes arguments of the ops ``update_`` and ``sampled_update_``, by default for the rule of AdamW."""

from typing import Any

from torch import Tensor

import smet_compile.optim  # noqa: F401  registers the rules
from smet_compile.ops import updates

PLAIN = (None, None, "")
"""Stands for the topology of a parameter that has none."""


def settings(
    density_rate: float = 1.0,
    options: tuple[float, ...] = (0.9, 0.999, 1e-8, 0.0),
    warmup_steps: int = 0,
    noise_seed: int | None = None,
    rule: str = "adamw",
) -> updates.Settings:
    """Returns the numbers of an update."""
    return updates.Settings(rule, options, density_rate, warmup_steps, warmup_steps, noise_seed)


def after_gradient(
    state: list[Any],
    lr: Tensor,
    ages: tuple[Tensor | None, Tensor | None],
    topology: tuple[Any, ...],
    numbers: updates.Settings,
) -> tuple[Any, ...]:
    """Returns the arguments of an op that come after the gradient.

    Args:
        state: the slots, and then scales, num_skipped and step. ages: generation and births.
        topology: bits, lists and the text of the layout.
    """
    *slots, scales, num_skipped, step = state
    bits, lists, layout = topology
    text = numbers._replace(layout=layout).text()
    return slots, scales, num_skipped, step, lr, *ages, bits, lists, text
