"""Draws the topology of a model: maps, ages, and what became of the blocks that were grown."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.ops import Site
from smet_compile.presets import require
from smet_compile.pretrain.plots import MOST_NAMES, draw_fates

MOST_MAPS = 6
MOST_CELLS = 64
AREA_SIDE = 64
LEAST_AREAS = 16
MOST_BARS = 60
Map = tuple[Tensor, int, int]
"""The active blocks of a weight, (block rows of all its matrices, block columns) bool, and the shape of a block."""
Maps = dict[str, Map]


def maps_of(sites: dict[str, Site]) -> Maps:
    """Returns the active blocks of some sites."""
    return {
        name: (site.mask().view(-1, site.layout.block_cols).cpu(), *site.layout.block_shape)
        for name, site in sites.items()
    }


def evenly_chosen(names: list[str]) -> list[str]:
    """Returns at most `MOST_MAPS` of the names, from the first to the last."""
    count = min(MOST_MAPS, len(names))
    return [names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)]


def draw_inspection(found: smet.Inspection, before: Maps, after: Maps, folder: Path) -> list[str]:
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


def _maps(figures: Any, before: Maps, after: Maps) -> Any:
    """Draws a column for each weight: its blocks where there are few, else the densities of areas."""
    figure = figures.Figure(figsize=(2.2 * len(before) + 0.6, 5.4), layout="constrained")
    grid = figure.subplots(2, len(before), squeeze=False)
    for column, name in enumerate(before):
        pictures = [picture_of(maps[name]) for maps in (before, after)]
        (_, area), shows_areas = pictures[0], pictures[0][1] != "blocks"
        spread = max(float((cells - cells.mean()).abs().max()) for cells, _ in pictures) or 1.0
        middle = float(pictures[0][0].mean())
        low, high = (middle - spread, middle + spread) if shows_areas else (0.0, 1.0)
        for row, (cells, _) in enumerate(pictures):
            axes = grid[row][column]
            image = axes.imshow(
                cells.numpy(), cmap="RdBu_r" if shows_areas else "Greys", vmin=low, vmax=high, interpolation="nearest",
                aspect="auto",
            )  # fmt: skip
            axes.set(xticks=[], yticks=[], xlabel="inputs" if row else "")
            if column == 0:
                axes.set_ylabel(f"{'after' if row else 'before'}: outputs")
        if shows_areas:
            bar = figure.colorbar(image, ax=list(grid[:, column]), location="bottom", aspect=14, pad=0.02)
            bar.ax.tick_params(labelsize=7)
        grid[0][column].set_title(f"{_short(name)}\n{area}", fontsize=8)
    return figure


def picture_of(drawn: Map) -> tuple[Tensor, str]:
    """Returns what is drawn of a weight, and in words: its blocks, or the density of areas of about 64 x 64 weights.

    Areas are smaller where a weight has fewer than 16 of them on a side.
    """
    mask, rows, columns = drawn
    if max(mask.shape) <= MOST_CELLS:
        return mask.float(), "blocks"
    sides = [
        max(1, min(AREA_SIDE // block, count // LEAST_AREAS))
        for count, block in zip(mask.shape, (rows, columns), strict=True)
    ]
    size = -(-mask.shape[0] // sides[0]), -(-mask.shape[1] // sides[1])
    cells = torch.nn.functional.adaptive_avg_pool2d(mask[None, None].float(), size)[0, 0]
    return cells, f"density of areas of {sides[0] * rows} x {sides[1] * columns}"


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight").replace("layers.", "").replace("self_attn.", "")


def _ages(figures: Any, found: smet.Inspection) -> Any:
    figure = figures.Figure(figsize=(9, 3.6), layout="constrained")
    ages, survival = figure.subplots(1, 2)
    counts = found.age_counts
    if len(counts) <= MOST_BARS:
        known = sorted(counts)
        width = 0.8 * min((after - before for before, after in pairwise(known)), default=1)
        ages.bar(list(counts), list(counts.values()), width)
    else:
        ages.hist(list(counts), weights=list(counts.values()), bins=MOST_BARS)
    ages.set(xlabel="age in steps", ylabel="active blocks", yscale="log")
    known_fractions = [(c.born_step, c.survival_fraction) for c in found.cohorts if c.survival_fraction is not None]
    survival.plot([born for born, _ in known_fractions], [share for _, share in known_fractions], "o-", markersize=4)
    survival.set(xlabel="step of birth", ylabel="share still active", ylim=(0, 1.02))
    return figure


def _churn(figures: Any, found: smet.Inspection) -> Any:
    """Draws what became of all that was grown: by birth, and as a share by weight."""
    figure = figures.Figure(figsize=(10, 4.2), layout="constrained")
    fates, shares = figure.subplots(1, 2)
    born = [cohort for cohort in found.cohorts if cohort.born_step and cohort.survival_fraction is not None]
    draw_fates(fates, [cohort.born_step for cohort in born], [(c.num_grown, c.num_active) for c in born])
    fates.set(xlabel="grown after step", ylabel="blocks")
    names, kept = [], []
    for site in found.sites:
        own = [c for c in site.history.cohorts if c.born_step and c.survival_fraction is not None]
        if num_grown := sum(c.num_grown for c in own):
            names.append(_short(site.name))
            kept.append(sum(c.num_active for c in own) / num_grown)
    shares.plot(kept, range(len(kept)), "o", markersize=4)
    shown = range(0, len(names), -(-len(names) // MOST_NAMES) or 1)
    shares.set_yticks(list(shown), [names[i] for i in shown], fontsize=7)
    shares.set(xlabel="active now / ever grown", xlim=(0, 1))
    shares.invert_yaxis()
    shares.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure
