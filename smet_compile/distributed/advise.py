"""Compares layouts of one run by the planner's bytes and step time, and says whether it pays to switch to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from smet_compile.distributed.sizes import switch_between
from smet_compile.format import arguments
from smet_compile.format.arguments import described
from smet_compile.ops import find_sites
from smet_compile.plan.card import Card, find_card, seconds_text
from smet_compile.plan.mesh import Mesh, check_mesh
from smet_compile.plan.placement import Placement
from smet_compile.plan.report import Plan
from smet_compile.plan.request import plan
from smet_compile.plan.step_time import StepTime, step_time
from smet_compile.plan.stored import bytes_text
from smet_compile.tables import table_lines

_HEAD = ("layout", "a rank", "fits", "compute", "links", "step", "moved", "switch", "gain a step", "gain / switch")
_NUM_PLAIN = 6
"""Columns that a table has without a present layout."""


@dataclass(frozen=True)
class Option:
    """Holds what a layout costs.

    Args:
        mesh: the layout.
        batch: the sequences of a rank, or of the ranks of "tp" together.
        rank_bytes: what the planner counts on the rank that has most: stored, gathered and saved for backward.
        fits: whether the card has that memory.
        step: the seconds of a step.
        moved: bytes that a switch to it sends from rank to rank, in all.
        switch_seconds: how long that takes.
        gain: the seconds by which a step is shorter than at present; below 0 where it is longer.
        saved: the seconds that the remaining steps gain, less those of the switch.

    The last four are None without a present layout, and ``saved`` without ``remaining_steps``.
    """

    mesh: Mesh
    batch: int
    rank_bytes: int
    fits: bool
    step: StepTime
    moved: int | None = None
    switch_seconds: float | None = None
    gain: float | None = None
    saved: float | None = None

    @property
    def return_ratio(self) -> float | None:
        """Returns how many times the seconds of the switch the remaining steps gain; None where nothing is known."""
        if self.saved is None or not self.switch_seconds:
            return None
        return self.saved / self.switch_seconds + 1

    @property
    def pays(self) -> bool:
        """Tells whether a switch gains more than it takes."""
        return self.saved is not None and self.saved > 0

    def cells(self) -> list[str]:
        found = [str(self.mesh), bytes_text(self.rank_bytes), "yes" if self.fits else "no"]
        found += map(seconds_text, (self.step.compute, self.step.links, self.step.total))
        if self.moved is not None and self.switch_seconds is not None and self.gain is not None:
            ratio = "" if self.return_ratio is None or self.gain <= 0 else f"{self.return_ratio:,.1f}"
            found += [bytes_text(self.moved), seconds_text(self.switch_seconds), seconds_text(self.gain), ratio]
        return found


@dataclass(frozen=True)
class Advice:
    """Holds the result of ``advise``; ``print`` it for a table with a recommendation.

    Args:
        options: the layouts, the fastest first.
        now: the layout of the run at present, if it was given.
        remaining_steps: the number of steps that the run is still to make.
        title: what was planned, in a line.
    """

    options: tuple[Option, ...]
    now: Option | None
    remaining_steps: int | None
    title: str

    @property
    def best(self) -> Option | None:
        """Returns the layout to train in; None where none fits.

        It is the fastest that fits. With the remaining steps of a run it is the one that they end soonest in, which
        may be the present one.
        """
        fitting = [each for each in self.options if each.fits]
        if self.remaining_steps is None:
            return fitting[0] if fitting else None
        return max(fitting, key=lambda each: each.saved or 0.0, default=None)

    def recommendation(self) -> str:
        """Returns a sentence."""
        best, now = self.best, self.now
        if best is None:
            least = min(self.options, key=lambda each: each.rank_bytes)
            return f"None of these layouts fits; {least.mesh} needs least, {bytes_text(least.rank_bytes)} on a rank."
        if now is None:
            return f"Train in {best.mesh}: {seconds_text(best.step.total)} a step, the fastest layout that fits."
        if best is now:
            what = "no other layout is faster" if self.remaining_steps is None else "no switch gains more than it takes"
            return f"Stay in {now.mesh}: of those that fit, {what}."
        assert best.gain is not None and best.switch_seconds is not None
        takes = f"the switch takes {seconds_text(best.switch_seconds)} and each step gains {seconds_text(best.gain)}"
        if self.remaining_steps is None:
            return f"{_switch_to(best)}: {takes}."
        if best.saved is None or not best.pays:
            return f"{_switch_to(best)}: the present layout does not fit."
        return f"{_switch_to(best)}: {takes}, so {self.remaining_steps:,} steps end {seconds_text(best.saved)} sooner."

    def __str__(self) -> str:
        head = list(_HEAD if self.now is not None else _HEAD[:_NUM_PLAIN])
        rows = [head, *(each.cells() for each in self.options)]
        return "\n".join([self.title, "", *table_lines(rows), "", self.recommendation()])


def advise(
    model: nn.Module | str,
    meshes: Sequence[Mapping[str, int]],
    *,
    batch: int,
    card: Card | str,
    now: Mapping[str, int] | None = None,
    remaining_steps: int | None = None,
    **settings: Any,
) -> Advice:
    """Compares layouts of one run: bytes on a rank, seconds of a step, and whether it pays to switch to them::

        meshes = [{"dp": 8}, {"dp": 4, "tp": 2}, {"dp": 4, "replicate": 2}]
        print(advise("7b", meshes, batch=64, sequence=2048, card="h100", now={"dp": 8}, remaining_steps=10_000))

    Nothing is computed and no process group is needed, so any size takes seconds.

    - A rank needs what it stores when a step ends, what FSDP2 has gathered with its gradients, and the activations that
      forward leaves (``RankCost`` and ``Work`` of the planner).
    - A step takes operations / rate of the card, or the time to read and write weights if that is longer, then the
      optimizer's bytes / bandwidth of the memory, then the bytes that are sent / bandwidth of the links (``step_time``
      has formulas and sources). Nothing overlaps, and products reach the card's rate: pass a ``Card`` with rates that
      you have measured.
    - A switch takes the bytes of the rank that sends or receives most, by ``plan_switch``, / bandwidth of a link. The
      new model, and what every rank has whole, as topologies, are not counted.
    - It pays where remaining steps * gain a step > seconds of the switch.

    Args:
        model: a model, dense or compact, on any device, or the name of a preset; it is not changed.
        meshes: layouts, each as ``plan(mesh=...)`` takes it.
        batch: sequences in a step over all ranks, which each layout shares out.
        card: one of "a100", "h100" and "h200", or a ``Card``.
        now: the layout in which the run is at present.
        remaining_steps: how many steps it is still to make.
        settings: others as ``plan`` takes them: ``sequence``, ``tp_plan``, ``density`` (without it a dense model stays
            dense), ``block_shape``, ``dtype``, ``compiled``, ``inputs``, ``loss_fn``.

    Raises:
        ValueError: a ``batch`` that a layout cannot share out equally; an unknown card; meshes that are none, or that
            cannot cut the model; "tp" in a mesh without a ``tp_plan`` for the model; ``remaining_steps`` without
            ``now``; as ``plan`` does.
    """
    found = find_card(card)
    batch = arguments.whole_number("batch", batch, at_least=1)
    layouts = _layouts(meshes, now)
    if remaining_steps is not None:
        remaining_steps = arguments.whole_number("remaining_steps", remaining_steps, at_least=1)
        if now is None:
            raise ValueError("remaining_steps: expected now= beside it, got none; pass the layout of the run, too")
    shares = {mesh: _share(argument, mesh, batch) for mesh, argument in layouts.items()}
    planned = _plan(model, settings | {"batch": batch})
    if any(mesh.parts > 1 for mesh in layouts):
        planned.placement().styles()
    options: dict[Mesh, Option] = {}
    for mesh, argument in layouts.items():
        try:
            options[mesh] = _option(planned.placement(shares[mesh]), mesh, found)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
    present = None if now is None else check_mesh(now, "now")
    if present is not None:
        before = options[present]
        options = {
            mesh: _with_switch(each, before, planned.placement(), found, remaining_steps)
            for mesh, each in options.items()
        }
    title = f"{planned.title}; card {card if isinstance(card, str) else bytes_text(found.memory_bytes)}"
    ordered = sorted(options.values(), key=lambda each: each.step.total)
    return Advice(tuple(ordered), None if present is None else options[present], remaining_steps, title)


def _layouts(meshes: Any, now: Any) -> dict[Mesh, str]:
    """Returns each layout, the present one too → the argument that names it first."""
    if not isinstance(meshes, Sequence) or isinstance(meshes, str) or not meshes:
        raise ValueError(
            f'meshes: expected a list of dicts, got {described(meshes)}; pass [{{"dp": 8}}, {{"dp": 4, "tp": 2}}], say'
        )
    found: dict[Mesh, str] = {}
    for number, mesh in enumerate(meshes):
        found.setdefault(check_mesh(mesh, f"meshes[{number}]"), f"meshes[{number}]")
    if now is not None:
        found.setdefault(check_mesh(now, "now"), "now")
    return found


def _share(argument: str, mesh: Mesh, batch: int) -> int:
    """Returns the sequences of a rank."""
    if batch % mesh.num_readers:
        raise ValueError(
            f"batch: expected a number of sequences that the {mesh.num_readers} readers of {argument} ({mesh}) divide, "
            f"got {batch}; pass a multiple of {mesh.num_readers}"
        )
    return batch // mesh.num_readers


def _plan(model: Any, settings: dict[str, Any]) -> Plan:
    for name in ("mesh", "fits", "density_schedule"):
        if settings.get(name) is not None:
            raise ValueError(f"{name}: expected none, got one; advise plans layouts alone, see smet_compile.plan")
    is_compact = isinstance(model, nn.Module) and bool(find_sites(model))
    if not is_compact and settings.get("density") is None:
        settings = settings | {"density": 1.0}
    return plan(model, **settings)


def _option(placement: Placement, mesh: Mesh, card: Card) -> Option:
    cost, work = placement.on(mesh).sparse, placement.work(mesh)
    needed = cost.persistent + cost.whole_parameters + cost.whole_gradients + work.activations
    return Option(mesh, placement.batch, needed, needed <= card.memory_bytes, step_time(work, cost, mesh, card))


def _with_switch(option: Option, now: Option, placement: Placement, card: Card, remaining_steps: int | None) -> Option:
    switch = switch_between(placement, now.mesh, option.mesh)
    seconds = switch.seconds(card.link_among(max(now.mesh.size, option.mesh.size)))
    gain = now.step.total - option.step.total
    saved = None if remaining_steps is None else remaining_steps * gain - seconds
    return replace(option, moved=switch.total_sent, switch_seconds=seconds, gain=gain, saved=saved)


def _switch_to(option: Option) -> str:
    return f"Switch to {option.mesh}"
