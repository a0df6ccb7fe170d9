"""Measures the GPU's kernels, as ratios side by side: products, optimizer, whole step, the largest model.

    python -m benchmarks.gpu [--only gpu-linear] [--repeats 9] [--out docs/results/kernels_gpu.md]

Where there is no GPU the rows say so; with ``--quick`` all runs at tiny size, on the CPU if need be.
"""

from __future__ import annotations

import torch

from benchmarks import command
from benchmarks.sections import gpu_large, gpu_linear, gpu_optimizer, gpu_step

SECTIONS: dict[str, command.Section] = {
    "gpu-linear": gpu_linear.tables,
    "gpu-optimizer": gpu_optimizer.tables,
    "gpu-step": gpu_step.tables,
    "gpu-large": gpu_large.tables,
}


def main() -> None:
    args = command.options(__doc__, SECTIONS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command.run("Kernels on a GPU", "python -m benchmarks.gpu", SECTIONS, args, device)


if __name__ == "__main__":
    main()
