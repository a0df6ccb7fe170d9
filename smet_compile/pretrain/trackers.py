"""Sends the numbers of a run to TensorBoard, Weights & Biases or Trackio, beside metrics.jsonl."""

import math
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from smet_compile.presets import require
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.metrics import MetricsLog

PROJECT = "smet-compile"
Numbers = Mapping[str, float]


class Tracker(Protocol):
    """Takes numbers by name, and the step after which they hold."""

    def log(self, numbers: Numbers, step: int) -> None:
        """Sends them."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class TensorBoard:
    """Writes event files into the folder `tensorboard` of a run; those after the step to go on from are hidden."""

    def __init__(self, folder: Path, config: RunConfig, first: int) -> None:
        require("tensorboard", "tensorboard")
        writer = require("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=first + 1 if first else None)
        rows = "\n".join(f"    {name}: {value}" for name, value in asdict(config).items())
        self._writer.add_text("settings", rows, first)

    def log(self, numbers: Numbers, step: int) -> None:
        """Adds a point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandB:
    """Sends to Weights & Biases, as the environment says (`WANDB_MODE=offline` keeps it in the run's folder)."""

    def __init__(self, folder: Path, config: RunConfig, first: int) -> None:
        wandb = require("wandb", "wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            dir=str(folder),
            id=_own_id(folder, first),
            resume="allow",
            config=asdict(config),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # a run that goes on from a checkpoint repeats steps

    def log(self, numbers: Numbers, step: int) -> None:
        """Sends the numbers."""
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Ends the run there; it can go on later."""
        self._run.finish()


class Trackio:
    """Sends to Trackio by its `init`, `log` and `finish`."""

    def __init__(self, folder: Path, config: RunConfig, first: int) -> None:
        self._trackio = require("trackio", "trackio")
        name = f"{folder.name}-{_own_id(folder, first)}"
        self._trackio.init(project=PROJECT, name=name, config=asdict(config), resume="allow")

    def log(self, numbers: Numbers, step: int) -> None:
        """Sends the numbers."""
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the run there; it can go on later."""
        self._trackio.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def _own_id(folder: Path, first: int) -> str:
    """Returns the name under which a tracker knows the run in a folder, new for a run that begins."""
    path = folder / "tracker-id"
    if not first or not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def expect_tracker(name: str) -> None:
    """Raises `MissingExtraError` where the package of `--log` is not installed."""
    if name in TRACKERS:
        require(name, name)


def open_log(folder: RunFolder, config: RunConfig, first: int) -> MetricsLog:
    """Returns the log of a run that goes on after step `first`, which sends to the tracker of `--log`, too."""
    if config.log not in TRACKERS:
        return MetricsLog(folder.metrics)
    return TrackedLog(folder.metrics, TRACKERS[config.log](folder.path, config, first), config)


class TrackedLog(MetricsLog):
    """Appends records to a file, and sends their numbers to a tracker; a tracker that fails is left alone."""

    def __init__(self, path: Path, tracker: Tracker, config: RunConfig) -> None:
        super().__init__(path)
        self._tracker: Tracker | None = tracker
        self._config = config

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends one record and sends its numbers."""
        super().write(kind, step, **values)
        self.track(step, _numbers_of(kind, values, self._config))

    def track(self, step: int, numbers: Numbers) -> None:
        """Sends numbers that are in no record."""
        if numbers:
            self._attempt(lambda tracker: tracker.log(numbers, step))

    def close(self) -> None:
        """Closes the file and the tracker."""
        super().close()
        self._attempt(lambda tracker: tracker.close())

    def _attempt(self, send: Any) -> None:
        if self._tracker is None:
            return
        try:
            send(self._tracker)
        except Exception as error:
            self._tracker = None
            warnings.warn(
                f"--log {self._config.log}: nothing more is sent there ({error}); metrics.jsonl has it all",
                stacklevel=2,
            )


def _numbers_of(kind: str, values: dict[str, Any], config: RunConfig) -> dict[str, float]:
    """Returns the numbers of a record by the names that a tracker shows."""
    if kind == "train":
        speed = config.step_tokens / max(values["seconds"], 1e-9)
        return {"train/loss": values["loss"], "train/lr": values["lr"], "train/tokens_per_second": speed}
    if kind == "eval":
        return {"eval/loss": values["loss"], "eval/perplexity": math.exp(min(values["loss"], 700))}
    if kind == "bytes":
        found = values["all"]
        return {f"bytes/{name}": float(size) for name, size in found["run"].items()} if found["num_weights"] else {}
    return {}
