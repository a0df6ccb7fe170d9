"""The figure of the format."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import smet_compile as smet
from smet_compile.ops import Site, find_sites

LISTS = ("positions", "by_column", "rows_by_column", "row_starts", "column_starts", "group_starts")


def draw_format() -> Figure:
    """Two weights: as the module reads them, the bits, the values, the lists derived from the bits."""
    figure, rows = plt.subplots(2, 4, figsize=(13, 7.4), width_ratios=(3, 2.4, 1.8, 3))
    for axes, shape, block_shape in zip(rows, ((10, 14), (6, 9)), (4, 1), strict=True):
        layer = nn.Linear(shape[1], shape[0], bias=False)
        smet.sparsify(layer, 0.4, block_shape=block_shape, seed=1)
        (site,) = find_sites(layer).values()
        colors = plt.get_cmap("turbo")(torch.linspace(0.1, 0.9, site.num_active).tolist())
        _draw_dense(axes[0], site, colors)
        _draw_bits(axes[1], site)
        _draw_values(axes[2], site, colors)
        _write_lists(axes[3], site)
    figure.tight_layout()
    return figure


def _blank(axes: Axes, title: str, width: float, height: float) -> None:
    axes.set(xlim=(-0.2, width + 0.2), ylim=(height + 0.2, -0.2), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def _draw_dense(axes: Axes, site: Site, colors: Any) -> None:
    layout, (bm, bn) = site.layout, site.layout.block_shape
    width, height = layout.block_cols * bn, layout.block_rows * bm
    _blank(axes, f"module.weight {tuple(layout.shape)} reads", width, height)
    for row, position in enumerate(site.mask().nonzero().flatten().tolist()):
        corner = position % layout.block_cols * bn, position // layout.block_cols * bm
        axes.add_patch(Rectangle(corner, bn, bm, facecolor=colors[row], edgecolor="white"))
        middle = (corner[0] + min(corner[0] + bn, layout.cols)) / 2, (corner[1] + min(corner[1] + bm, layout.rows)) / 2
        axes.text(*middle, str(row), ha="center", va="center", color="white", fontsize=9)
    axes.add_patch(Rectangle((layout.cols, 0), width - layout.cols, height, facecolor="white", alpha=0.7))
    axes.add_patch(Rectangle((0, layout.rows), layout.cols, height - layout.rows, facecolor="white", alpha=0.7))
    axes.add_patch(Rectangle((0, 0), layout.cols, layout.rows, fill=False, linewidth=1.5))
    if (layout.cols, layout.rows) != (width, height):
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, linestyle=":"))
        axes.text(width, height + 0.6, "what hangs over the edge is zero, always", ha="right", va="top", fontsize=8)


def _draw_bits(axes: Axes, site: Site) -> None:
    layout, mask = site.layout, site.mask()
    num_bytes = site.compact.topology.numel()
    title = f"topology: {layout.num_blocks} bits in {num_bytes} bytes,\nrow-major: the truth"
    _blank(axes, title, layout.block_cols, layout.block_rows)
    for position, active in enumerate(mask.tolist()):
        corner = position % layout.block_cols, position // layout.block_cols
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="0.8" if active else "white", edgecolor="0.6"))
        axes.text(corner[0] + 0.5, corner[1] + 0.5, str(int(active)), ha="center", va="center", fontsize=9)


def _draw_values(axes: Axes, site: Site, colors: Any) -> None:
    count, shape = site.num_active, tuple(site.values.shape)
    rows = min(count, 11)
    _blank(axes, f"values {shape},\nan nn.Parameter", -(-count // rows), rows)
    for row in range(count):
        corner = row // rows, row % rows
        axes.add_patch(Rectangle(corner, 0.92, 0.92, facecolor=colors[row]))
        axes.text(corner[0] + 0.46, corner[1] + 0.46, str(row), ha="center", va="center", color="white", fontsize=9)


def _write_lists(axes: Axes, site: Site) -> None:
    lists = {name: getattr(site.compact.active, name) for name in LISTS}
    lines = [f"{name:14s} {tensor.tolist()}" for name, tensor in lists.items() if tensor is not None]
    axes.axis("off")
    axes.set_title("derived for kernels, never saved", fontsize=10)
    axes.text(0, 0.95, "\n\n".join(lines), family="monospace", fontsize=8, va="top", transform=axes.transAxes)
