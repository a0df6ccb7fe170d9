"""What a planned run's numbers say: costs, formulas, notes, as a ``Plan``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from smet_compile.convert import describe_empty_rows
from smet_compile.format import Layout
from smet_compile.ops import find_sites
from smet_compile.plan import (
    Amount,
    Cost,
    Formulas,
    Plan,
    Point,
    Recipe,
    Shares,
    Stack,
    Stored,
    expression,
    rounding_bytes,
    total_bytes,
)
from smet_compile.plan.stored import Bytes
from smet_compile.plan.warn import cost_warnings
from smet_compile.planner.run import PlannedRun, peak_of

if TYPE_CHECKING:
    from sympy import Expr, Symbol


def plan_of(run: PlannedRun, batch: int) -> Plan:
    """The plan at this batch."""
    timeline, point = run.timeline, run.point(batch)
    stored = run.stored()
    sparse = _cost(total_bytes(stored, run.recipe, run.buffers), timeline, point, run.operations())
    by_torch = Recipe(fused_update=False, by_torch=True)
    dense_bytes = total_bytes((each.dense() for each in stored), by_torch, run.buffers)
    dense = _cost(dense_bytes, run.dense_timeline, point, run.operations(dense=True))
    formulas, symbols = _formulas(run, stored, point)
    return Plan(
        title=_title(run, batch),
        density=run.density,
        batch=batch,
        sequence=run.wish.sequence,
        sparse=sparse,
        dense=dense,
        formulas=formulas,
        symbols=symbols,
        rounding_bytes=rounding_bytes(stored, run.recipe),
        warnings=tuple([*_notes(run), *cost_warnings(sparse, dense, run.recipe)]),
    )


def _cost(stored: Bytes, timeline: Stack, point: Point, operations: Amount) -> Cost:
    activations = point.value(timeline.saved)
    working = point.value(timeline.fullest(point))
    peak = peak_of(stored, timeline, point)
    return Cost(stored, round(activations), round(working), round(peak), point.value(operations))


def _formulas(run: PlannedRun, stored: list[Stored], point: Point) -> tuple[dict[str, Expr], dict[Symbol, float]]:
    made = Formulas(stored, _shares(run, stored), run.recipe, run.buffers)
    formulas = made.by_kind()
    formulas["persistent"] = sum(formulas.values())
    fullest = run.timeline.fullest(point)
    formulas["activations"] = expression(run.timeline.saved, run.density)
    formulas["working"] = expression(fullest, run.density)
    formulas["scratch"] = formulas["working"] - formulas["activations"]
    formulas["operations"] = expression(run.operations(), run.density)
    return formulas, made.values


def _shares(run: PlannedRun, stored: list[Stored]) -> Shares:
    """1 where a weight has the density asked for; None where a rule set another; else its share at this density."""
    sites = {each.name: each for each in stored if each.layout is not None}
    selection = run.wish.selection
    ruled = ruled_names(selection["rules"], sites)
    if selection["distribution"] == "uniform" and run.asked is not None:
        return {name: None if name in ruled else 1.0 for name in sites}
    return {name: None if name in ruled else each.density / run.density for name, each in sites.items()}


def ruled_names(rules: Any, names: Iterable[str]) -> set[str]:
    """The weights whose density a rule sets."""
    globs = list(rules or {})
    return {name for name in names if any(_matches(name, glob) for glob in globs)}


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _notes(run: PlannedRun) -> Iterable[str]:
    if run.broken:
        yield (
            "the step breaks into several graphs, so activations and scratch are those of an eager step, and no update "
            "is fused"
        )
    sites = find_sites(run.model).values()
    if empty := describe_empty_rows((site.name, site.layout, site.num_active) for site in sites):
        yield empty


def _title(run: PlannedRun, batch: int) -> str:
    wish = run.wish
    first = next(iter(find_sites(run.model).values()), None)
    block = "" if first is None else f", {_block_text(first.layout)}"
    sequence = "" if wish.sequence is None else f" x {wish.sequence} tokens"
    dtypes = {str(p.dtype).removeprefix("torch.") for p in run.model.parameters()}
    how = "compiled" if wish.compiled else "eager"
    update = ", update in backward" if run.recipe.fused_update and first is not None else ""
    state = str(wish.state_dtype or "float32").removeprefix("torch.")
    ends = ", checkpointing" if wish.step.checkpointing else ""
    return (
        f"{wish.name}: density {run.density:g}{block}; batch {batch}{sequence}; "
        f"{' and '.join(sorted(dtypes))}, moments {state}; {how}{update}{ends}"
    )


def _block_text(layout: Layout) -> str:
    if layout.single_weights:
        return "single weights"
    bm, bn = layout.block_shape
    return f"{'tiles' if layout.tiles else 'runs'} of {bm} x {bn}"
