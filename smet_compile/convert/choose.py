"""Chooses which weights become compact, and how many blocks of each are active. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from smet_compile.convert.active_blocks import count_nonzero_blocks
from smet_compile.convert.distribution import Distribute, allocate, split_rules
from smet_compile.convert.find_weights import ALREADY_COMPACT, Weight, find_weights
from smet_compile.convert.masks import block_mask, read_masks
from smet_compile.format import Layout, Part, Slabs, bands_of, patterns
from smet_compile.format.arguments import described, whole_number
from smet_compile.format.densities import check_density
from smet_compile.format.slabs import check_divides, check_slabs
from smet_compile.shards import is_fully_sharded, is_sharded

Globs = str | Iterable[str] | None
KEEPS_EVERY_BLOCK = "keeps every block: density 1"
DEFAULT_DENSITY = 0.3
INCLUDE_CONVOLUTIONS = "conv"
"""As ``include`` it adds convolutions to the weights that are sparse by default."""
_MAX_GROWTH = 16
"""Compact weights may exceed the memory of the dense ones by this factor before that is taken for a mistake."""
_Density = TypeVar("_Density", float, None)


@dataclass(frozen=True)
class Choice:
    """Describes one weight to make compact.

    Args:
        layout, num_active: those of the whole weight. mask: which of its blocks are active, where they were given.
        part: which part of the weight is here, where tensor parallelism has cut it.
    """

    weight: Weight
    layout: Layout
    num_active: int
    pattern: str | None = None
    mask: Tensor | None = None
    part: Part | None = None

    @property
    def dense_bytes(self) -> int:
        return self.layout.num_weights * self.weight.tensor.element_size()

    @property
    def values_bytes(self) -> int:
        """Returns the bytes of the active blocks, with the parts that hang over the edge of the matrix."""
        return math.prod(self.layout.values_shape(self.num_active)) * self.weight.tensor.element_size()


@dataclass(frozen=True)
class Selection:
    """Holds the weights to make compact, and why each other parameter of two or more dimensions stays dense.

    ``density`` is that of the weights without mask and rule; None where there is none, since masks or zeros decide.
    """

    choices: list[Choice]
    dense_reasons: dict[str, str]
    density: float | None


def choose(
    model: nn.Module,
    density: float | None,
    block_shape: int | Sequence[int],
    include: Globs,
    exclude: Globs,
    rules: Mapping[str, float] | None,
    distribution: str | Mapping[str, float] | Distribute,
    select: str = "random",
    pattern: str | None = None,
    masks: Mapping[str, Tensor] | None = None,
    dense_as_compact: bool = False,
    slabs: Mapping[str, Any] | None = None,
) -> Selection:
    """Chooses the weights that ``smet_compile.sparsify`` makes compact; arguments and errors are described there."""
    shares, densities = split_rules(distribution, rules)
    pattern = patterns.check_pattern(pattern)
    default = default_density(density, pattern, masks)
    block = _check_block_shape(block_shape)
    included, excluded = _globs(include, "include"), _globs(exclude, "exclude") or []
    with_convolutions = isinstance(include, str) and include == INCLUDE_CONVOLUTIONS
    if default is None:
        _check_masks_alone(included, densities, shares)
        included = []
    weights = find_weights(model, with_convolutions)
    included = None if with_convolutions else included
    given = read_masks(model, masks, weights)
    chosen = _sparse_weights(weights, included, excluded, given)
    _refuse_shards(model, chosen.values())
    layouts = {name: Layout.of(w.tensor.shape, block, w.flatten) for name, w in chosen.items()}
    layouts |= _with_slabs(layouts, chosen, slabs)
    parts = {name: Part.of(name, w.tensor, layouts[name]) for name, w in chosen.items()}
    blocks = {name: block_mask(name, mask, layouts[name]) for name, mask in given.items()}
    if select == "nonzero" and any(layout.slabs for layout in layouts.values()):
        raise ValueError('slabs: expected none with select="nonzero", whose numbers of blocks differ; leave one out')
    if select == "nonzero":
        counts = {name: count_nonzero_blocks(name, w.tensor, layouts[name]) for name, w in chosen.items()}
    else:
        others = {name: weight for name, weight in chosen.items() if name not in given}
        counts = {name: int(mask.sum()) for name, mask in blocks.items()}
        counts |= _counts(others, layouts, default, densities, shares)
    for name, count in counts.items():
        if dense_as_compact or count < layouts[name].num_blocks:
            slab = bands_of(layouts[name])[0].layout
            _check_count(name, count // layouts[name].num_slabs, slab, pattern)
    sparse = [name for name in chosen if dense_as_compact or counts[name] < layouts[name].num_blocks]
    choices = [Choice(chosen[n], layouts[n], counts[n], pattern, blocks.get(n), parts[n]) for n in sparse]
    if not choices:
        _refuse_nothing(chosen, densities, default, block, select)
    _check_bytes(choices, block)
    reasons = _dense_reasons(weights, choices, chosen, excluded)
    return Selection(choices, reasons, None if select == "nonzero" else default)


def _refuse_shards(model: nn.Module, weights: Iterable[Weight]) -> None:
    if not is_fully_sharded(model):
        return
    for weight in weights:
        if is_sharded(weight.tensor):
            raise ValueError(
                f"{weight.name}: expected a whole weight, got a shard of fully_shard; call sparsify first, then "
                "fully_shard, then make the optimizer; parallelize_module comes before all of them"
            )


def _with_slabs(layouts: dict[str, Layout], chosen: dict[str, Weight], slabs: Any) -> dict[str, Layout]:
    """Returns the layouts of the weights that consist of slabs: as asked for, or as tensor parallelism cut them."""
    if slabs is not None and not (isinstance(slabs, Mapping) and all(isinstance(glob, str) for glob in slabs)):
        raise ValueError(
            f'slabs: expected a dict from globs to pairs (count, dim), got {described(slabs)}; pass for example {{"*."'
            '"down_proj": (4, 1)}'
        )
    asked = {glob: check_slabs(f"slabs[{glob!r}]", pair) for glob, pair in (slabs or {}).items()}
    _check_globs("slabs", asked, chosen.values(), "weights chosen to be sparse")
    found = {}
    for name, weight in chosen.items():
        own = next((each for glob, each in asked.items() if _matches(weight, glob)), None)
        dtensor: Any = weight.tensor
        if own is None and is_sharded(dtensor) and dtensor.device_mesh.ndim == 1:
            placement = dtensor.placements[0]
            own = Slabs(dtensor.device_mesh.size(), placement.dim) if hasattr(placement, "dim") else None
        if own is not None and own.num > 1:
            check_divides(name, layouts[name], own)
            found[name] = replace(layouts[name], slabs=own)
    return found


def _check_masks_alone(include: list[str] | None, rules: dict[str, float], distribution: str | Distribute) -> None:
    """Raises ValueError for arguments about weights without a mask, which stay dense where no density is given."""
    if include is not None or rules or distribution != "uniform":
        raise ValueError(
            "density: expected one for the weights without a mask, got none; pass density=, or masks alone"
        )


def default_density(density: Any, pattern: str | None, masks: object) -> float | None:
    """Returns the density of weights without mask and rule; None where masks are given alone, and others stay dense.

    Raises ValueError for a density that is none, or another one than the pattern has.
    """
    ratio = patterns.n_of_m(pattern)
    if density is None:
        if masks is not None:
            return None
        return DEFAULT_DENSITY if ratio is None else ratio[0] / ratio[1]
    density = check_density("density", density)
    if ratio is not None and not math.isclose(density, ratio[0] / ratio[1], rel_tol=1e-6):
        raise ValueError(
            f'density: expected {ratio[0] / ratio[1]:g}, the density of pattern="{pattern}", got {density:g}; leave it '
            "out, or take another pattern"
        )
    return density


def _check_count(name: str, count: int, layout: Layout, pattern: str | None) -> None:
    """Raises ValueError where a compact weight cannot have this number of active blocks in the pattern."""
    fixed, rows = patterns.fixed_count(pattern, layout, name), layout.num_matrices * layout.block_rows
    if fixed is not None and count != fixed:
        raise ValueError(
            f'{name}: expected {fixed:,} active weights for pattern="{pattern}", got {count:,}; leave out density, '
            "rules and distribution for it, or keep it dense with a rule of density 1"
        )
    if pattern == patterns.FAN_IN and count < rows:
        raise ValueError(
            f'{name}: expected at least one active block in each of {rows:,} rows of blocks for pattern="fan_in", got '
            f"{count:,} blocks; take a density of at least {math.ceil(1000 * rows / layout.num_blocks) / 1000}, or "
            "smaller blocks"
        )


def _refuse_nothing(
    chosen: dict[str, Weight],
    densities: dict[str, float],
    density: float | None,
    block: tuple[int, int],
    select: str,
) -> None:
    """Raises ValueError where no chosen weight can be sparse, unless that is what was asked for."""
    if select == "nonzero":
        raise ValueError(
            f"sparsify: nothing to make sparse: none of the {len(chosen)} chosen weights has a block of {block} that "
            'is all zero; use smaller blocks, or select="magnitude" with a density'
        )
    if any(_requested_density(weight, densities, density or 1.0) < 1 for weight in chosen.values()):
        raise ValueError(
            f"sparsify: nothing to make sparse: all {len(chosen)} chosen weights keep every block at density "
            f"{density} and block shape {block}; lower the density or use smaller blocks"
        )


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


def _matches(weight: Weight, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in (weight.name, weight.module_name, weight.name_of_computed))


def _check_globs(argument: str, globs: Iterable[str], weights: Iterable[Weight], kind: str) -> None:
    """Raises ValueError for a glob that matches none of ``weights``, which the message calls ``kind``."""
    weights = list(weights)
    for glob in globs:
        if not any(_matches(weight, glob) for weight in weights):
            some = ", ".join(weight.name for weight in weights[:3])
            raise ValueError(f"{argument}: {glob!r} matches none of the {kind} ({some}, ...); see report(model)")


def _sparse_weights(
    weights: dict[str, Weight], include: list[str] | None, exclude: list[str], given: Collection[str]
) -> dict[str, Weight]:
    """Returns the weights to make compact. Raises ValueError where the globs ask for what cannot be.

    ``given`` are those that have a mask, which are made compact in any case.
    """
    _check_globs("include", include or [], weights.values(), "parameters of two or more dimensions")
    _check_globs("exclude", exclude, weights.values(), "parameters of two or more dimensions")
    left_out = {name for name, weight in weights.items() if any(_matches(weight, glob) for glob in exclude)}
    for name in left_out.intersection(given):
        raise ValueError(f"exclude: expected weights without a mask, got {name}; leave out its mask, or the glob")
    included = {
        name: weight
        for name, weight in weights.items()
        if name in given or (_is_included(weight, include) and name not in left_out)
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
    density: float | None,
    rules: dict[str, float],
    distribution: str | Distribute,
) -> dict[str, int]:
    """Returns the number of active blocks of each chosen weight, by the first rule that matches or the distribution.

    The density is None where there is no such weight.
    """
    _check_globs("rules", rules, chosen.values(), "weights chosen to be sparse")
    counts = {}
    for name, weight in chosen.items():
        requested = _requested_density(weight, rules, None)
        if requested is not None:
            counts[name] = layouts[name].num_active(requested)
    others = {name: layouts[name] for name in chosen if name not in counts}
    counts |= allocate(others, density, distribution) if others and density is not None else {}
    return {name: _of_whole_slabs(count, layouts[name]) for name, count in counts.items()}


def _of_whole_slabs(count: int, layout: Layout) -> int:
    """Returns the number of active blocks next to ``count`` that slabs can share out."""
    return layout.num_slabs * max(1, math.floor(count / layout.num_slabs + 0.5))


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
