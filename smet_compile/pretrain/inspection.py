"""Shows the topology of a pre-training run as a table and as plots: `python -m smet_compile inspect RUN`."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.ops import Site, find_sites
from smet_compile.presets import require
from smet_compile.pretrain.console import print_line, print_table
from smet_compile.pretrain.saved_run import open_run
from smet_compile.pretrain.training import Training

NUM_TOKENS = 8
MOST_MAPS = 6
MOST_PIXELS = 128
Masks = dict[str, Tensor]


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
    before = masks_of(shown)
    run.load(whole=True)
    found = inspect_training(run.training, min(NUM_TOKENS, run.config.sequence))
    return found, draw_inspection(found, before, masks_of(shown), path)


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


def masks_of(sites: dict[str, Site]) -> Masks:
    """Returns the active blocks of some sites, each (block rows of all its matrices, block columns) bool."""
    return {name: site.mask().view(-1, site.layout.block_cols).cpu() for name, site in sites.items()}


def evenly_chosen(names: list[str]) -> list[str]:
    """Returns at most `MOST_MAPS` of the names, from the first to the last."""
    count = min(MOST_MAPS, len(names))
    return [names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)]


def draw_inspection(found: smet.Inspection, before: Masks, after: Masks, folder: Path) -> list[str]:
    """Writes the PNG files for which there is something to show into `folder`; returns their names."""
    require("matplotlib").use("Agg")
    figures = require("matplotlib.figure")
    drawn = {}
    if before:
        drawn["topology_maps.png"] = _maps(figures, before, after)
    if found.age_counts:
        drawn["ages.png"] = _ages(figures, found)
    if any(site.history.churn for site in found.sites):
        drawn["topology_churn.png"] = _churn(figures, found)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=100)
    return list(drawn)


def _maps(figures: Any, before: Masks, after: Masks) -> Any:
    figure = figures.Figure(figsize=(2.2 * len(before), 5.2), layout="constrained")
    grid = figure.subplots(2, len(before), squeeze=False)
    for column, name in enumerate(before):
        for row, (when, masks) in enumerate((("before", before), ("after", after))):
            axes = grid[row][column]
            axes.imshow(_pixels(masks[name]), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[], xlabel="inputs" if row else "")
            if column == 0:
                axes.set_ylabel(f"{when}: outputs")
        grid[0][column].set_title(_short(name), fontsize=8)
    return figure


def _pixels(mask: Tensor) -> Any:
    """Returns the density of the blocks that each pixel covers."""
    size = min(MOST_PIXELS, mask.shape[0]), min(MOST_PIXELS, mask.shape[1])
    return torch.nn.functional.adaptive_avg_pool2d(mask[None, None].float(), size)[0, 0].numpy()


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight").replace("layers.", "").replace("self_attn.", "")


def _ages(figures: Any, found: smet.Inspection) -> Any:
    figure = figures.Figure(figsize=(9, 3.6), layout="constrained")
    ages, survival = figure.subplots(1, 2)
    counts = found.age_counts
    ages.hist(list(counts), weights=list(counts.values()), bins=min(40, max(counts) + 1))
    ages.set(xlabel="age in steps", ylabel="active blocks", yscale="log")
    known = [(c.born_step, c.survival_fraction) for c in found.cohorts if c.survival_fraction is not None]
    survival.plot([born for born, _ in known], [fraction for _, fraction in known], "o-", markersize=4)
    survival.set(xlabel="step of birth", ylabel="share still active", ylim=(0, 1.02))
    return figure


def _churn(figures: Any, found: smet.Inspection) -> Any:
    figure = figures.Figure(figsize=(9, 3.6), layout="constrained")
    churn, moved = figure.subplots(1, 2)
    for site in found.sites:
        steps = [step for step, _ in site.history.churn]
        churn.plot(steps, [fraction for _, fraction in site.history.churn], color="C0", alpha=0.3, linewidth=1)
    churn.set(xlabel="step", ylabel="blocks moved / active blocks", ylim=(0, None))
    explored = [site.history.explored_fraction or site.density for site in found.sites]
    numbers = range(len(found.sites))
    moved.bar(numbers, explored, color="0.8", label="ever active")
    moved.bar(numbers, [site.density for site in found.sites], color="C0", label="active now")
    moved.set(xlabel="site", ylabel="share of all blocks")
    moved.legend()
    return figure
