"""Where a choice costs more than dense training does, in words."""

from __future__ import annotations

from collections.abc import Iterator

from smet_compile.plan.result import Cost
from smet_compile.plan.sizes import bytes_text
from smet_compile.plan.stored import Recipe

_FEW = 0.02
"""The share of a run's bytes from which on something is worth a word."""
_LITTLE = 0.005
"""More than dense training by no more than this share is printed as 1.00 times, and is none."""


def cost_warnings(sparse: Cost, dense: Cost, recipe: Recipe) -> Iterator[str]:
    """One line for each."""
    for what in ("persistent", "peak", "operations"):
        mine, other = getattr(sparse, what), getattr(dense, what)
        if mine > other * (1 + _LITTLE):
            yield f"{what} is {mine / other:.2f} times that of dense training{_because(what, sparse, dense)}"
    more = sparse.stored["moments"] - dense.stored["moments"]
    if more > 0:
        yield (
            f"moments take {bytes_text(more)} more than dense AdamW's, which have the dtype of the weights; "
            'state_dtype="bfloat16" or "int8" makes them smaller'
        )
    lists = sparse.stored["index"] + sparse.stored["ages"] - dense.stored["ages"]
    saved = sum(dense.stored[kind] - sparse.stored[kind] for kind in ("weights", "gradients", "moments"))
    if lists > max(0, saved) and lists > _FEW * sparse.persistent:
        yield (
            f"index and ages take {bytes_text(lists)}, more than the {bytes_text(max(0, saved))} that sparsity saves "
            "in weights, gradients and moments; take larger blocks or a lower density"
        )


def _because(what: str, sparse: Cost, dense: Cost) -> str:
    if what != "persistent":
        return ""
    more = {kind: sparse.stored[kind] - dense.stored[kind] for kind in sparse.stored}
    grown = [f"{kind} +{bytes_text(count)}" for kind, count in more.items() if count > 0]
    return f" ({', '.join(grown)})"
