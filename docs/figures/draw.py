"""Draws the figures of docs/how_it_works.md, each from what the library computes on the spot.

python docs/figures/draw.py [format memory graph passes rule] [--out docs/figures]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from draw_format import draw_format
from draw_graphs import draw_graph, draw_passes
from draw_memory import draw_memory
from draw_rule import draw_rule

FIGURES = {"format": draw_format, "memory": draw_memory, "graph": draw_graph, "passes": draw_passes, "rule": draw_rule}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the PNG files")
    args = parser.parse_args()
    for name in args.names or FIGURES:
        torch.manual_seed(0)
        FIGURES[name]().savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
