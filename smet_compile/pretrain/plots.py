"""Draws the plots of a run's report from its records: losses, what became of the blocks that were grown, bytes."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from smet_compile.presets import require
from smet_compile.pretrain.memory import BYTE_KINDS
from smet_compile.pretrain.metrics import Record, of_kind

CAPTIONS = {
    "loss.png": "Loss; dotted lines are topology updates",
    "churn.png": "Blocks grown by each topology update, and how many of them were still active two updates later",
    "bytes.png": "Bytes by kind beside dense AdamW",
}
SMOOTHING_FRACTION = 0.02
MOST_UPDATE_LINES = 60
MOST_NAMES = 16
KEPT, LOST, UNJUDGED = "C0", "C1", "0.8"
Counts = dict[str, int]


def draw_plots(records: list[Record], folder: Path) -> list[str]:
    """Writes the PNG files that the metrics allow into `folder`; returns their names."""
    require("matplotlib").use("Agg")
    drawings = {"loss.png": _draw_loss, "churn.png": _draw_churn, "bytes.png": _draw_bytes}
    return [name for name, draw in drawings.items() if _draw(draw, records, folder / name)]


def _draw(draw: Callable[[Any, list[Record]], bool], records: list[Record], path: Path) -> bool:
    figures = require("matplotlib.figure")
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    drawn = draw(figure, records)
    if drawn:
        figure.savefig(path, dpi=120)
    return drawn


def smoothed(values: list[float]) -> list[float]:
    """Returns the mean of each value and those around it."""
    half = max(1, round(SMOOTHING_FRACTION * len(values) / 2))
    windows = [values[max(0, middle - half) : middle + half + 1] for middle in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw_loss(figure: Any, records: list[Record]) -> bool:
    train, evals, axes = of_kind(records, "train"), of_kind(records, "eval"), figure.subplots()
    steps = [record["step"] for record in train]
    axes.plot(steps, [record["loss"] for record in train], color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(steps, smoothed([record["loss"] for record in train]), color="C0", label="training, running mean")
    if evals:
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", color="C3", label="held-out text")
    updates = of_kind(records, "topology")
    for number, record in enumerate(updates if len(updates) <= MOST_UPDATE_LINES else ()):
        label = "topology update" if number == 0 else None
        axes.axvline(record["step"], color="C2", alpha=0.5, linewidth=0.7, linestyle=":", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return bool(train)


def _draw_churn(figure: Any, records: list[Record]) -> bool:
    """Draws how many blocks each update grew and how many of them stayed; on the right, which share, by layer."""
    updates = [record["event"] for record in of_kind(records, "topology")]
    names = list(updates[0]["sites"]) if updates else []
    fates = [fate_of(updates, number, names) for number in range(len(updates))]
    if not any(grown for grown, _ in fates):
        return False
    bars, shares = figure.subplots(1, 2, width_ratios=(1, 1.15))
    draw_fates(bars, [update["step"] for update in updates], fates)
    bars.set(xlabel="topology update after step", ylabel="blocks grown")
    judged = [number for number, (_, kept) in enumerate(fates) if kept is not None]
    if judged:
        _draw_shares(figure, shares, names, [(updates[i]["step"], _shares(updates, i, names)) for i in judged])
    else:
        shares.set_axis_off()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return True


def fate_of(updates: list[dict[str, Any]], number: int, names: list[str]) -> tuple[int, int | None]:
    """Returns how many blocks an update grew in some weights, and how many were active after the second one from it.

    The latter is None where the run or its records end before.
    """
    following = _counts(updates, number + 1, names)
    later = _counts(updates, number + 2, names)
    here = _counts(updates, number, names)
    grown = later.get("num_grown_earlier", following.get("num_grown", here.get("num_dropped", 0)))
    return grown, later.get("num_surviving_earlier")


def _counts(updates: list[dict[str, Any]], number: int, names: list[str]) -> Counts:
    """Returns the counts of an update over some weights; records of older versions lack some."""
    if number >= len(updates):
        return {}
    sites = [updates[number]["sites"][name] for name in names if name in updates[number]["sites"]]
    wanted = ("num_grown_earlier", "num_surviving_earlier", "num_grown", "num_dropped")
    return {key: sum(site[key] for site in sites) for key in wanted if sites and all(key in site for site in sites)}


def draw_fates(axes: Any, steps: list[int], fates: list[tuple[int, int | None]]) -> None:
    """Draws a bar for each generation of blocks: how many stayed, how many were dropped again, how many are young."""
    width = 0.8 * min((after - before for before, after in pairwise(steps)), default=1)
    parts: dict[str, tuple[str, list[int]]] = {
        "stayed": (KEPT, [kept or 0 for _, kept in fates]),
        "dropped again": (LOST, [0 if kept is None else grown - kept for grown, kept in fates]),
        "too young to tell": (UNJUDGED, [grown if kept is None else 0 for grown, kept in fates]),
    }
    below = [0] * len(fates)
    for label, (color, heights) in parts.items():
        axes.bar(steps, heights, width, bottom=below, color=color, label=label if any(heights) else None)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_ylim(0, 1.05 * max(below, default=1))


def _shares(updates: list[dict[str, Any]], number: int, names: list[str]) -> list[float]:
    """Returns for each weight the share of the blocks that an update grew which stayed."""
    fates = [fate_of(updates, number, [name]) for name in names]
    return [kept / grown if grown and kept is not None else math.nan for grown, kept in fates]


def _draw_shares(figure: Any, axes: Any, names: list[str], columns: list[tuple[int, list[float]]]) -> None:
    image = axes.imshow(
        list(zip(*(shares for _, shares in columns), strict=True)), aspect="auto", interpolation="nearest",
        cmap="viridis", vmin=0, vmax=1,
    )  # fmt: skip
    figure.colorbar(image, label="share that stayed")
    shown = range(0, len(names), -(-len(names) // MOST_NAMES))
    short = [names[i].removeprefix("model.").removesuffix(".weight").replace("layers.", "") for i in shown]
    axes.set_yticks(list(shown), short, fontsize=7)
    marked = range(0, len(columns), -(-len(columns) // 6))
    axes.set_xticks(list(marked), [str(columns[i][0]) for i in marked])
    axes.set(xlabel="topology update after step")


def _draw_bytes(figure: Any, records: list[Record]) -> bool:
    found, axes = of_kind(records, "bytes"), figure.subplots()
    if not found:
        return False
    bars = {
        f"{label}\n{who}": found[0][scope][key]
        for scope, label in (("sparse", "sparse layers"), ("all", "whole model"))
        for key, who in (("run", "this run"), ("dense", "dense AdamW"))
        if found[0][scope]["num_weights"]
    }
    if not bars:
        return False
    below = [0.0] * len(bars)
    for kind in BYTE_KINDS:
        heights = [counts[kind] / 2**20 for counts in bars.values()]
        axes.bar(list(bars), heights, bottom=below, label=kind, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.bar_label(axes.containers[-1], [f"{size:.3g}" for size in below], padding=2)
    axes.set(ylabel="MiB", ylim=(0, 1.08 * max(below)))
    figure.legend(loc="outside upper center", ncols=len(BYTE_KINDS), frameon=False)
    return True
