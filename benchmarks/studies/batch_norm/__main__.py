"""Gradient skew under batch norm, and training with SparseOpt's correction and without.

    python -m benchmarks.studies.batch_norm skew     the gradient of a row over its fan-in, and a picture
    python -m benchmarks.studies.batch_norm train    ResNets on made images: RigL and SET, with and without
    python -m benchmarks.studies.batch_norm page     writes docs/results/batch_norm.md from the records

A study that was stopped goes on where it was: every finished run is a line of docs/results/studies/batch_norm.jsonl.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks.studies.batch_norm.runs import run_missing
from benchmarks.studies.batch_norm.skew import run_skew
from benchmarks.studies.records import Records
from benchmarks.studies.reports.batch_norm import write
from benchmarks.studies.reports.page import PAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["skew", "train", "page"])
    parser.add_argument("--minutes", type=float, default=math.inf, help="train: begins no run after them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = Records(PAGES / "studies/batch_norm.jsonl")
    if args.what == "train":
        run_missing(records, args.minutes)
    elif args.what == "skew":
        run_skew(records, PAGES / "figures/batch_norm_skew.png")
    else:
        write(records, PAGES)


if __name__ == "__main__":
    main()
