"""Follows one training run: its model on shapes, what it stores, and what a step makes beside that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from smet_compile.convert import choose, draw, export_dense, make_compact
from smet_compile.convert.choose import KEEPS_EVERY_BLOCK, Choice
from smet_compile.format import Slabs
from smet_compile.ops import find_sites
from smet_compile.optim.parameters import find_output_head
from smet_compile.plan.mesh import Mesh
from smet_compile.plan.shapes import (
    EagerRun,
    Repeats,
    Step,
    empty_copy,
    find_repeats,
    layers_of_parameters,
    representative,
    run_checked,
    run_compiled,
    run_eager,
    run_repeated,
)
from smet_compile.plan.stored import (
    Bytes,
    Recipe,
    Stored,
    resident_bytes,
    total_bytes,
    values_bytes,
)
from smet_compile.plan.timeline import Amount, Degrees, LayeredTimeline, Point, Timeline, choose_degrees, weighted_sum
from smet_compile.shards.styles import Style
from smet_compile.tracing import SeveralGraphsError


@dataclass(frozen=True)
class Request:
    """Holds the checked arguments of ``plan``, without density and batch, which may be solved for.

    Args:
        name: the name of the model. model: it on the meta device, dense or compact; never changed.
        selection: the other arguments of ``sparsify`` that decide which weights are chosen.
        mesh: the ranks among which parameters are shared; None for one device.
        tp_plan: which layers tensor parallelism cuts, and how; None for the model's own plan.
        tokens: those that the run reads, to compare it with the dense model of as many bytes; None for no comparison.
        sparse_efficiency: the rate of products with compact weights over that of dense ones; None for the default.
    """

    name: str
    model: nn.Module
    step: Step
    block_shape: Any
    sequence: int | None
    moment_dtype: torch.dtype | str | None
    optimizer: str
    compiled: bool
    fused_update: bool
    selection: dict[str, Any]
    mesh: Mesh | None = None
    tp_plan: Mapping[str, str] | None = None
    tokens: float | None = None
    sparse_efficiency: float | None = None

    def choices(self, model: nn.Module, density: float, slabs: Mapping[str, Slabs] | None = None) -> list[Choice]:
        """Returns the weights of the dense ``model`` that ``sparsify`` would make compact, with slabs by their names.

        ``slabs`` may name weights that stay dense.
        """
        chosen = choose(model, density, self.block_shape, **self.selection)
        if not slabs:
            return chosen.choices
        compact = {each.weight.name for each in chosen.choices}
        compact |= {name for name, reason in chosen.dense_reasons.items() if reason == KEEPS_EVERY_BLOCK}
        its_slabs = {name: (each.num, each.dim) for name, each in slabs.items() if name in compact}
        return choose(model, density, self.block_shape, **self.selection, slabs=its_slabs).choices


class PlannedRun:
    """Answers for a run at one density what it stores and needs, at any batch.

    Args:
        density: the density of the weights that are made sparse; None for a model that is compact already.
    """

    def __init__(self, request: Request, density: float | None) -> None:
        self.request = request
        self.requested_density = density
        self.model = empty_copy(request.model).train()
        self.dense_model = empty_copy(request.model).train()
        if find_sites(self.dense_model):
            self.dense_model = export_dense(self.dense_model)
        if density is not None:
            choices = request.choices(self.model, density)
            make_compact(self.model, [draw(each, "random", rescale=False, seed=0) for each in choices], reasons={})
        self.sites = find_sites(self.model)
        self.output_head = find_output_head(self.model)
        num_blocks = sum(site.layout.num_blocks for site in self.sites.values())
        self.density = density or sum(site.num_active for site in self.sites.values()) / num_blocks
        self._choices_at: dict[float, dict[str, Choice]] = {}

    @cached_property
    def repeats(self) -> list[Repeats]:
        """Returns the lists of layers of which a few are run for all."""
        return self._checked[0]

    @cached_property
    def _checked(self) -> tuple[list[Repeats], list[tuple[int, EagerRun]]]:
        found = find_repeats(self.model, self._num_active_of)
        return run_checked(self.model, found, self._run_eager, self.request.name)

    def _run_eager(self, model: nn.Module) -> EagerRun:
        return run_eager(model, self.request.step, self.degrees)

    def _num_active_of(self, name: str) -> int:
        return self.model.get_parameter(name).shape[0] if name.endswith(".original") else 0

    @cached_property
    def degrees(self) -> Degrees:
        lengths = {length for tensor in self.dense_model.parameters() for length in tensor.shape}
        return choose_degrees(self.request.sequence, lengths)

    @property
    def recipe(self) -> Recipe:
        fused_update = self.request.fused_update and not self.breaks
        return Recipe(self.request.moment_dtype, fused_update, optimizer=self.request.optimizer)

    @property
    def breaks(self) -> bool:
        """Returns True where the step was to be compiled and breaks into several graphs."""
        return self.request.compiled and self._compiled_timeline is None

    @cached_property
    def _compiled_timeline(self) -> LayeredTimeline | None:
        try:
            return self._compiled(self.model, self.request.fused_update and bool(self.sites))
        except SeveralGraphsError:
            return None

    @cached_property
    def timeline(self) -> LayeredTimeline:
        if self.request.compiled and self._compiled_timeline is not None:
            return self._compiled_timeline
        return _layered([(factor, run.followed.timeline) for factor, run in self.eager])

    @cached_property
    def dense_timeline(self) -> LayeredTimeline:
        if self.request.compiled and not self.breaks:
            return self._compiled(self.dense_model, False)
        return _layered([(factor, run.followed.timeline) for factor, run in self._eager(self.dense_model)])

    @cached_property
    def eager(self) -> list[tuple[int, EagerRun]]:
        """Returns (factor, eager run) pairs, whose weighted sum is the whole model."""
        repeats, runs = self._checked
        return runs if self.repeats is repeats else self._eager(self.model)

    def _eager(self, model: nn.Module) -> list[tuple[int, EagerRun]]:
        return run_repeated(model, self.repeats, self._run_eager, self.request.name)

    def _compiled(self, model: nn.Module, fused: bool) -> LayeredTimeline:
        run = partial(run_compiled, step=self.request.step, degrees=self.degrees, fused=fused)
        return _layered(run_repeated(model, self.repeats, run, self.request.name))

    def operations(self, dense: bool = False) -> Amount:
        return weighted_sum(
            (factor, run.followed.dense_operations if dense else run.followed.operations) for factor, run in self.eager
        )

    def stored(self, density: float | None = None) -> list[Stored]:
        """Returns every parameter; at another ``density`` than that of the run if given."""
        sites = {id(site.values): site for site in self.sites.values()}
        layers = layers_of_parameters(self.model)
        found = []
        for name, parameter in self.model.named_parameters():
            site = sites.get(id(parameter))
            shape = parameter.shape if site is None else site.layout.shape
            one = Stored(
                name if site is None else site.name,
                math.prod(shape),
                parameter.dtype,
                trained=self._is_trained(name),
                is_vector=site is None and parameter.dim() < 2,
                is_output_head=parameter is self.output_head,
                num_rows=shape[0] if shape else 1,
                layer=layers.get(id(parameter), ""),
            )
            found.append(one if site is None else replace(one, layout=site.layout, num_active=site.num_active))
        return found if density is None else [self._at(density, each) for each in found]

    def _at(self, density: float, parameter: Stored) -> Stored:
        if density not in self._choices_at:
            try:
                choices = self.request.choices(self.dense_model, density)
            except ValueError:  # every weight keeps all its blocks
                choices = []
            self._choices_at[density] = {choice.weight.name: choice for choice in choices}
        choice = self._choices_at[density].get(parameter.name)
        if choice is None:
            return parameter.dense()
        return replace(parameter, layout=choice.layout, num_active=choice.num_active)

    def _is_trained(self, name: str) -> bool:
        """Returns True where the run of the model with the fewest layers gave the parameter a gradient."""
        return representative(name, self.repeats) in self.eager[0][1].trained

    def layer_bytes(self, styles: Mapping[str, Style], point: Point) -> float:
        """Returns the bytes of the activations that tensor parallelism adds up in a step, in these layers."""
        return point.value(weighted_sum((factor, run.layers.total(styles)) for factor, run in self.eager))

    @property
    def buffers(self) -> int:
        """Returns the bytes of the buffers that do not belong to a topology."""
        topologies = {id(tensor) for site in self.sites.values() for tensor in site.compact.buffers()}
        return sum(tensor.nbytes for tensor in self.model.buffers() if id(tensor) not in topologies)

    def point(self, batch: int, density: float | None = None) -> Point:
        """Returns the point at which the timeline is evaluated; at another ``density`` than the run's if given."""
        return self.point_with(self.stored(density), batch)

    def point_with(self, stored: list[Stored], batch: int) -> Point:
        """Returns the point at which the timeline is evaluated where the parameters are ``stored``."""
        ratio = values_bytes(stored, self.sites) / values_bytes(self.stored(), self.sites) if self.sites else 1.0
        return Point(batch, self.request.sequence or 1, ratio)

    def peak(self, batch: int, density: float | None = None) -> float:
        """Returns the most bytes that tensors hold at once."""
        timeline, point = self.timeline, self.point(batch, density)
        return peak_of(total_bytes(self.stored(density), self.recipe, self.buffers), timeline, point)


def _layered(parts: list[tuple[int, Timeline]]) -> LayeredTimeline:
    return LayeredTimeline(parts[0][1], parts[1:])


def peak_of(stored: Bytes, timeline: LayeredTimeline, point: Point) -> float:
    """Returns the larger of two peaks: inside a step, and at its end, when all gradients are there."""
    return resident_bytes(stored) + max(point.value(timeline.fullest(point)), stored["gradients"])
