"""Shares out a density among weights: how many blocks of each are active."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from smet_compile.format import Layout
from smet_compile.format.arguments import described, number, one_of, whole_number

Distribution = Literal["uniform", "er", "erk"]
Distribute = Callable[[Mapping[str, Layout], float], Mapping[str, int | float]]
"""A function of (layouts by name, density) that returns for each name a density, or a number of blocks as an int."""
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


def check_density(argument: str, density: Any) -> float:
    """Returns ``density`` as a float. Raises ValueError, which names ``argument``, for one outside (0, 1]."""
    return number(argument, density, above=0, at_most=1, advice="it is the fraction that stays")


def split_rules(distribution: Any, rules: Any) -> tuple[str | Distribute, dict[str, float]]:
    """Returns the distribution, and the density of each glob. A dict as ``distribution`` holds rules itself.

    Raises ValueError for a distribution that is no known name, function or dict, and for rules that are none.
    """
    argument = "rules"
    if isinstance(distribution, Mapping):
        if rules is not None:
            raise ValueError(
                f"rules: expected none beside a dict as distribution, which means the same, got {described(rules)}; "
                "pass one of them"
            )
        argument, rules, distribution = "distribution", distribution, "uniform"
    if not callable(distribution):
        one_of("distribution", distribution, DISTRIBUTIONS)
    return distribution, {} if rules is None else _check_rules(argument, rules)


def _check_rules(argument: str, rules: Any) -> dict[str, float]:
    if not isinstance(rules, Mapping) or not all(isinstance(glob, str) for glob in rules):
        raise ValueError(
            f"{argument}: expected a dict from globs to densities, got {described(rules)}; pass for example "
            '{"*.o_proj": 0.5}'
        )
    return {glob: check_density(f"{argument}[{glob!r}]", density) for glob, density in rules.items()}


def allocate(layouts: dict[str, Layout], density: float, distribution: str | Distribute) -> dict[str, int]:
    """Returns the number of active blocks of each weight.

    uniform: every weight has ``density``, exactly (rounded half up, at least one block). er, erk: a layer's
    density is in proportion to the sum of its dimensions over their product (Erdős-Rényi, Mocanu et al. 2018;
    its kernel form counts the kernel's dimensions too, Evci et al. 2020); no layer above 1, the total exact.
    """
    if callable(distribution):
        return _called(distribution, layouts, density)
    if distribution == "uniform":
        return {name: layout.num_active(density) for name, layout in layouts.items()}
    total = math.floor(density * sum(layout.num_blocks for layout in layouts.values()) + 0.5)
    shares = {name: _score(layout, distribution) * layout.num_blocks for name, layout in layouts.items()}
    caps = {name: layout.num_blocks for name, layout in layouts.items()}
    return share_out(max(total, len(layouts)), shares, caps)


def _called(distribute: Distribute, layouts: dict[str, Layout], density: float) -> dict[str, int]:
    """Returns the counts that a user's function gives, checked."""
    found: Any = distribute(dict(layouts), density)
    if not isinstance(found, Mapping):
        raise ValueError(
            f"distribution: expected a function that returns a dict from names to densities, got {described(found)}"
        )
    if found.keys() != layouts.keys():
        odd = _names(layouts.keys() - found.keys()) or _names(found.keys() - layouts.keys())
        raise ValueError(
            f"distribution: expected exactly the {len(layouts)} names that the function was given, got {len(found)}, "
            f"not alike in {odd}; return one number for each"
        )
    return {name: _count(name, found[name], layout) for name, layout in layouts.items()}


def _names(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(described, names))[:3])


def _count(name: str, found: Any, layout: Layout) -> int:
    """Returns a number of blocks: ``found`` itself where it is whole, else what this density keeps."""
    try:
        return whole_number(name, found, at_least=1, at_most=layout.num_blocks)
    except ValueError:
        pass
    try:
        return layout.num_active(check_density(name, found))
    except ValueError:
        raise ValueError(
            f"{name}: expected from distribution a density in (0, 1] or an int from 1 to {layout.num_blocks:,} blocks, "
            f"got {described(found)}"
        ) from None


def _score(layout: Layout, distribution: str) -> float:
    """Returns the sum over the product of a layer's dimensions: (out, in, kernel...) or (R, C)."""
    convolution = layout.matrix != layout.shape[-2:]
    dims = layout.shape if convolution else layout.matrix
    if distribution == "er":
        dims = dims[:2]
    return sum(dims) / math.prod(dims)


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
