"""Sets runs side by side: what they reached, in which options they differ, and their losses in one plot."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smet_compile.presets import require
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.folder import RunFolder, read_config
from smet_compile.pretrain.metrics import Record, of_kind, read_metrics
from smet_compile.pretrain.model_config import name_of_model
from smet_compile.pretrain.plots import smoothed
from smet_compile.pretrain.report import perplexity_of

HEAD = ("run", "step", "loss", "perplexity", "tokens/s", "bytes/weight")
"""The loss and the perplexity are those on held-out text."""
NOT_COMPARED = ("device", "log", "save_every", "eval_every", "elastic", "eager")
"""Options in which runs may differ without a line of their own: they change no result."""
LEAST_RATES = 3
DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class ComparedRun:
    """Holds what a run's folder says about it."""

    name: str
    config: RunConfig
    records: list[Record]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Returns (step, held-out loss) of each validation."""
        return [(record["step"], record["loss"]) for record in of_kind(self.records, "eval")]

    @property
    def last_loss(self) -> float:
        """Returns the last held-out loss; infinite where there is none."""
        return self.losses[-1][1] if self.losses else math.inf

    def cells(self) -> tuple[str, ...]:
        """Returns a row under `HEAD`."""
        train = of_kind(self.records, "train")
        seconds = sum(record.get("seconds", 0) for record in train)
        speed = f"{len(train) * self.config.step_tokens / seconds:,.0f}" if seconds > 0 else "-"
        step = f"{max((record['step'] for record in self.records), default=0)}/{self.config.steps}"
        found = of_kind(self.records, "bytes")
        counts: dict[str, Any] = found[0]["all"] if found else {"num_weights": 0}
        size = f"{sum(counts['run'].values()) / counts['num_weights']:.2f}" if counts["num_weights"] else "-"
        loss = [f"{self.last_loss:.4f}", f"{perplexity_of(self.last_loss):.3f}"] if self.losses else ["-", "-"]
        return self.name, step, *loss, speed, size


def read_runs(paths: list[Path]) -> list[ComparedRun]:
    """Returns the runs in some folders, named as shortly as they differ; ValueError for a folder without a run."""
    for path in paths:
        if not RunFolder(path).config.exists():
            raise ValueError(f"RUN: expected the folder of a run (with config.json), got {path}; see pretrain --out")
    names = _short_names(paths)
    return [
        ComparedRun(name, read_config(RunFolder(path).config), read_metrics(RunFolder(path).metrics))
        for name, path in zip(names, paths, strict=True)
    ]


def _short_names(paths: list[Path]) -> list[str]:
    """Returns the last parts of the paths, as many as tell them apart."""
    whole = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return names


def rows_of(runs: list[ComparedRun]) -> list[tuple[str, ...]]:
    """Returns the table of what the runs reached, its headings first, the best run on top."""
    return [HEAD, *(run.cells() for run in sorted(runs, key=lambda run: run.last_loss))]


def differences(runs: list[ComparedRun]) -> list[str]:
    """Returns a line for each option in which the runs differ: its values and the runs that have them."""
    lines = []
    for name in vars(runs[0].config):
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(str(getattr(run.config, name)), []).append(run.name)
        if len(values) > 1 and name not in NOT_COMPARED:
            lines.append(f"{name}: " + "; ".join(f"{_shown(v)} ({', '.join(names)})" for v, names in values.items()))
    return lines


def _shown(value: str) -> str:
    """Returns the kind of a model for its whole config, and any other value as it is."""
    return name_of_model(value) if value.startswith("{") else value


def expect_image(path: Path) -> None:
    """Raises ValueError where `path` does not end as a kind of image that can be written."""
    known = require("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--out: expected the name of an image such as comparison.png, got {path}; pass another one")


def draw_comparison(runs: list[ComparedRun], path: Path) -> None:
    """Writes one plot of all losses as a PNG; where runs differ in the rate alone, their last losses by rate, too."""
    require("matplotlib").use("Agg")
    figures = require("matplotlib.figure")
    by_rate = rates_of(runs)
    figure = figures.Figure(figsize=(11 if by_rate else 8, 5), layout="constrained")
    axes = figure.subplots(1, 2 if by_rate else 1, squeeze=False)[0]
    _draw_losses(axes[0], runs)
    if by_rate:
        _draw_rates(axes[1], by_rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Any, runs: list[ComparedRun]) -> None:
    """Draws training losses thin and held-out ones with points, over the tokens that were read."""
    shown = []
    for number, run in enumerate(runs):
        color, tokens, dashes = f"C{number % 10}", run.config.step_tokens, DASHES[number // 10 % len(DASHES)]
        train = of_kind(run.records, "train")
        steps = [record["step"] * tokens for record in train]
        axes.plot(steps, smoothed([record["loss"] for record in train]), color=color, alpha=0.4, linewidth=1)
        held_out = run.losses
        line = dict(color=color, linestyle=dashes, marker="o", markersize=4, label=run.name)
        axes.plot([step * tokens for step, _ in held_out], [loss for _, loss in held_out], **line)
        shown += [loss for _, loss in held_out]
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.08 * (high - low or low), high + 0.15 * (high - low or low))
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title="held-out (points) and training (thin)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.figure.legend(loc="outside lower center", ncols=min(4, len(runs)), frameon=False)


def rates_of(runs: list[ComparedRun]) -> dict[str, list[tuple[float, float]]]:
    """Returns (rate, last held-out loss) of runs that differ in nothing else, by their names for what they share."""
    groups: dict[tuple[Any, ...], list[ComparedRun]] = {}
    for run in runs:
        values = vars(run.config).items()
        key = tuple(value for name, value in values if name not in ("lr", "embedding_lr", "warmup", *NOT_COMPARED))
        if run.losses and math.isfinite(run.last_loss):
            groups.setdefault(key, []).append(run)
    found = {}
    for group in groups.values():
        points = sorted({(run.config.lr, run.last_loss) for run in group})
        if len({rate for rate, _ in points}) >= LEAST_RATES:
            config = group[0].config
            found[f"{config.method}, density {config.density:g}, block {config.block}"] = points
    return found


def _draw_rates(axes: Any, by_rate: dict[str, list[tuple[float, float]]]) -> None:
    """Draws the last losses by rate, around their minima; says where a minimum lies at the edge of the rates."""
    for number, (name, points) in enumerate(by_rate.items()):
        rates, losses = [rate for rate, _ in points], [loss for _, loss in points]
        best = losses.index(min(losses))
        edge = "" if 0 < best < len(rates) - 1 else f" (best at the {'lowest' if best == 0 else 'highest'} rate tried)"
        axes.plot(rates, losses, color=f"C{number % 10}", marker="o", markersize=4, label=name + edge)
        axes.plot([rates[best]], [losses[best]], color=f"C{number % 10}", marker="*", markersize=13)
    lows = [min(loss for _, loss in points) for points in by_rate.values()]
    highs = [sorted(loss for _, loss in points)[len(points) // 2] for points in by_rate.values()]
    span = max(highs) - min(lows) or min(lows)
    axes.set_ylim(min(lows) - 0.15 * span, max(highs) + 0.6 * span)
    axes.set(xscale="log", xlabel="--lr", ylabel="last held-out loss", title="by rate; a star marks the best")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
