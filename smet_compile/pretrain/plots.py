"""The plots of a run, from its metrics."""

import math
from pathlib import Path
from typing import Any

from smet_compile.pretrain.extras import require
from smet_compile.pretrain.memory import KINDS
from smet_compile.pretrain.metrics import Record, of_kind

SMOOTHING_FRACTION = 0.02


def draw_plots(records: list[Record], folder: Path) -> list[str]:
    """Write the PNG files that the metrics allow into `folder`; returns their names."""
    require("matplotlib").use("Agg")
    drawings = {"loss.png": _draw_loss, "churn.png": _draw_churn, "bytes.png": _draw_bytes}
    return [name for name, draw in drawings.items() if _draw(draw, records, folder / name)]


def _draw(draw: Any, records: list[Record], path: Path) -> bool:
    figures = require("matplotlib.figure")
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    drawn = draw(figure.subplots(), records)
    if drawn:
        figure.savefig(path, dpi=120)
    return drawn


def _draw_loss(axes: Any, records: list[Record]) -> bool:
    train, evals = of_kind(records, "train"), of_kind(records, "eval")
    steps = [record["step"] for record in train]
    axes.plot(steps, [record["loss"] for record in train], color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smoothed([record["loss"] for record in train]), color="C0", label="training, running mean")
    if evals:
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", color="C3", label="held-out text")
    for number, record in enumerate(of_kind(records, "topology")):
        label = "topology update" if number == 0 else None
        axes.axvline(record["step"], color="C2", alpha=0.5, linewidth=0.7, linestyle=":", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    return bool(train)


def _smoothed(values: list[float]) -> list[float]:
    half = max(1, round(SMOOTHING_FRACTION * len(values) / 2))
    windows = [values[max(0, middle - half) : middle + half + 1] for middle in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw_churn(axes: Any, records: list[Record]) -> bool:
    events = [record["event"] for record in of_kind(records, "topology")]
    if not events:
        return False
    names = list(events[0]["sites"])
    if not names:
        return False
    churn = [[_churn(event, name) for event in events] for name in names]
    image = axes.imshow(churn, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.figure.colorbar(image, label="blocks moved / active blocks")
    shown = range(0, len(names), -(-len(names) // 14))
    axes.set_yticks(list(shown), [names[i].removeprefix("model.").removesuffix(".weight") for i in shown], fontsize=7)
    marked = range(0, len(events), -(-len(events) // 10))
    axes.set_xticks(list(marked), [str(events[i]["step"]) for i in marked])
    axes.set(xlabel="topology update at step")
    return True


def _churn(event: dict[str, Any], name: str) -> float:
    return event["sites"][name]["churn_fraction"] if name in event["sites"] else math.nan


def _draw_bytes(axes: Any, records: list[Record]) -> bool:
    found = of_kind(records, "bytes")
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
    for kind in KINDS:
        heights = [counts[kind] / 2**20 for counts in bars.values()]
        axes.bar(list(bars), heights, bottom=below, label=kind, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(ylabel="MiB")
    axes.legend()
    return True
