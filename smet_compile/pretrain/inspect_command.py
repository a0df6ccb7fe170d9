"""`python -m smet_compile inspect RUN`: what has become of the topology of a pre-training run."""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.pretrain.console import as_cell, end_with_error
from smet_compile.pretrain.extras import MissingExtraError, require
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.inspect_plots import draw_inspection, evenly_chosen, masks_of
from smet_compile.pretrain.tokenizer import open_tokenizer
from smet_compile.pretrain.training import Training, build_training

NUM_TOKENS = 8


def add_inspect_command(typer: Any, app: Any) -> None:
    """Give the application `app` the command `inspect`."""

    def inspect(run: Path) -> None:
        """Look inside a run: dead units, live paths, churn, ages; maps as PNG in its folder."""
        try:
            found, images = inspect_run(run)
        except (ValueError, OSError, MissingExtraError) as error:
            end_with_error(error)
        print_inspection(found)
        print(f"Plots in {run}: {', '.join(images)}")

    inspect.__annotations__["run"] = Annotated[Path, typer.Argument(help="Folder of the run.")]
    app.command("inspect")(inspect)


def inspect_run(path: Path) -> tuple[smet.Inspection, list[str]]:
    """Inspect the last checkpoint of the run in `path`, on the CPU, and draw it into that folder.

    The topology before the first step is a function of the run's config and made again. Returns the inspection
    and the names of the PNG files; raises ValueError where there is no run, no checkpoint, or a dense one.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise ValueError(f"RUN: expected the folder of a run (with config.json), got {path}; see pretrain --out")
    config = dataclasses.replace(folder.open(), device="cpu", eager=True)
    if config.method == "dense":
        raise ValueError(f"RUN: expected a sparse run, got a dense one in {path}; it has no topology to look at")
    if not folder.checkpoint.exists():
        raise ValueError(f"RUN: expected a checkpoint in {path}, found none; go on with it: {folder.resume_command}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run said it all when it began
        training = build_training(config, open_tokenizer(config.tokenizer).vocab_size)
    sites = find_sites(training.model)
    shown = {name: sites[name] for name in evenly_chosen(list(sites))}
    before = masks_of(shown)
    smet.load_checkpoint(folder.checkpoint, training.model, training.optimizer, training.manager)
    found = look(training, min(NUM_TOKENS, config.sequence))
    return found, draw_inspection(found, before, masks_of(shown), path)


def look(training: Training, num_tokens: int) -> smet.Inspection:
    """Inspect a training; which tokens it reads does not matter."""
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
    return smet.inspect(training.model, input_ids=tokens, manager=training.manager)


def print_inspection(found: smet.Inspection) -> None:
    """As a table on a terminal, as plain text elsewhere."""
    console = require("rich.console").Console()
    if not console.is_terminal:
        print(found)
        return
    head, *rows = found.rows
    table = require("rich.table").Table(header_style="bold")
    for number, title in enumerate(head):
        table.add_column(as_cell(title), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(as_cell, row))
    console.print(table)
    for line in found.summary:
        console.print(as_cell(line))
