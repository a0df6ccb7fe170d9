"""Writes a page of results: markdown with tables, and figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGES = Path("docs/results")
_WIDTH, _HEIGHT = 9.0, 4.0


class Page:
    """Collects the parts of one page, and writes it and its figures into a folder."""

    def __init__(self, name: str, title: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._parts = [f"# {title}"]

    def text(self, *paragraphs: str) -> None:
        self._parts += paragraphs

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [headings, ["---"] * len(headings), *rows]
        self._parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))

    def figure(self, figure: Any, caption: str, suffix: str = "") -> None:
        path = self._folder / "figures" / f"{self._name}{suffix}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        self._parts.append(f"![{caption}](figures/{path.name})")

    def write(self) -> Path:
        path = self._folder / f"{self._name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(self._parts) + "\n")
        return path


def new_figure(width: float = _WIDTH, height: float = _HEIGHT) -> Any:
    """Makes an empty figure that no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend_above(figure: Any, axes: Any, columns: int = 5) -> None:
    """Puts the legend of some axes above the figure, where it hides nothing."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False, fontsize=8
    )


def tidy(axes: Any, **settings: Any) -> None:
    """Sets labels, removes the box, and draws a light grid."""
    axes.set(**settings)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
