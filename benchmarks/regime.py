"""Draws where sparse training wins at equal bytes and at equal time, and prints its table: docs/choosing.md has both.

    python -m benchmarks.regime [--out docs/figures]

Models are planned, nothing is trained: LLaMAs of the presets in fp32, in tiles of 64 or single weights, each beside the
dense model of as many bytes. Losses are those of a published scaling law (``smet_compile.plan.scaling_law``).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import smet_compile as smet
from benchmarks.studies import topology
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import interval
from benchmarks.studies.reports.page import PAGES, new_figure, tidy
from benchmarks.studies.reports.topology import losses
from benchmarks.studies.scale import SCALES
from smet_compile.plan.advantage import Advantage
from smet_compile.plan.equal_bytes import EqualBytes, count_text
from smet_compile.plan.scaling_law import FITTED_WEIGHTS, LEAST_DIFFERENCE, predict_loss, tokens_to_reach

SIZES = ("60m", "130m", "350m", "1b", "3b", "7b")
SIZE, TILE = "1b", 64
DENSITIES = (0.5, 0.25, 0.1)
EFFICIENCIES = (0.4, 0.5, 0.7, 0.9)
TOKENS_PER_WEIGHT = (20, 100)
MEASURED_DENSITY = 0.25
HEAD = (
    "| density | dense model of as many bytes | ahead at equal tokens by | share to keep if tiles run at 0.4 of the "
    "dense rate | 0.5 | 0.7 | 0.9 | single weights ahead from |",
    "|---|---|---|---|---|---|---|---|",
)
_MOST_PER_WEIGHT = 1000
_PER_WEIGHT = [10 ** (0.5 + place / 100) for place in range(251)]
_COLORS = dict(zip(DENSITIES, ("C0", "C1", "C2"), strict=True))


@cache
def planned(size: str, density: float, block_shape: int) -> EqualBytes:
    """Plans a preset beside the dense model of as many bytes."""
    found = smet.plan(size, density, block_shape=block_shape, batch=1, compiled=False, tokens=1e9).equal_bytes
    assert found is not None
    return found


def at_time(found: EqualBytes, per_weight: float, efficiency: float | None) -> Advantage:
    """Returns the comparison in the time in which the dense model reads so many tokens for each of its weights."""
    one, ratio = found.advantage, found.operations.time_ratio(efficiency)
    return replace(one, tokens=per_weight * one.dense_weights / ratio, time_ratio=ratio)


def break_even_efficiency(found: EqualBytes, per_weight: float) -> float:
    """Returns the rate of tiles at which neither is ahead in that time; infinity where none is enough."""
    one = found.advantage
    dense_tokens = per_weight * one.dense_weights
    needed = tokens_to_reach(predict_loss(one.dense_weights, dense_tokens), one.num_weights, one.density)
    return found.operations.efficiency_of(dense_tokens / needed)


def least_tokens_per_weight(found: EqualBytes) -> float:
    """Returns the tokens for each dense weight from which on single weights are ahead at equal time."""
    one = found.advantage
    return one.tokens_to_break_even * one.time_ratio / one.dense_weights


def measured_share() -> tuple[float, float, float]:
    """Returns what tiles kept of the advantage of single weights in the study of topology updates, and its interval.

    The advantage is the loss of the dense model of as many weights less that of the sparse one, by seed. The interval
    is Fieller's: the shares that a paired t-test at 5% does not refuse.
    """
    records = Records(PAGES / "studies" / f"{topology.NAME}.jsonl")
    shape = topology.for_tiles(SCALES["cpu"].replicas)
    half = topology.narrower(shape, 0.5, 0.5)
    text = {"steps": topology.steps_of(shape)}
    dense = topology.run_of(half, 1.0, topology.STATIC, text)
    tiles = topology.run_of(shape, MEASURED_DENSITY, topology.STATIC, {"block": "4"})
    single = topology.run_of(shape, MEASURED_DENSITY, topology.STATIC)
    of_dense, of_tiles, of_single = (losses(records, case) for case in (dense, tiles, single))
    seeds = sorted(of_dense.keys() & of_tiles.keys() & of_single.keys())
    kept = [of_dense[seed] - of_tiles[seed] for seed in seeds]
    whole = [of_dense[seed] - of_single[seed] for seed in seeds]
    return share_with_interval(kept, whole)


def share_with_interval(kept: Sequence[float], whole: Sequence[float]) -> tuple[float, float, float]:
    """Returns the ratio of two means of pairs with Fieller's 95% interval, infinite where ``whole`` may be zero."""
    num, mean_kept, mean_whole = len(kept), statistics.fmean(kept), statistics.fmean(whole)
    together = interval(whole)
    if not together.excludes_zero:
        return mean_kept / mean_whole, -math.inf, math.inf
    quantile = together.half / (statistics.stdev(whole) / math.sqrt(num))
    square = mean_whole**2 - quantile**2 * statistics.variance(whole) / num
    middle = mean_kept * mean_whole - quantile**2 * statistics.covariance(kept, whole) / num
    rest = mean_kept**2 - quantile**2 * statistics.variance(kept) / num
    root = math.sqrt(middle**2 - square * rest)
    return mean_kept / mean_whole, (middle - root) / square, (middle + root) / square


def rows() -> Iterator[str]:
    """Yields the rows of the table, with the share that tiles have to keep after 20 and 100 tokens a dense weight."""
    for density in DENSITIES:
        tiles, single = planned(SIZE, density, TILE), planned(SIZE, density, 1)
        shares = [
            ", ".join(f"{at_time(tiles, each, efficiency).break_even_share:.2f}" for each in TOKENS_PER_WEIGHT)
            for efficiency in EFFICIENCIES
        ]
        from_on = least_tokens_per_weight(single)
        cells = [
            f"{density:g}",
            f"{tiles.width:.2f} times as wide, {count_text(tiles.advantage.dense_weights)}",
            f"{tiles.advantage.at_equal_tokens:+.3f}",
            *shares,
            f"over {_MOST_PER_WEIGHT:,}" if from_on > _MOST_PER_WEIGHT else f"{from_on:,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def draw() -> Any:
    """Draws the figure: equal tokens, equal time, and what tiles have to keep."""
    figure = new_figure(width=10.5, height=7.6)
    figure.supxlabel(
        "* If tiles learn like as many single weights, which are all that the law knows. Upper right: a line ends "
        "where dense products would do.\n"
        "Lower panels: each line is for a rate of products with tiles over that of dense ones.",
        fontsize=8,
    )
    upper, lower = figure.subfigures(2, 1)
    left, right = upper.subplots(1, 2)
    _draw_equal_tokens(left)
    _draw_efficiency(right)
    share = measured_share()
    for density, axes in zip(DENSITIES, lower.subplots(1, 3, sharey=True), strict=True):
        _draw_shares(axes, density, share)
    return figure


def _draw_equal_tokens(axes: Any) -> None:
    for density in DENSITIES:
        for block_shape, style, name in ((TILE, "-", "tiles of 64*"), (1, ":", "single weights")):
            found = [planned(size, density, block_shape) for size in SIZES]
            weights = [each.advantage.dense_weights for each in found]
            differences = [each.advantage.at_equal_tokens for each in found]
            axes.plot(weights, differences, style, color=_COLORS[density], label=f"d = {density:g}, {name}")
            for place, each in enumerate(found):
                inside = is_inside_fit(each.advantage)
                face = _COLORS[density] if inside else "white"
                axes.plot(weights[place], differences[place], "o", color=_COLORS[density], mfc=face, markersize=4)
    axes.axhspan(-LEAST_DIFFERENCE, LEAST_DIFFERENCE, color="0.9", zorder=0, label="the law cannot tell")
    axes.plot([], [], "o", color="0.3", mfc="white", markersize=4, label="a size outside the fit")
    axes.axhline(0, color="k", linewidth=0.8)
    tidy(
        axes,
        xscale="log",
        xlabel=f"weights of the dense model of as many bytes ({SIZES[0]} to {SIZES[-1]})",
        ylabel="loss of dense less that of sparse",
    )
    axes.set_title("Equal bytes, equal tokens: above 0 sparse is ahead", fontsize=10)
    axes.legend(fontsize=7, loc="lower right")


def is_inside_fit(one: Advantage) -> bool:
    """Tells whether both sizes are among those that the law was fitted to."""
    least, most = FITTED_WEIGHTS
    return all(least <= each <= most for each in (one.num_weights, one.dense_weights))


def _draw_efficiency(axes: Any) -> None:
    for density in DENSITIES:
        found = planned(SIZE, density, TILE)
        efficiencies = [break_even_efficiency(found, each) or math.nan for each in _PER_WEIGHT]
        axes.plot(_PER_WEIGHT, efficiencies, color=_COLORS[density], label=f"neither is, d = {density:g}")
    for efficiency in EFFICIENCIES:
        axes.axhline(efficiency, color="0.6", linewidth=0.7, linestyle="--")
    axes.text(0.97, 0.92, "sparse is ahead", transform=axes.transAxes, ha="right", fontsize=9, style="italic")
    axes.text(0.03, 0.37, "dense is ahead", transform=axes.transAxes, fontsize=9, style="italic")
    tidy(
        axes,
        xscale="log",
        ylim=(0, 1.2),
        xlabel="tokens that the dense model reads for each of its weights",
        ylabel="rate of tiles over that of dense products",
    )
    axes.set_title(f"Equal bytes, equal time: preset {SIZE}, tiles of 64*", fontsize=10)
    axes.legend(fontsize=8, loc="lower left")


def _draw_shares(axes: Any, density: float, measured: tuple[float, float, float]) -> None:
    found = planned(SIZE, density, TILE)
    ends: dict[float, list[str]] = {}
    for efficiency, style in zip(EFFICIENCIES, ("-.", ":", "-", "--"), strict=True):
        shares = [at_time(found, each, efficiency).break_even_share for each in _PER_WEIGHT]
        axes.plot(_PER_WEIGHT, shares, style, color=_COLORS[density])
        ends.setdefault(round(shares[-1], 6), []).append(f"{efficiency:g}")
    for share, names in ends.items():
        axes.text(_PER_WEIGHT[-1] * 1.15, share, ", ".join(names), fontsize=8, va="center")
    if density == MEASURED_DENSITY:
        share, low, high = measured
        axes.axhspan(low, high, color="0.9", zorder=0)
        axes.axhline(share, color="0.4", linewidth=0.8)
        text = f"kept in small runs:\n{share:.2f} ({low:.2f} to {high:.2f})"
        axes.text(0.98, share + 0.03, text, fontsize=8, ha="right", transform=axes.get_yaxis_transform())
    axes.text(0.97, 0.92, "above: sparse is ahead", transform=axes.transAxes, ha="right", fontsize=8, style="italic")
    axes.text(0.03, 0.03, "below: dense is ahead", transform=axes.transAxes, fontsize=8, style="italic")
    tidy(axes, xscale="log", xlim=(3, 2500), ylim=(-0.15, 1.6), xlabel="tokens of the dense model a weight")
    axes.set_title(f"Equal time, d = {density:g}", fontsize=10)
    if density == DENSITIES[0]:
        axes.set_ylabel("share of the advantage\nthat tiles have to keep")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the PNG file")
    args = parser.parse_args()
    draw().savefig(args.out / "regime.png", dpi=110)
    print(args.out / "regime.png", *HEAD, *rows(), sep="\n")
    share, low, high = measured_share()
    print(f"share that tiles kept in the study of topology updates: {share:.2f}, 95% interval {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
