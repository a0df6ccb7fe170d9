"""What is allowed, and hardly meant: the warnings of sparsify."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from smet_compile.convert.choose import Choice
from smet_compile.convert.compact import Drawn
from smet_compile.convert.report import Report, num_active_weights
from smet_compile.format import Layout

_WARN_ABOVE = 1.5
_STACKLEVEL = 3  # the caller of sparsify
_NAMED = 3


def warn_if_dense(before: Report, drawn: Sequence[Drawn], reasons: Mapping[str, str], density: float) -> None:
    """Warns where what will stay dense is so much that little is saved.

    Args:
        before: the report of the model before ``drawn`` weights become compact.
        reasons: why each other weight stays dense. density: what was asked for.
    """
    saved = sum(each.choice.layout.num_weights - num_active_weights(each.compact) for each in drawn)
    made_density = (before.num_active_weights - saved) / max(1, before.num_weights)
    if made_density <= _WARN_ABOVE * density:
        return
    compact = {each.choice.weight.name for each in drawn}
    skipped = [row for row in before.skipped if row.name not in compact]
    largest = sorted(skipped, key=lambda row: -row.num_weights)[:_NAMED]
    left = ", ".join(
        f"{row.name} ({row.num_weights:,} weights: {reasons.get(row.name, row.reason)})" for row in largest
    )
    why = f"largest left dense: {left}" if left else "a weight keeps at least one block; use smaller blocks"
    warnings.warn(
        f"sparsify: the model's matrices as a whole have density {made_density:.2f}, more than 1.5 times the "
        f"{density} asked for; {why}",
        stacklevel=_STACKLEVEL,
    )


def warn_if_larger(choices: Iterable[Choice]) -> None:
    """Warns where the blocks of a weight, which hang over its edge, take more memory than the dense weight."""
    larger = [choice for choice in choices if choice.values_bytes > choice.dense_bytes]
    if not larger:
        return
    named = ", ".join(
        f"{choice.weight.name} ({choice.values_bytes:,} bytes in blocks of {choice.layout.block_shape}, "
        f"{choice.dense_bytes:,} dense)"
        for choice in sorted(larger, key=lambda choice: choice.dense_bytes - choice.values_bytes)[:_NAMED]
    )
    others = f" and {len(larger) - _NAMED} more" if len(larger) > _NAMED else ""
    warnings.warn(
        f"sparsify: compact weights that take more memory than dense ones: {named}{others}; take smaller blocks, or "
        "leave these weights dense with exclude=",
        stacklevel=_STACKLEVEL,
    )


def warn_if_rows_are_empty(choices: Iterable[Choice]) -> None:
    """Where a weight gets fewer active blocks than it has rows, or columns, of blocks."""
    doubt = empty_rows((choice.weight.name, choice.layout, choice.num_active) for choice in choices)
    if doubt:
        warnings.warn(f"sparsify: {doubt}, and see smet_compile.inspect", stacklevel=_STACKLEVEL)


def empty_rows(weights: Iterable[tuple[str, Layout, int]]) -> str:
    """Which of the weights (name, layout, number of active blocks) have too few blocks for their rows or columns."""
    few = []
    for name, layout, count in weights:
        rows, cols = (layout.num_matrices * n for n in (layout.block_rows, layout.block_cols))
        if count < max(rows, cols):
            few.append(f"{name} ({count:,} blocks for {rows:,} rows and {cols:,} columns of blocks)")
    if not few:
        return ""
    others = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
    return (
        f"{', '.join(few[:_NAMED])}{others}: some outputs or inputs have no weight at all; take smaller blocks or a "
        "higher density"
    )
