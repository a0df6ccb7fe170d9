"""Checks and measures all that needs a GPU, in a few minutes; every result is a line of JSON, written at once.

    python -m benchmarks.gpu_check --out runs/gpu/kernels.jsonl
    python -m benchmarks.gpu_check --part models --out runs/gpu/models.jsonl
    python -m benchmarks.gpu_check.report runs/gpu/*.jsonl

Each stage is a process with a time limit, and one that fails stops no other. ``--dry`` runs all of them at tiny size
without a GPU, kernels in Triton's interpreter: it proves nothing but that they run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.stages import PARTS, Plan

DEFAULT_OUT = Path("runs/gpu_check.jsonl")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, default="kernels", help="the stages of this part (kernels)")
    parser.add_argument("--only", action="append", help="a stage of the part; may be given repeatedly")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"the file to append lines to ({DEFAULT_OUT})")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: whether all stages run")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {stage.name for stage in PARTS[args.part]}
    if unknown:
        known = ", ".join(stage.name for stage in PARTS[args.part])
        parser.error(f"--only: expected one of {known}, got {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = options()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a card is asked without starting CUDA
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    plan = Plan(args.part, tuple(args.only or ()), args.dry)
    failed = runner.run(plan, args.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
