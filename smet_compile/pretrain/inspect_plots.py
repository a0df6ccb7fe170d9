"""The plots of an inspection: topologies before and after, ages, churn over time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.ops import Site
from smet_compile.pretrain.extras import require

MOST_MAPS = 6
MOST_PIXELS = 128
Masks = dict[str, Tensor]


def masks_of(sites: dict[str, Site]) -> Masks:
    """The active blocks of some sites, each (block rows of all its matrices, block columns) bool."""
    return {name: site.mask().view(-1, site.layout.block_cols).cpu() for name, site in sites.items()}


def evenly_chosen(names: list[str]) -> list[str]:
    """At most `MOST_MAPS` of them, from the first to the last."""
    count = min(MOST_MAPS, len(names))
    return [names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)]


def draw_inspection(found: smet.Inspection, before: Masks, after: Masks, folder: Path) -> list[str]:
    """Write the PNG files for which there is something to show into `folder`; returns their names."""
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
    """Density of what each pixel covers."""
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
