"""Shares out a density among layers: how many blocks of each weight are active."""

from __future__ import annotations

import math

from smet_compile.format import Layout

DISTRIBUTIONS = ("uniform", "er", "erk")


def allocate(layouts: dict[str, Layout], density: float, distribution: str) -> dict[str, int]:
    """Active blocks per weight.

    uniform: every weight has ``density``, exactly (rounded half up, at least one block). er, erk: a layer's
    density is in proportion to the sum of its dimensions over their product (Erdős-Rényi, Mocanu et al. 2018;
    its kernel form counts the kernel's dimensions too, Evci et al. 2020); no layer above 1, the total exact.
    """
    if distribution == "uniform":
        return {name: layout.num_active(density) for name, layout in layouts.items()}
    total = math.floor(density * sum(layout.num_blocks for layout in layouts.values()) + 0.5)
    shares = {name: _score(layout, distribution) * layout.num_blocks for name, layout in layouts.items()}
    caps = {name: layout.num_blocks for name, layout in layouts.items()}
    return share_out(max(total, len(layouts)), shares, caps)


def _score(layout: Layout, distribution: str) -> float:
    """Sum over product of a layer's dimensions: (out, in, kernel...) of a convolution, (R, C) of a matrix."""
    convolution = layout.matrix != layout.shape[-2:]
    dims = layout.shape if convolution else layout.matrix
    if distribution == "er":
        dims = dims[:2]
    return sum(dims) / math.prod(dims)


def share_out(total: int, shares: dict[str, float], caps: dict[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``shares``: each at least 1 and at most its cap, the sum exact.

    What a cap cuts off goes to the others; what rounding leaves over goes to the largest remainders.
    """
    given = {name: float(caps[name]) for name in caps}
    free = set(caps)
    left = float(total)
    while free:
        scale = left / sum(shares[name] for name in free)
        full = {name for name in free if scale * shares[name] >= caps[name]}
        if not full:
            given.update({name: max(1.0, scale * shares[name]) for name in free})
            break
        left -= sum(caps[name] for name in full)
        free -= full
    counts = {name: math.floor(amount) for name, amount in given.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - given[name], name))
    while (short := total - sum(counts.values())) != 0:
        unit = 1 if short > 0 else -1
        movable = [n for n in by_remainder if (counts[n] < caps[n] if unit > 0 else counts[n] > 1)]
        for name in movable[: abs(short)] if unit > 0 else movable[-abs(short) :]:
            counts[name] += unit
    return counts
