"""One training run that is planned: its model on shapes, what it stores, and what a step makes beside that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from torch import nn

from smet_compile.convert import choose
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
    shortened,
    telling_degrees,
    total_bytes,
    weighted_sum,
)
from smet_compile.plan.stored import Bytes, values_bytes
from smet_compile.planner.shapes import (
    EagerRun,
    SeveralGraphsError,
    Step,
    dense_copy,
    make_sparse,
    meta_copy,
    run_compiled,
    run_eager,
)

_BATCH = 4
"""About the one that shapes are run with: memory is a polynomial in it."""
Run = TypeVar("Run")


@dataclass(frozen=True)
class Wish:
    """What ``plan`` was asked, but for density and batch.

    Args:
        name: of the model. model: on the meta device, dense or compact; never changed.
        selection: the other arguments of ``sparsify`` that decide which weights are chosen.
    """

    name: str
    model: nn.Module
    step: Step
    block_shape: Any
    sequence: int | None
    state_dtype: Any
    compiled: bool
    fused: bool
    selection: dict[str, Any]


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
            make_sparse(self.model, self._choices(self.model, density))
        sites = find_sites(self.model).values()
        blocks = sum(site.layout.num_blocks for site in sites)
        self.density = density or sum(site.num_active for site in sites) / blocks
        self.repeats = find_repeats(self.model, self._num_active_of)
        self.broken = False

    def _choices(self, model: nn.Module, density: float) -> list[Choice]:
        return choose(model, density, self.wish.block_shape, **self.wish.selection).choices

    def _num_active_of(self, name: str) -> int:
        return self.model.get_parameter(name).shape[0] if name.endswith(".original") else 0

    @cached_property
    def degrees(self) -> Degrees:
        lengths = {length for tensor in self.dense_model.parameters() for length in tensor.shape}
        return telling_degrees(_BATCH, self.wish.sequence, lengths)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.wish.state_dtype, self.wish.fused and not self.broken)

    @cached_property
    def eager(self) -> list[tuple[int, EagerRun]]:
        return self._each(self.model, lambda model: run_eager(model, self.wish.step, self.degrees))

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
        runs = self._each(self.dense_model, lambda model: run_eager(model, self.wish.step, self.degrees))
        return _stack([(factor, run.followed.timeline) for factor, run in runs])

    def _compiled(self, model: nn.Module, fused: bool) -> Stack:
        return _stack(self._each(model, lambda part: run_compiled(part, self.wish.step, self.degrees, fused)))

    def _each(self, model: nn.Module, run: Callable[[nn.Module], Run]) -> list[tuple[int, Run]]:
        """``run`` of models with fewer layers, of which the whole is the weighted sum; of the whole without repeats."""
        run = self._explaining(run)
        if not self.repeats:
            return [(1, run(model))]
        fewest = 1 - sum(repeat.extra for repeat in self.repeats), run(shortened(model, self.repeats))
        longer = [(repeat.extra, run(shortened(model, self.repeats, repeat))) for repeat in self.repeats]
        return [fewest, *longer]

    def _explaining(self, run: Callable[[nn.Module], Run]) -> Callable[[nn.Module], Run]:
        """What a model's own code raises, as a ValueError."""

        def explained(model: nn.Module) -> Run:
            try:
                return run(model)
            except SeveralGraphsError:
                raise
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"model: {self.wish.name} cannot be run on shapes alone: {reason}; see inputs= and loss_fn="
                ) from error

        return explained

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
                layout = site.layout
                count = layout.num_weights, parameter.dtype, layout, site.num_active
                found.append(Stored(site.name, *count, trained))
        return found if density is None else [self._at(density, each) for each in found]

    def _at(self, density: float, parameter: Stored) -> Stored:
        choice = self._counts(density).get(parameter.name)
        if choice is None:
            return parameter.dense()
        return replace(parameter, layout=choice.layout, num_active=choice.num_active)

    @lru_cache(maxsize=64)  # noqa: B019  one run is planned at a time
    def _counts(self, density: float) -> dict[str, Choice]:
        try:
            return {choice.weight.name: choice for choice in self._choices(self.dense_model, density)}
        except ValueError:  # every weight keeps all its blocks
            return {}

    def _is_trained(self, name: str) -> bool:
        """As a layer that stands for this one is; told by the run of the model with the fewest layers."""
        for repeat in self.repeats:
            prefix = repeat.name + "."
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                name = f"{prefix}{min(int(number), repeat.kept - 1)}.{rest}"
        return name in self.eager[0][1].trained

    @property
    def buffers(self) -> int:
        """Bytes of the buffers that are not ours."""
        ours = {id(tensor) for site in find_sites(self.model).values() for tensor in site.compact.buffers()}
        return sum(tensor.nbytes for tensor in self.model.buffers() if id(tensor) not in ours)

    def point(self, batch: int, density: float | None = None) -> Point:
        compact = 1.0
        if density is not None:
            compact = values_bytes(self.stored(density), self._site_names) / values_bytes(
                self.stored(), self._site_names
            )
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
