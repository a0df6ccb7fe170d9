"""Launches kernels for tools that watch a process: every one at tiny size, or some at real size.

compute-sanitizer python -m benchmarks.gpu_check.launches tiny
ncu python -m benchmarks.gpu_check.launches large
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from benchmarks.gpu_check import correctness, optimizer
from benchmarks.gpu_check.cases import Case, Layer, kernels_of
from benchmarks.gpu_check.records import Check, Record
from benchmarks.layer import FORWARD, PRODUCTS, WEIGHT_GRADIENT
from smet_compile.ops import choose

TINY = (
    Case(48, 40, 16, 24),
    Case(70, 100, 32, 75),
    Case(48, 40, 1, 24),
    Case(32, 48, 16, 24, matrices=3),
    Case(32, 48, 16, 24, matrices=3, grouped=True),
)
LARGE_TOKENS, LARGE_SIDE = 16384, 4096


def tiny(check: Check, cases: tuple[Case, ...] = TINY) -> int:
    """Launches all kinds of kernels on cases with edges; returns the number of calls."""
    count = 0
    for case in cases:
        layer = Layer(case, check.device)
        dense = choose.compute("unpack", layer.values, layer.topology)(layer.values, layer.topology)
        choose.compute("pack", dense, layer.topology)(dense, layer.topology)
        kernels = kernels_of(case, check.device)
        for kernel in kernels:
            for part in PRODUCTS:
                layer.product(part, kernel)
        count += 2 + len(kernels) * len(PRODUCTS)
    kinds = correctness.kinds(check)
    for kind in kinds[:1] if check.dry else kinds:
        optimizer.aged(check, kind, 32, num_matrices=1).step()
        count += 1
    two, one, _ = optimizer.fused_calls(check, check.size(32, 16), 64)
    two()
    one()
    check.synchronize()
    return count + 2


def large(check: Check) -> None:
    """Launches the two products of tiles, by each kernel in turn, and an update, all at real size."""
    side = check.size(LARGE_SIDE, 32)
    layer = Layer(Case(side, side, check.size(128, 16), check.size(LARGE_TOKENS, 16)), check.device)
    for kernel in kernels_of(layer.case, check.device):
        layer.product(FORWARD, kernel)
        layer.product(WEIGHT_GRADIENT, kernel)
    kind = next(kind for kind in optimizer.kinds(check) if kind.name == "tiles, bf16")
    optimizer.aged(check, kind, check.size(optimizer.SIDE, 32), check.size(50, 1)).step()
    check.synchronize()


def main() -> None:
    folder = Path("/dev")
    check = Check(Record(folder / "null", "launches"), False, folder, math.inf)
    if sys.argv[1] == "tiny":
        tiny(check)
    else:
        large(check)


if __name__ == "__main__":
    main()
