"""One training run that is planned: its model on shapes, what it stores, and what a step makes beside that."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache, partial

from torch import nn

from smet_compile.convert.choose import Choice
from smet_compile.ops import find_sites
from smet_compile.plan import (
    Amount,
    Degrees,
    Point,
    Recipe,
    Stack,
    Stored,
    Timeline,
    find_repeats,
    resident_bytes,
    telling_degrees,
    total_bytes,
    weighted_sum,
)
from smet_compile.plan.stored import Bytes, values_bytes
from smet_compile.planner.copies import dense_copy, make_sparse, meta_copy
from smet_compile.planner.layers import run_each, stand_in
from smet_compile.planner.shapes import (
    EagerRun,
    SeveralGraphsError,
    run_compiled,
    run_eager,
)
from smet_compile.planner.wish import Wish


class PlannedRun:
    """What ``plan_of`` and the search for what fits ask.

    Args:
        density: of the weights made sparse; None for a model that is compact already.
    """

    def __init__(self, wish: Wish, density: float | None) -> None:
        self.wish = wish
        self.asked = density
        self.dense_model = dense_copy(wish.model)
        self.model = meta_copy(wish.model)
        if density is not None:
            make_sparse(self.model, wish.choices(self.model, density))
        sites = find_sites(self.model).values()
        blocks = sum(site.layout.num_blocks for site in sites)
        self.density = density or sum(site.num_active for site in sites) / blocks
        self.repeats = find_repeats(self.model, self._num_active_of)
        self.broken = False

    def _num_active_of(self, name: str) -> int:
        return self.model.get_parameter(name).shape[0] if name.endswith(".original") else 0

    @cached_property
    def degrees(self) -> Degrees:
        lengths = {length for tensor in self.dense_model.parameters() for length in tensor.shape}
        return telling_degrees(self.wish.sequence, lengths)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.wish.state_dtype, self.wish.fused and not self.broken)

    @cached_property
    def eager(self) -> list[tuple[int, EagerRun]]:
        return self._eager(self.model)

    @cached_property
    def timeline(self) -> Stack:
        if self.wish.compiled:
            fused = self.wish.fused and bool(find_sites(self.model))
            try:
                return self._compiled(self.model, fused)
            except SeveralGraphsError:
                self.broken = True
        return _stack([(factor, run.followed.timeline) for factor, run in self.eager])

    @cached_property
    def dense_timeline(self) -> Stack:
        if self.wish.compiled and not self.broken:
            return self._compiled(self.dense_model, False)
        return _stack([(factor, run.followed.timeline) for factor, run in self._eager(self.dense_model)])

    def _eager(self, model: nn.Module) -> list[tuple[int, EagerRun]]:
        wish = self.wish
        return run_each(model, self.repeats, partial(run_eager, step=wish.step, degrees=self.degrees), wish.name)

    def _compiled(self, model: nn.Module, fused: bool) -> Stack:
        wish = self.wish
        run = partial(run_compiled, step=wish.step, degrees=self.degrees, fused=fused)
        return _stack(run_each(model, self.repeats, run, wish.name))

    def operations(self, dense: bool = False) -> Amount:
        return weighted_sum(
            (factor, run.followed.dense_operations if dense else run.followed.operations) for factor, run in self.eager
        )

    def stored(self, density: float | None = None) -> list[Stored]:
        """Every parameter; at another ``density`` than that of the run if given."""
        sites = {id(site.values): site for site in find_sites(self.model).values()}
        found = []
        for name, parameter in self.model.named_parameters():
            site, trained = sites.get(id(parameter)), self._is_trained(name)
            if site is None:
                found.append(Stored(name, parameter.numel(), parameter.dtype, trained=trained))
            else:
                count = site.layout.num_weights
                found.append(Stored(site.name, count, parameter.dtype, site.layout, site.num_active, trained))
        return found if density is None else [self._at(density, each) for each in found]

    def _at(self, density: float, parameter: Stored) -> Stored:
        choice = self._counts(density).get(parameter.name)
        if choice is None:
            return parameter.dense()
        return replace(parameter, layout=choice.layout, num_active=choice.num_active)

    @lru_cache(maxsize=64)  # noqa: B019  one run is planned at a time
    def _counts(self, density: float) -> dict[str, Choice]:
        try:
            return {choice.weight.name: choice for choice in self.wish.choices(self.dense_model, density)}
        except ValueError:  # every weight keeps all its blocks
            return {}

    def _is_trained(self, name: str) -> bool:
        """As a layer that stands for this one is; told by the run of the model with the fewest layers."""
        return stand_in(name, self.repeats) in self.eager[0][1].trained

    @property
    def buffers(self) -> int:
        """Bytes of the buffers that are not ours."""
        ours = {id(tensor) for site in find_sites(self.model).values() for tensor in site.compact.buffers()}
        return sum(tensor.nbytes for tensor in self.model.buffers() if id(tensor) not in ours)

    def point(self, batch: int, density: float | None = None) -> Point:
        compact = 1.0
        if density is not None:
            there, here = (values_bytes(self.stored(each), self._site_names) for each in (density, None))
            compact = there / here
        return Point(batch, self.wish.sequence or 1, compact)

    @cached_property
    def _site_names(self) -> set[str]:
        return set(find_sites(self.model))

    def peak(self, batch: int, density: float | None = None) -> float:
        """The most bytes that are held at once."""
        timeline = self.timeline  # first: it tells whether updates are fused
        point = self.point(batch, density)
        return peak_of(total_bytes(self.stored(density), self.recipe, self.buffers), timeline, point)


def _stack(parts: list[tuple[int, Timeline]]) -> Stack:
    return Stack(parts[0][1], parts[1:])


def peak_of(stored: Bytes, timeline: Stack, point: Point) -> float:
    """In a step, or when it ends with all gradients there."""
    return resident_bytes(stored) + max(point.value(timeline.fullest(point)), stored["gradients"])
