"""Makes short runs for the tests, in this process or in one that is forked from a warm server."""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from smet_compile.pretrain.config import RunConfig, resolve
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.metrics import of_kind, read_metrics

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "rich.progress",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "smet_compile.pretrain.loop",
    "smet_compile.pretrain.cli",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)
WORDS = ["sparse", "weights", "move", "while", "the", "model", "learns", "dense", "ones", "stay"]
CHECKPOINT = "checkpoint.safetensors"
SMALL_MODEL = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")


def write_text(folder: Path, num_files: int = 4, num_words: int = 800) -> str:
    """Writes files of seeded random words into `folder`; returns the `--data` that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        words = random.Random(number).choices(WORDS, k=num_words)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return f"text:{folder}/*.txt"


def small_config(folder: Path, **changes: Any) -> RunConfig:
    """Returns a config of twelve steps with topology updates after 3, 6 and 9 of them."""
    options: dict[str, Any] = {
        "preset": "nano",
        "steps": 12,
        "every": 3,
        "batch": 2,
        "save_every": 4,
        "eval_every": 6,
        "eval_windows": 4,
        "device": "cpu",
        "eager": True,
        "data": write_text(folder / "text"),
    }
    return resolve(**(options | changes))


class StopAfter:
    """Returns True, as a `stop`, after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def losses(folder: Path) -> list[tuple[str, int, float]]:
    """Returns every training and validation loss of a run, in order, bit for bit."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["kind"], r["step"], r["loss"]) for r in records if r["kind"] in ("train", "eval")]


def moves(folder: Path) -> list[dict[str, Any]]:
    """Returns the topology updates of a run."""
    return [record["event"] for record in of_kind(read_metrics(folder / "metrics.jsonl"), "topology")]


def run_or_resume(config: RunConfig, folder: Path) -> None:
    """Resumes the run, or begins it where there is none yet, as somebody does after a kill."""
    if (folder / "config.json").exists():
        resume(folder)
    else:
        pretrain(config, folder)


def _quietly(function: Callable[..., object], arguments: tuple[Any, ...], output: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
    function(*arguments)


def in_new_process(function: Callable[..., object], *arguments: Any, output: Path | None = None) -> ForkServerProcess:
    """Starts `function(*arguments)`, which a module must hold by name, in a process of its own."""
    process = SERVER.Process(target=_quietly, args=(function, arguments, str(output or os.devnull)), daemon=True)
    process.start()
    return process


def finish(process: ForkServerProcess, timeout: float = 120) -> int | None:
    """Waits for a process; returns its exit code."""
    process.join(timeout)
    return process.exitcode


def kill_own_process(*_: object, **__: object) -> None:
    """Sends SIGKILL to this process: no handler runs, no `finally`, and nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def command_line(*arguments: str) -> None:
    """Runs `python -m smet_compile pretrain ARGUMENTS` as in a fresh process."""
    from smet_compile.pretrain.cli import main

    sys.argv = ["smet_compile", "pretrain", *arguments]
    main()


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes a run's config.json by hand."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
