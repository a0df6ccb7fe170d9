"""Chooses which weights become compact, and how many blocks of each are active. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from smet_compile.convert.active_blocks import DISTRIBUTIONS, allocate, count_nonzero_blocks
from smet_compile.convert.find_weights import ALREADY_COMPACT, Weight, find_weights
from smet_compile.format import Layout
from smet_compile.format.arguments import described, number, one_of, whole_number

Globs = str | Iterable[str] | None
KEEPS_EVERY_BLOCK = "keeps every block: density 1"
_MAX_GROWTH = 16
"""Compact weights may exceed the memory of the dense ones by this factor before that is taken for a mistake."""
_Density = TypeVar("_Density", float, None)


@dataclass(frozen=True)
class Choice:
    """Describes one weight to make compact."""

    weight: Weight
    layout: Layout
    num_active: int

    @property
    def dense_bytes(self) -> int:
        return self.layout.num_weights * self.weight.tensor.element_size()

    @property
    def values_bytes(self) -> int:
        """Returns the bytes of the active blocks, with the parts that hang over the edge of the matrix."""
        return math.prod(self.layout.values_shape(self.num_active)) * self.weight.tensor.element_size()


@dataclass(frozen=True)
class Selection:
    """Holds the weights to make compact, and why each other parameter of two or more dimensions stays dense."""

    choices: list[Choice]
    dense_reasons: dict[str, str]


def choose(
    model: nn.Module,
    density: float,
    block_shape: int | Sequence[int],
    include: Globs,
    exclude: Globs,
    rules: Mapping[str, float] | None,
    distribution: str,
    select: str = "random",
) -> Selection:
    """Chooses the weights that ``smet_compile.sparsify`` makes compact; arguments and errors are described there."""
    one_of("distribution", distribution, DISTRIBUTIONS)
    density = check_density("density", density)
    block = _check_block_shape(block_shape)
    densities = _check_rules(rules)
    included, excluded = _globs(include, "include"), _globs(exclude, "exclude") or []
    weights = find_weights(model)
    chosen = _sparse_weights(weights, included, excluded)
    layouts = {name: Layout.of(w.tensor.shape, block, w.flatten) for name, w in chosen.items()}
    if select == "nonzero":
        counts = {name: count_nonzero_blocks(name, w.tensor, layouts[name]) for name, w in chosen.items()}
    else:
        counts = _counts(chosen, layouts, density, densities, distribution)
    choices = [Choice(chosen[n], layouts[n], counts[n]) for n in chosen if counts[n] < layouts[n].num_blocks]
    if not choices and select == "nonzero":
        raise ValueError(
            f"sparsify: nothing to make sparse: none of the {len(chosen)} chosen weights has a block of {block} that "
            'is all zero; use smaller blocks, or select="magnitude" with a density'
        )
    if not choices and any(_requested_density(weight, densities, density) < 1 for weight in chosen.values()):
        raise ValueError(
            f"sparsify: nothing to make sparse: all {len(chosen)} chosen weights keep every block at density "
            f"{density} and block shape {block}; lower the density or use smaller blocks"
        )
    _check_bytes(choices, block)
    return Selection(choices, _dense_reasons(weights, choices, chosen, excluded))


def check_density(argument: str, density: float) -> float:
    """Returns ``density`` as a float. Raises ValueError, which names ``argument``, for one outside (0, 1]."""
    return number(argument, density, above=0, at_most=1, advice="it is the fraction that stays")


def _check_block_shape(block_shape: int | Sequence[int]) -> tuple[int, int]:
    try:
        is_list = not isinstance(block_shape, str | bytes | Mapping) and getattr(block_shape, "shape", None) != ()
        pair = tuple(block_shape) if is_list else (block_shape, block_shape)  # type: ignore[arg-type]
    except TypeError:
        pair = (block_shape, block_shape)
    try:
        rows, cols = (whole_number("block_shape", side, at_least=1) for side in pair)
    except ValueError:
        raise ValueError(
            "block_shape: expected a positive integer or two of them (rows, columns), got "
            f"{described(block_shape)}; pass 1 for single weights, 64 for tiles of (64, 64)"
        ) from None
    return rows, cols


def _globs(globs: Globs, argument: str) -> list[str] | None:
    if globs is None:
        return None
    is_list = isinstance(globs, Iterable) and not isinstance(globs, str | bytes) and getattr(globs, "shape", 1) == 1
    listed = list(globs) if is_list else [globs]
    if not all(isinstance(glob, str) for glob in listed):
        raise ValueError(
            f"{argument}: expected a glob or a list of globs over qualified names, got {described(globs)}; pass "
            'for example "layers.*.mlp.*"'
        )
    return [str(glob) for glob in listed]


def _check_rules(rules: Mapping[str, float] | None) -> dict[str, float]:
    if rules is None:
        return {}
    if not isinstance(rules, Mapping) or not all(isinstance(glob, str) for glob in rules):
        raise ValueError(
            f"rules: expected a dict from globs to densities, got {described(rules)}; pass for example "
            '{"*.o_proj": 0.5}'
        )
    return {glob: check_density(f"rules[{glob!r}]", density) for glob, density in rules.items()}


def _matches(weight: Weight, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in (weight.name, weight.module_name, weight.name_of_computed))


def _check_globs(argument: str, globs: Iterable[str], weights: Iterable[Weight], kind: str) -> None:
    """Raises ValueError for a glob that matches none of ``weights``, which the message calls ``kind``."""
    weights = list(weights)
    for glob in globs:
        if not any(_matches(weight, glob) for weight in weights):
            some = ", ".join(weight.name for weight in weights[:3])
            raise ValueError(f"{argument}: {glob!r} matches none of the {kind} ({some}, ...); see report(model)")


def _sparse_weights(weights: dict[str, Weight], include: list[str] | None, exclude: list[str]) -> dict[str, Weight]:
    """Returns the weights to make compact. Raises ValueError where the globs ask for what cannot be."""
    _check_globs("include", include or [], weights.values(), "parameters of two or more dimensions")
    _check_globs("exclude", exclude, weights.values(), "parameters of two or more dimensions")
    included = {
        name: weight
        for name, weight in weights.items()
        if _is_included(weight, include) and not any(_matches(weight, glob) for glob in exclude)
    }
    for name, weight in included.items():
        if weight.never_reason == ALREADY_COMPACT:
            raise ValueError(f"{name}: {ALREADY_COMPACT}; call sparsify once, or exclude it")
    for glob in include or []:
        matched = [weight for weight in weights.values() if _matches(weight, glob)]
        if all(weight.never_reason for weight in matched):
            first = matched[0]
            raise ValueError(f"include: {glob!r} matches {first.name}, which cannot be sparse: {first.never_reason}")
    chosen = {name: weight for name, weight in included.items() if weight.never_reason is None}
    if not chosen:
        found = "; ".join(f"{n}: {reason}" for n, reason in _reasons_to_show(weights)[:5])
        raise ValueError(
            f"sparsify: nothing to make sparse in {len(weights)} parameters of two or more dimensions "
            f"({found}); name weights with include="
        )
    return chosen


def _reasons_to_show(weights: dict[str, Weight]) -> list[tuple[str, str]]:
    """Returns (weight, reason) with one weight of each reason, the reasons that a user can act on first."""
    reasons: dict[str, str] = {}
    for name, weight in sorted(weights.items(), key=lambda item: item[1].never_reason is None):
        reasons.setdefault(weight.reason or "excluded", name)
    return [(name, reason) for reason, name in reasons.items()]


def _is_included(weight: Weight, include: list[str] | None) -> bool:
    if include is not None:
        return any(_matches(weight, glob) for glob in include)
    return weight.dense_reason is None


def _requested_density(weight: Weight, rules: dict[str, float], default: _Density) -> float | _Density:
    """Returns the density of the first rule that matches, ``default`` where none does."""
    return next((density for glob, density in rules.items() if _matches(weight, glob)), default)


def _check_bytes(choices: list[Choice], block: tuple[int, int]) -> None:
    """Raises ValueError where blocks hang so far over the edges of their matrices that it must be a mistake."""
    dense = sum(choice.dense_bytes for choice in choices)
    compact = sum(choice.values_bytes for choice in choices)
    if compact > _MAX_GROWTH * dense:
        worst = max(choices, key=lambda choice: choice.values_bytes)
        raise ValueError(
            f"block_shape: expected blocks that save memory, got {block}: compact weights of {compact:,} bytes in "
            f"place of {dense:,} dense ones (most in {worst.weight.name} of shape {worst.layout.shape}); take blocks "
            "no larger than the matrices"
        )


def _counts(
    chosen: dict[str, Weight],
    layouts: dict[str, Layout],
    density: float,
    rules: dict[str, float],
    distribution: str,
) -> dict[str, int]:
    """Returns the number of active blocks of each chosen weight, by the first rule that matches or the distribution."""
    _check_globs("rules", rules, chosen.values(), "weights chosen to be sparse")
    counts = {}
    for name, weight in chosen.items():
        requested = _requested_density(weight, rules, None)
        if requested is not None:
            counts[name] = layouts[name].num_active(requested)
    others = {name: layout for name, layout in layouts.items() if name not in counts}
    return counts | allocate(others, density, distribution)


def _dense_reasons(
    weights: dict[str, Weight], choices: list[Choice], chosen: dict[str, Weight], exclude: list[str]
) -> dict[str, str]:
    """Returns why each weight stays dense that is not compact and is not in ``choices``."""
    compact = {choice.weight.name for choice in choices}
    reasons = {}
    for name, weight in weights.items():
        if name in compact or weight.never_reason == ALREADY_COMPACT:
            continue
        if name in chosen:
            reasons[name] = KEEPS_EVERY_BLOCK
        elif any(_matches(weight, glob) for glob in exclude):
            reasons[name] = "excluded"
        else:
            reasons[name] = weight.reason or "not included"
    return reasons
