"""Prints what each rank of a sharded run stores and sends, beside dense training on the same mesh."""

from __future__ import annotations

from collections.abc import Iterator

from smet_compile.plan.per_rank import PerRank, RankCost
from smet_compile.plan.stored import Bytes, bytes_text
from smet_compile.tables import table_lines

Row = tuple[str, str, str, str]
_WITHOUT_RATIO = ("plain parameters", "ages", "buffers")
"""Dense training has other parameters under the first, and hardly anything under the others."""
_USUAL_STEPS = 100
"""The steps between topology updates, by default."""


def table_of(per_rank: PerRank) -> str:
    """Returns three tables: what a rank stores, what it sends in a step, and what it sends in a topology update."""
    tables = "\n".join(table_lines(list(_all_rows(per_rank))))
    step, update = (sum(traffic.values()) for traffic in (per_rank.sparse.traffic.step, per_rank.sparse.traffic.update))
    if step and update:
        tables += f"\nan update every {_USUAL_STEPS} steps adds {update / step / _USUAL_STEPS:.1%} to what is sent"
    return tables


def _all_rows(per_rank: PerRank) -> Iterator[Row]:
    sparse, dense = per_rank.sparse, per_rank.dense
    yield f"a rank of {per_rank.mesh}", "sparse", "dense", "ratio"
    yield from _rows(sparse.stored | {"persistent": sparse.persistent}, dense.stored | {"persistent": dense.persistent})
    yield from _rows(_whole(sparse), _whole(dense))
    yield "", "", "", ""
    yield "sent in a step", "sparse", "dense", "ratio"
    yield from _rows(_with_sum(sparse.traffic.step), _with_sum(dense.traffic.step))
    if sparse.topology:
        yield "", "", "", ""
        yield "sent in a topology update", "sparse", "", ""
        update = {"rows (estimate)" if kind == "rows" else kind: n for kind, n in sparse.traffic.update.items()}
        yield from _rows(_with_sum(update) | {"more to grow by gradient": sparse.traffic.growth}, {})


def _rows(sparse: Bytes, dense: Bytes) -> Iterator[Row]:
    """Yields a row for each kind that either run has."""
    for kind in dict.fromkeys([*sparse, *dense]):
        one, other = sparse.get(kind, 0), dense.get(kind, 0)
        if one or other:
            shown = bytes_text(other) if dense else ""
            yield (
                kind,
                bytes_text(one),
                shown,
                f"{one / other:.2f}" if one and other and kind not in _WITHOUT_RATIO else "",
            )


def _whole(cost: RankCost) -> Bytes:
    return {"whole parameters": cost.whole_parameters, "whole gradients": cost.whole_gradients}


def _with_sum(traffic: Bytes) -> Bytes:
    return traffic | {"together": sum(traffic.values())}
