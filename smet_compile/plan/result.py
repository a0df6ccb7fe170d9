"""Plan: what a training run will cost, as formulas and as numbers beside dense training; and its printed form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smet_compile.plan.sizes import bytes_text, operations_text
from smet_compile.plan.stored import KINDS, Bytes

if TYPE_CHECKING:
    from sympy import Expr, Symbol

_OF_SPARSITY = ("ages", "index", "buffers")
"""What dense training hardly has."""
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cost:
    """One training run's numbers.

    Args:
        stored: bytes by kind (weights, gradients, moments, ages, index, buffers), exact.
        activations: bytes that forward leaves for backward.
        working: bytes in use at the fullest moment of forward and backward, beside what lay there before: activations
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
        """What the fullest moment needs beyond the activations."""
        return self.working - self.activations

    @property
    def persistent(self) -> int:
        """All that is stored: what a step ends with, before gradients are let go."""
        return sum(self.stored.values())


@dataclass(frozen=True)
class Plan:
    """What ``plan`` found. ``print`` it for a table.

    Args:
        title: what was planned, in a line.
        density: of the weights made sparse, as asked for or solved for. batch, sequence: of a step.
        sparse, dense: costs of this run, and of dense training with ``torch.optim.AdamW(fused=True)``.
        formulas: row → sympy expression of ``sparse`` in d (density), b (batch), s (sequence), B (weights of a block)
            and the counts in ``symbols``. Those of what is stored differ from the exact bytes by at most
            ``rounding_bytes`` together; those of working and scratch hold near this batch, sequence and density.
        symbols: what the counts stand for.
        warnings: where a choice costs more than dense training, a number is a rougher estimate, or rows of
            blocks must stay empty.
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

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(row, formula, sparse, dense, sparse / dense), as text; kinds that neither run has are left out."""
        pairs: list[tuple[str, float, float, Any]] = [
            (kind, self.sparse.stored[kind], self.dense.stored[kind], bytes_text)
            for kind in KINDS
            if self.sparse.stored[kind] or self.dense.stored[kind]
        ]
        pairs += [
            (name, getattr(self.sparse, name), getattr(self.dense, name), text)
            for name, text in (
                ("persistent", bytes_text),
                ("activations", bytes_text),
                ("working", bytes_text),
                ("peak", bytes_text),
                ("operations", operations_text),
            )
        ]
        return [
            (
                name,
                formula_text(self.formulas.get(name)),
                text(mine),
                text(other),
                _ratio(name, mine, other),
            )
            for name, mine, other, text in pairs
        ]

    def legend(self) -> str:
        """The symbols and their values, in a line."""
        values = {"d": f"{self.density:g}", "b": str(self.batch)}
        if self.sequence is not None:
            values["s"] = str(self.sequence)
        values |= {str(symbol): f"{value:,.0f}" for symbol, value in sorted(self.symbols.items(), key=str)}
        return ", ".join(f"{name} = {value}" for name, value in values.items())

    def __str__(self) -> str:
        table = [("", "formula", "sparse", "dense", "ratio"), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = [self.title, ""]
        for row in table:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines += ["", self.legend()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _ratio(name: str, mine: float, other: float) -> str:
    return "" if name in _OF_SPARSITY or not other else f"{mine / other:.2f}"


def formula_text(formula: Expr | None) -> str:
    """``4*d*n_sparse + b*s**2`` → ``4·d·n_sparse + b·s²``."""
    if formula is None:
        return ""
    raised = re.sub(r"\*\*(\d+)", lambda found: found[1].translate(_RAISED), str(formula))
    return raised.replace("*", "·")
