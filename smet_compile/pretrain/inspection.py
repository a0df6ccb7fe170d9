"""Shows the topology of a pre-training run as a table and as plots: `python -m smet_compile inspect RUN`."""

from itertools import takewhile
from pathlib import Path

import torch

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.pretrain.console import print_line, print_table
from smet_compile.pretrain.saved_run import open_run
from smet_compile.pretrain.topology_plots import draw_inspection, evenly_chosen, maps_of
from smet_compile.pretrain.training import Training

NUM_TOKENS = 8


def inspect_run(path: Path) -> tuple[smet.Inspection, list[str]]:
    """Inspects the last checkpoint of the run in `path`, on the CPU, and draws it into that folder.

    The topology before the first step is a function of the run's config and made again. Returns the inspection
    and the names of the PNG files; raises ValueError where there is no run, no checkpoint, or a dense one.
    """
    run = open_run(path)
    if run.training.manager is None:
        raise ValueError(f"RUN: expected a sparse run, got a dense one in {path}; it has no topology to look at")
    sites = find_sites(run.training.model)
    shown = {name: sites[name] for name in evenly_chosen(list(sites))}
    before = maps_of(shown)
    run.load(whole=True)
    found = inspect_training(run.training, min(NUM_TOKENS, run.config.sequence))
    return found, draw_inspection(found, before, maps_of(shown), path)


def inspect_training(training: Training, num_tokens: int) -> smet.Inspection:
    """Inspects a training; which tokens it reads does not matter."""
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
    return smet.inspect(training.model, input_ids=tokens, manager=training.manager)


def print_inspection(found: smet.Inspection, wide: bool = False) -> None:
    """Prints a row for each sparse layer: its density, units and paths, or all that is known if `wide`."""
    print_table(found.rows if wide else narrow_rows(found))
    for line in found.summary:
        print_line(line)


def narrow_rows(found: smet.Inspection) -> list[tuple[str, ...]]:
    """Returns a table that 80 columns hold: a row for each sparse layer, up to four figures, the headings first."""
    names = short_names([site.name for site in found.sites])
    rows: list[tuple[str, ...]] = [("layer", "density", "dead units", "effective", "churn")]
    for site in found.sites:
        dead, units = site.num_dead_inputs + site.num_dead_outputs, site.dead.inputs.numel() + site.dead.outputs.numel()
        effective = "-" if site.effective_density is None else f"{site.effective_density:.4f}"
        churn = f"{site.history.churn[-1][1]:.4f}" if site.history.churn else "-"
        rows.append((names[site.name], f"{site.density:.4f}", f"{dead}/{units}", effective, churn))
    used = [i for i in range(len(rows[0])) if any(row[i] != "-" for row in rows[1:])]
    return [tuple(row[i] for i in used) for row in rows]


def short_names(names: list[str]) -> dict[str, str]:
    """Returns shorter names of weights: without what all begin with, and without "weight"."""
    parts = {name: name.removesuffix(".weight").split(".") for name in names}
    columns = zip(*(each[:-1] for each in parts.values()), strict=False)
    num_shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return {name: ".".join(each[num_shared:]) for name, each in parts.items()}
