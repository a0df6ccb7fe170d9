"""Turns densities into numbers of active blocks: how they are shared out, and in which stages a run goes through them.

The densities of stages are those of all compact weights together. Weights of one density keep to one density, rounded
as ``sparsify`` rounds. Others keep their shares, the total exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smet_compile.format.arguments import described, number, whole_number
from smet_compile.format.layout import Layout

DensitySchedule = Sequence[tuple[int, float]]


class Stage(NamedTuple):
    """Says that the model has this density from the optimizer step ``step`` on."""

    step: int
    density: float


def cubic_density(
    first: float, last: float, *, begin: int = 0, end: int, num_stages: int = 5
) -> list[tuple[int, float]]:
    """Returns a density schedule that is steep at first, as gradual magnitude pruning (arXiv 1710.01878) is.

    Stage k of n is at step begin + (end - begin) k / n and has the density last + (first - last) (1 - k / n)³. So the
    model keeps the density ``first`` until the first stage, and has ``last`` from ``end`` on.

    Args:
        first: the density that the model begins with.
        last: the density of the last stage; it may be the larger one.
        begin: the optimizer step of the first change.
        end: the optimizer step of the last change.
        num_stages: n, the number of changes. Each compiles the model anew.

    Raises:
        ValueError: a density outside (0, 1], equal densities, or fewer steps than stages.
    """
    first, last = check_density("first", first), check_density("last", last)
    begin = whole_number("begin", begin, at_least=0)
    num_stages = whole_number("num_stages", num_stages, at_least=1)
    end = whole_number("end", end, at_least=begin + num_stages, advice=f"{num_stages} stages need as many steps")
    if first == last:
        raise ValueError(f"last: expected another density than first, got {last:g} twice; pass what the run ends with")
    stages = []
    for k in range(1, num_stages + 1):
        left = (1 - k / num_stages) ** 3
        stages.append((begin + (end - begin) * k // num_stages, last + (first - last) * left))
    return stages


def check_density_schedule(schedule: Any, total_steps: int | None = None) -> list[Stage]:
    """Returns the stages of a list of (step, density) pairs.

    Raises ValueError for anything else, steps out of order or beyond ``total_steps``, and densities outside (0, 1].
    """
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise ValueError(
            f"density_schedule: expected a list of (step, density) pairs, got {described(schedule)}; pass for example "
            "[(1000, 0.5), (2000, 0.25)], or smet_compile.cubic_density(1.0, 0.25, end=2000)"
        )
    stages: list[Stage] = []
    for i, pair in enumerate(schedule):
        where = f"density_schedule[{i}]"
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{where}: expected a pair (step, density), got {described(pair)}; pass (1000, 0.5)")
        step, density = whole_number(f"{where}: step", pair[0], at_least=1), check_density(where, pair[1])
        if stages and step <= stages[-1].step:
            raise ValueError(f"{where}: expected a step after {stages[-1].step}, got {step}; put stages in order")
        if total_steps is not None and step > total_steps:
            raise ValueError(
                f"{where}: expected a step of the run, at most {total_steps}, got {step}; raise total_steps"
            )
        stages.append(Stage(step, density))
    return stages


Sizes = Mapping[str, tuple[Layout, int]]
"""Layout and number of active blocks of each weight, by name."""


def counts_at(density: float, sizes: Sizes) -> dict[str, int]:
    """Returns how many blocks of each weight are active at ``density``.

    Args:
        sizes: the weights as they are at another density.
    """
    if _have_one_density(sizes):
        return {name: layout.num_active(density) for name, (layout, _) in sizes.items()}
    caps = {name: layout.num_blocks for name, (layout, _) in sizes.items()}
    total = max(len(caps), math.floor(density * sum(caps.values()) + 0.5))
    return share_out(total, {name: count for name, (_, count) in sizes.items()}, caps)


def counts_of_stages(stages: Sequence[Stage], sizes: Sizes) -> list[dict[str, int]]:
    """Returns the numbers of active blocks before the first stage and in each. Raises ValueError where one is idle."""
    counts = [{name: count for name, (_, count) in sizes.items()}]
    for stage in stages:
        counts.append(counts_at(stage.density, sizes))
        if counts[-1] == counts[-2]:
            raise ValueError(
                f"density_schedule: expected stages that change the model, got a density of {stage.density:g} at step "
                f"{stage.step}, which it has already; leave that stage out, or take fewer"
            )
    return counts


def _have_one_density(sizes: Sizes) -> bool:
    """Tells whether one density, rounded for each weight, gives all counts."""
    low = max(0.0 if count == 1 else (count - 0.5) / layout.num_blocks for layout, count in sizes.values())
    return low < min((count + 0.5) / layout.num_blocks for layout, count in sizes.values())


def check_density(argument: str, density: Any) -> float:
    """Returns ``density`` as a float. Raises ValueError, which names ``argument``, for one outside (0, 1]."""
    return number(argument, density, above=0, at_most=1, advice="it is the fraction that stays")


def share_out(total: int, shares: dict[str, float], caps: dict[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``shares``: each at least 1 and at most its cap, the sum exact.

    The others get what a cap cuts off; the largest remainders get what rounding leaves over.
    """
    amounts = {name: float(caps[name]) for name in caps}
    free = set(caps)
    left = float(total)
    while free:
        scale = left / sum(shares[name] for name in free)
        full = {name for name in free if scale * shares[name] >= caps[name]}
        if not full:
            amounts.update({name: max(1.0, scale * shares[name]) for name in free})
            break
        left -= sum(caps[name] for name in full)
        free -= full
    counts = {name: math.floor(amount) for name, amount in amounts.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - amounts[name], name))
    while (missing := total - sum(counts.values())) != 0:
        unit = 1 if missing > 0 else -1
        movable = [n for n in by_remainder if (counts[n] < caps[n] if unit > 0 else counts[n] > 1)]
        for name in movable[:missing] if unit > 0 else movable[missing:]:
            counts[name] += unit
    return counts
