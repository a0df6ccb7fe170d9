"""Counts what a rank of a sharded run sends: in each step, and in each topology update.

Collectives over R ranks are counted as rings make them, of which a rank sends as much as it receives: a gather or a
scatter of a whole of X bytes moves (R - 1) / R X, an all-reduce twice that. FSDP2 gathers each layer in forward and
again in backward, the rest of the model once, and scatters every gradient. Tensor parallelism adds up activations.
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
_FLAG_BYTES, _DIGEST_BYTES = 8, 2 * 8
"""For each weight, all ranks compare a flag, and those that hold one part the least and the greatest fingerprint."""
_MEAN_AGE_BYTES = 8


@dataclass(frozen=True)
class Traffic:
    """Holds the bytes that a rank sends, and as many that it receives.

    Args:
        step: of a training step, by kind: "all-gather" of parameters, "reduce-scatter" of gradients, "all-reduce" of
            gradients over replicas, and "tensor parallel" for outputs of "rowwise" layers and gradients of the inputs
            of "colwise" ones.
        update: of a topology update that drops 20% of the blocks of every compact weight, by kind: "scores" of all
            blocks to drop the smallest, "rows" that move to other ranks (an estimate), "ages" for their mean, "scales"
            of 8-bit moments, "bits" of the parts of weights before and after, "digests" to compare.
        growth: of an update that grows by gradient, beside that: dense gradients are averaged over all ranks that hold
            the same part.
    """

    step: Bytes
    update: Bytes
    growth: int


def traffic_of(parameters: Sequence[Stored], recipes: Sequence[Recipe], mesh: Mesh, sent_by_layers: int = 0) -> Traffic:
    """Counts the traffic of a rank.

    Args:
        recipes: those of the parameters, one by one.
        sent_by_layers: the bytes of the activations that tensor parallelism adds up over its ranks in a step.
    """
    chunks = [mesh.chunk(each.num_stored_rows) * each.row_bytes for each in parameters]
    times = [2 if each.layer else 1 for each in parameters]
    reduced = sum(chunk for each, chunk in zip(parameters, chunks, strict=True) if each.trained)
    others = mesh.shards - 1
    step = {
        "all-gather": others * sum(chunk * gathers for chunk, gathers in zip(chunks, times, strict=True)),
        "reduce-scatter": others * reduced,
        "all-reduce": _all_reduced(reduced, mesh.replicas),
        "tensor parallel": _all_reduced(sent_by_layers, mesh.parts),
    }
    update = dict.fromkeys(("scores", "rows", "ages", "scales", "bits", "digests"), 0)
    growth = 0
    for each, recipe in zip(parameters, recipes, strict=True):
        if each.layout is not None and each.trained:
            for kind, count in _update_bytes(each, recipe, mesh).items():
                update[kind] += count
            growth += _all_reduced_by_alike(each.num_weights * each.dtype.itemsize, mesh)
    return Traffic(step, update, growth)


def _update_bytes(parameter: Stored, recipe: Recipe, mesh: Mesh) -> Bytes:
    """Returns what a topology update of one weight sends."""
    others, num_rows = mesh.shards - 1, mesh.chunk(parameter.num_stored_rows)
    slots, has_ages = recipe.slots(parameter), recipe.has_ages(parameter)
    moment_bytes = slots * parameter.row_values * recipe.dtype_of_moments(parameter.dtype).itemsize
    moved = rows_sent(parameter.num_active, mesh.shards) * (parameter.row_bytes + moment_bytes + has_ages)
    num_parts = 1 if parameter.whole is None else mesh.parts
    has_scales = recipe.has_scales(parameter.dtype)
    scale_bytes = (slots + 1) * parameter.num_scales * SCALE_BYTES if has_scales else 0  # and one that tells who has it
    assert parameter.layout is not None
    return {
        "scores": others * num_rows * compute_dtype(parameter.dtype).itemsize,
        "rows": round(moved),
        "ages": others * num_rows * has_ages + _all_reduced(_MEAN_AGE_BYTES * has_ages, num_parts),
        "scales": _all_reduced(scale_bytes, mesh.shards) + _all_reduced(scale_bytes, num_parts),
        "bits": 2 * (num_parts - 1) * -(-parameter.layout.num_blocks // 8),
        "digests": (
            _all_reduced_by_alike(_FLAG_BYTES + _DIGEST_BYTES, mesh)
            + _all_reduced(_FLAG_BYTES + (_DIGEST_BYTES if num_parts == 1 else 0), mesh.parts)
        ),
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


def _all_reduced_by_alike(num_bytes: int, mesh: Mesh) -> int:
    """Counts an all-reduce over one dimension after the other of the ranks that hold the same parts of weights."""
    return _all_reduced(num_bytes, mesh.shards) + _all_reduced(num_bytes, mesh.replicas)
