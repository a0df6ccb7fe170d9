"""Makes and prints a ``Plan``: the cost of a training run, as formulas and as numbers beside dense training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smet_compile.convert import describe_empty_rows
from smet_compile.format import Layout
from smet_compile.format.densities import Stage
from smet_compile.notebook import frame_of, html_lines, html_table, html_text, html_view
from smet_compile.plan import advantage_table, rank_table
from smet_compile.plan.equal_bytes import EqualBytes, compare_at_equal_bytes
from smet_compile.plan.formulas import Formulas, density_shares, expression, rounding_bytes
from smet_compile.plan.mesh import check_mesh
from smet_compile.plan.per_rank import PerRank, has_cut_codes
from smet_compile.plan.placement import Placement
from smet_compile.plan.run import PlannedRun, peak_of
from smet_compile.plan.stages import StagePlan, plan_stages, table_of
from smet_compile.plan.stored import KINDS, Bytes, Recipe, Stored, bytes_text, operations_text, total_bytes
from smet_compile.plan.timeline import Amount, LayeredTimeline, Point
from smet_compile.tables import table_lines

if TYPE_CHECKING:
    from sympy import Expr, Symbol

_WITHOUT_RATIO = ("ages", "index", "buffers")
"""These kinds are hardly there in dense training."""
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_WORTH_A_WARNING = 0.02
"""Lists and ages that take less than this share of a run's bytes are not mentioned."""
_HEADINGS = ("", "formula", "sparse", "dense", "ratio")
_PRINTED_AS_EQUAL = 0.005
"""A cost that exceeds dense training's by no more than this share is printed as 1.00 times, and is not mentioned."""


@dataclass(frozen=True)
class Cost:
    """Holds the numbers of one training run.

    Args:
        stored: bytes by kind (weights, gradients, moments, ages, index, buffers), exact.
        activations: bytes that forward leaves for backward.
        working: bytes in use at the fullest moment of forward and backward, beside what was there before: activations
            that are still needed, gradients made so far, and scratch.
        peak: the most bytes that tensors hold at once.
        operations: floating-point operations of forward and backward.
    """

    stored: Bytes
    activations: int
    working: int
    peak: int
    operations: float

    @property
    def scratch(self) -> int:
        """Returns the bytes that the fullest moment needs beyond the activations."""
        return self.working - self.activations

    @property
    def persistent(self) -> int:
        """Returns the bytes that are stored when a step ends, before gradients are let go."""
        return sum(self.stored.values())


@dataclass(frozen=True)
class Plan:
    """Holds the result of ``plan``; ``print`` it for a table.

    Args:
        title: what was planned, in a line.
        density: the density of the weights made sparse, as asked for or solved for.
        batch: the sequences of a step.
        sequence: the tokens of a sequence; None where the inputs have none.
        sparse: the costs of this run.
        dense: the costs of dense training with ``torch.optim.AdamW(fused=True)``.
        formulas: row → sympy expression of ``sparse`` in d (density), b (batch), s (sequence), B (weights of a block)
            and the counts in ``symbols``. Those of what is stored differ from the exact bytes by at most
            ``rounding_bytes`` together; those of working and scratch hold near this batch, sequence and density.
        symbols: the numbers that the counts stand for.
        warnings: where a choice costs more than dense training, a number is a rougher estimate, or rows of
            blocks must stay empty.
        stages: the cost of each density stage, that before the first included; empty without a density schedule.
            All other numbers are those of the first.
        per_rank: what a rank of the mesh stores and sends, here and in dense training; None without a mesh.
        equal_bytes: this run beside the dense model of as many bytes, by predicted loss; None without tokens,
            and where no weight is sparse.
    """

    title: str
    density: float
    batch: int
    sequence: int | None
    sparse: Cost
    dense: Cost
    formulas: dict[str, Expr] = field(default_factory=dict)
    symbols: dict[Symbol, float] = field(default_factory=dict)
    rounding_bytes: float = 0.0
    warnings: tuple[str, ...] = ()
    stages: tuple[StagePlan, ...] = ()
    per_rank: PerRank | None = None
    equal_bytes: EqualBytes | None = None
    _placement: Placement | None = field(default=None, repr=False, compare=False)

    def on_mesh(self, mesh: Mapping[str, int]) -> PerRank:
        """Returns what a rank of this mesh stores and sends in the planned run, without planning it again.

        Raises ValueError where ``mesh`` is none, or where tensor parallelism cannot cut the model so.
        """
        return self.placement().on(check_mesh(mesh))

    def placement(self, batch: int | None = None) -> Placement:
        """Returns the planned run, to be placed on meshes, at this batch of a rank; the planned one by default."""
        assert self._placement is not None, "plan() passes it"
        return self._placement if batch is None else replace(self._placement, batch=batch)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Returns (row, formula, sparse, dense, sparse / dense) as text, without kinds that neither run has."""
        return [self._row(*row) for row in self._numbers()]

    def _numbers(self) -> list[tuple[str, float, float]]:
        rows: list[tuple[str, float, float]] = [
            (kind, self.sparse.stored[kind], self.dense.stored[kind])
            for kind in KINDS
            if self.sparse.stored[kind] or self.dense.stored[kind]
        ]
        for name in ("persistent", "activations", "working", "peak", "operations"):
            rows.append((name, getattr(self.sparse, name), getattr(self.dense, name)))
        return rows

    def to_pandas(self) -> Any:
        """Returns a ``DataFrame`` with the rows of the table in bytes; a list of dicts where pandas is not installed.

        The row "operations" counts floating-point operations; ``formula`` is the text of the table.
        """
        return frame_of(
            [
                {"name": name, "formula": _formula_text(self.formulas.get(name)), "sparse": sparse, "dense": dense}
                for name, sparse, dense in self._numbers()
            ]
        )

    def _row(self, name: str, sparse: float, dense: float) -> tuple[str, str, str, str, str]:
        text = operations_text if name == "operations" else bytes_text
        ratio = "" if name in _WITHOUT_RATIO or not dense else f"{sparse / dense:.2f}"
        return name, _formula_text(self.formulas.get(name)), text(sparse), text(dense), ratio

    def legend(self) -> str:
        """Returns the symbols and their values in a line."""
        values = {"d": f"{self.density:g}", "b": str(self.batch)}
        if self.sequence is not None:
            values["s"] = str(self.sequence)
        values |= {str(symbol): f"{value:,.0f}" for symbol, value in sorted(self.symbols.items(), key=str)}
        return ", ".join(f"{name} = {value}" for name, value in values.items())

    def stage_table(self) -> str:
        """Returns the bytes of each density stage in a line, and the stage with the highest peak."""
        return table_of(self.stages)

    def rank_table(self) -> str:
        """Returns the bytes that a rank of the mesh stores and sends; an empty text without a mesh."""
        return "" if self.per_rank is None else rank_table.table_of(self.per_rank)

    def equal_bytes_table(self) -> str:
        """Returns on which side the run is beside the dense model of as many bytes; an empty text without tokens."""
        return "" if self.equal_bytes is None else advantage_table.table_of(self.equal_bytes)

    def __str__(self) -> str:
        table = [_HEADINGS, *self.rows()]
        lines = [self.title, "", *table_lines(table, left=(0, 1)), "", self.legend()]
        lines += ["", self.stage_table()] if self.stages else []
        lines += ["", self.rank_table()] if self.per_rank else []
        lines += ["", self.equal_bytes_table()] if self.equal_bytes else []
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_view(
            self.title,
            html_table(_HEADINGS, self.rows(), left=(0, 1)),
            html_lines([self.legend(), *(f"warning: {warning}" for warning in self.warnings)]),
            html_text(self.stage_table() if self.stages else ""),
            html_text(self.rank_table()),
            html_text(self.equal_bytes_table()),
        )


def _formula_text(formula: Expr | None) -> str:
    """Writes ``4*d*n_sparse + b*s**2`` as ``4·d·n_sparse + b·s²``."""
    if formula is None:
        return ""
    raised = re.sub(r"\*\*(\d+)", lambda found: found[1].translate(_RAISED), str(formula))
    return raised.replace("*", "·")


def make_plan(run: PlannedRun, batch: int, stages: Sequence[Stage] = ()) -> Plan:
    """Makes the plan of a run at this batch, with these density stages."""
    timeline, point, stored = run.timeline, run.point(batch), run.stored()
    sparse = _cost(total_bytes(stored, run.recipe, run.buffers), timeline, point, run.operations())
    by_torch = Recipe(fused_update=False, by_torch=True)
    dense_bytes = total_bytes((each.dense() for each in stored), by_torch, run.buffers)
    dense = _cost(dense_bytes, run.dense_timeline, point, run.operations(dense=True))
    formulas, symbols = _formulas(run, stored, point)
    placement = Placement(run, batch)
    placed = None if run.request.mesh is None else placement.on(run.request.mesh)
    tokens, efficiency = run.request.tokens, run.request.sparse_efficiency
    compared = compare_at_equal_bytes(run, batch, tokens, efficiency) if tokens is not None and run.sites else None
    return Plan(
        title=_title(run, batch),
        density=run.density,
        batch=batch,
        sequence=run.request.sequence,
        sparse=sparse,
        dense=dense,
        formulas=formulas,
        symbols=symbols,
        rounding_bytes=rounding_bytes(stored, run.recipe),
        warnings=tuple([*_run_warnings(run), *_cost_warnings(sparse, dense), *_rank_warnings(run, placed)]),
        stages=tuple(plan_stages(run, stages, batch)),
        per_rank=placed,
        equal_bytes=compared,
        _placement=placement,
    )


def _cost(stored: Bytes, timeline: LayeredTimeline, point: Point, operations: Amount) -> Cost:
    activations = point.value(timeline.saved)
    working = point.value(timeline.fullest(point))
    peak = peak_of(stored, timeline, point)
    return Cost(stored, round(activations), round(working), round(peak), point.value(operations))


def _formulas(run: PlannedRun, stored: list[Stored], point: Point) -> tuple[dict[str, Expr], dict[Symbol, float]]:
    selection = run.request.selection
    follows = selection["distribution"] == "uniform" and run.requested_density is not None
    shares = density_shares(stored, run.density, selection["rules"], follows)
    of_stored = Formulas(stored, shares, run.recipe, run.buffers)
    formulas: dict[str, Any] = of_stored.by_kind()
    formulas["persistent"] = sum(formulas.values())
    formulas["activations"] = expression(run.timeline.saved, run.density)
    formulas["working"] = expression(run.timeline.fullest(point), run.density)
    formulas["scratch"] = formulas["working"] - formulas["activations"]
    formulas["operations"] = expression(run.operations(), run.density)
    return formulas, of_stored.values


def _title(run: PlannedRun, batch: int) -> str:
    request = run.request
    layouts = [site.layout for site in run.sites.values()]
    block = f", {_block_text(layouts[0])}" if layouts else ""
    sequence = "" if request.sequence is None else f" x {request.sequence} tokens"
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in run.model.parameters()}))
    optimizer = "" if request.optimizer == "adamw" else f"optimizer {request.optimizer}, "
    moments = str(request.moment_dtype or "float32").removeprefix("torch.")
    how = "compiled" if request.compiled else "eager"
    update = ", update in backward" if run.recipe.fused_update and layouts else ""
    ends = ", checkpointing" if request.step.checkpointing else ""
    return (
        f"{request.name}: density {run.density:g}{block}; batch {batch}{sequence}; "
        f"{dtypes}, {optimizer}moments {moments}; {how}{update}{ends}"
    )


def _block_text(layout: Layout) -> str:
    if layout.single_weights:
        return "single weights"
    bm, bn = layout.block_shape
    return f"{'tiles' if layout.tiles else 'runs'} of {bm} x {bn}"


def _run_warnings(run: PlannedRun) -> Iterator[str]:
    if run.request.tokens is not None and not run.sites:
        yield "no weight is sparse, so nothing is compared with a dense model of as many bytes"
    if run.breaks:
        yield (
            "the step breaks into several graphs, so activations and scratch are those of an eager step, and no update "
            "is fused"
        )
    if warning := describe_empty_rows((site.name, site.layout, site.num_active) for site in run.sites.values()):
        yield warning


def _cost_warnings(sparse: Cost, dense: Cost) -> Iterator[str]:
    """Says where a choice costs more than dense training."""
    for name in ("persistent", "peak", "operations"):
        cost, dense_cost = getattr(sparse, name), getattr(dense, name)
        if cost > dense_cost * (1 + _PRINTED_AS_EQUAL):
            reason = _larger_kinds(sparse, dense) if name == "persistent" else ""
            yield f"{name} is {cost / dense_cost:.2f} times that of dense training{reason}"
    more, edges = (sparse.stored[kind] - dense.stored[kind] for kind in ("moments", "weights"))
    if (
        more > 0
        and sparse.stored["moments"] * dense.stored["weights"] > dense.stored["moments"] * sparse.stored["weights"]
    ):
        yield (
            f"moments take {bytes_text(more)} more than dense AdamW's, which have the dtype of the weights; "
            'moment_dtype="bfloat16" or "int8" makes them smaller'
        )
    if edges > 0:
        yield (
            f"weights take {bytes_text(edges)} more than dense ones, since blocks hang over the edges of matrices; "
            "take smaller blocks, or sizes that divide the matrices"
        )
    lists = sparse.stored["index"] + sparse.stored["ages"] - dense.stored["ages"]
    saved = sum(dense.stored[kind] - sparse.stored[kind] for kind in ("weights", "gradients", "moments"))
    if lists > max(0, saved) and lists > _WORTH_A_WARNING * sparse.persistent:
        yield (
            f"index and ages take {bytes_text(lists)}, more than the {bytes_text(max(0, saved))} that sparsity saves "
            "in weights, gradients and moments; take larger blocks or a lower density"
        )


def _rank_warnings(run: PlannedRun, placed: PerRank | None) -> Iterator[str]:
    """Says where a rank stores more than in dense training, and what cannot be trained as it was asked for."""
    if placed is None:
        return
    if any(has_cut_codes(each, run.recipe) for each in run.stored()):
        yield (
            'moment_dtype: of sharded parameters only tiles have moments of "int8", and optimizers refuse it for all '
            "others; a rank is planned with moments of bfloat16 for those, by an optimizer of their own"
        )
    sparse, dense = placed.sparse, placed.dense
    more = sparse.persistent - dense.persistent
    if _PRINTED_AS_EQUAL * dense.persistent < more <= sparse.topology:
        yield (
            f"a rank stores {sparse.persistent / dense.persistent:.2f} times what it does in dense training: "
            f"topologies, which every rank has whole, take {bytes_text(sparse.topology)}; take larger blocks or fewer "
            "ranks"
        )


def _larger_kinds(sparse: Cost, dense: Cost) -> str:
    more = {kind: sparse.stored[kind] - dense.stored[kind] for kind in sparse.stored}
    return f" ({', '.join(f'{kind} +{bytes_text(count)}' for kind, count in more.items() if count > 0)})"
