"""Shares out a density among weights: how many blocks of each are active."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from smet_compile.format import Layout
from smet_compile.format.arguments import described, one_of, whole_number
from smet_compile.format.densities import check_density, share_out

Distribution = Literal["uniform", "er", "erk"]
Distribute = Callable[[Mapping[str, Layout], float], Mapping[str, int | float]]
"""A function of (layouts by name, density) that returns for each name a density, or a number of blocks as an int."""
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


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
