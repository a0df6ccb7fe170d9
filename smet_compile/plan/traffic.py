"""Counts what a rank of a sharded run sends: in each step, and in each topology update.

Collectives over R ranks are counted as rings make them, of which a rank sends as much as it receives: a gather or a
scatter of a whole of X bytes moves (R - 1) / R X, an all-reduce twice that. FSDP2 gathers each layer in forward and
again in backward, the rest of the model once, and scatters every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smet_compile.ops.law import compute_dtype
from smet_compile.plan.mesh import Mesh
from smet_compile.plan.stored import SCALE_BYTES, Bytes, Recipe, Stored

DROP_FRACTION = 0.2
"""The share of blocks that the default schedule of a ``TopologyManager`` drops first, which is the largest."""
_DIGEST_BYTES = 3 * 8
"""For each weight, ranks compare a flag and the least and the greatest fingerprint, int64 each."""


@dataclass(frozen=True)
class Traffic:
    """Holds the bytes that a rank sends, and as many that it receives.

    Args:
        step: of a training step, by kind: "all-gather" of parameters, "reduce-scatter" of gradients, and "all-reduce"
            of gradients over replicas.
        update: of a topology update that drops 20% of the blocks of every compact weight, by kind: "scores" of all
            blocks to drop the smallest, "rows" that move to other ranks (an estimate), "ages" for their mean, "scales"
            of 8-bit moments, "digests" to compare.
        growth: of an update that grows by gradient, beside that: dense gradients are averaged over all ranks.
    """

    step: Bytes
    update: Bytes
    growth: int


def traffic_of(parameters: Sequence[Stored], recipes: Sequence[Recipe], mesh: Mesh) -> Traffic:
    """Counts the traffic of a rank. ``recipes`` are those of the parameters, one by one."""
    chunks = [mesh.chunk(each.num_stored_rows) * each.row_bytes for each in parameters]
    times = [2 if each.layer else 1 for each in parameters]
    reduced = sum(chunk for each, chunk in zip(parameters, chunks, strict=True) if each.trained)
    others = mesh.shards - 1
    step = {
        "all-gather": others * sum(chunk * gathers for chunk, gathers in zip(chunks, times, strict=True)),
        "reduce-scatter": others * reduced,
        "all-reduce": _all_reduced(reduced, mesh.replicas),
    }
    update = dict.fromkeys(("scores", "rows", "ages", "scales", "digests"), 0)
    growth = 0
    for each, recipe in zip(parameters, recipes, strict=True):
        if each.layout is not None and each.trained:
            for kind, count in _update_bytes(each, recipe, mesh).items():
                update[kind] += count
            growth += _all_reduced_by_all(each.num_weights * each.dtype.itemsize, mesh)
    return Traffic(step, update, growth)


def _update_bytes(parameter: Stored, recipe: Recipe, mesh: Mesh) -> Bytes:
    """Returns what a topology update of one weight sends."""
    others, num_rows = mesh.shards - 1, mesh.chunk(parameter.num_stored_rows)
    slots, has_ages = recipe.slots(parameter), recipe.has_ages(parameter)
    moment_bytes = slots * parameter.row_values * recipe.dtype_of_moments(parameter.dtype).itemsize
    moved = rows_sent(parameter.num_active, mesh.shards) * (parameter.row_bytes + moment_bytes + has_ages)
    num_scales = parameter.layout.num_groups if parameter.layout and recipe.has_scales(parameter.dtype) else 0
    return {
        "scores": others * num_rows * compute_dtype(parameter.dtype).itemsize,
        "rows": round(moved),
        "ages": others * num_rows * has_ages,
        "scales": _all_reduced(slots * num_scales * SCALE_BYTES, mesh.shards),
        "digests": _all_reduced_by_all(_DIGEST_BYTES, mesh),
    }


def rows_sent(num_rows: int, num_ranks: int, fraction: float = DROP_FRACTION) -> float:
    """Estimates how many rows the rank in the middle, which sends most, sends to others in one topology update.

    Blocks are dropped and grown anywhere in the weight with the same probability. Then more blocks, or fewer, lie
    before the cut at share x of the rows than did, by about a normal number of variance 2 ζ N x (1 - x). The survivors
    among as many rows, a share 1 - ζ, cross the cut, half of the times in one direction.
    """
    middle = (num_ranks - 1) // 2
    spread = sum(math.sqrt(cut * (num_ranks - cut)) / num_ranks for cut in (middle, middle + 1))
    crossing = math.sqrt(fraction * num_rows / math.pi) * spread
    return (1 - fraction) * min(crossing, -(-num_rows // num_ranks))


def _all_reduced(num_bytes: int, num_ranks: int) -> int:
    return 2 * (num_ranks - 1) * num_bytes // num_ranks


def _all_reduced_by_all(num_bytes: int, mesh: Mesh) -> int:
    """Counts an all-reduce over one dimension of the mesh after the other."""
    return _all_reduced(num_bytes, mesh.shards) + _all_reduced(num_bytes, mesh.replicas)
