"""Measures the kernels, as ratios side by side: products, optimizer, topology change, whole step.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.kernels [--only linear] [--repeats 9] [--out docs/results/kernels.md]

On the CPU; where there is a GPU, on that as well, and where there is none its rows say so. ``python -m benchmarks.gpu``
runs the GPU's sections alone. ``SMET_COMPILE_KERNEL`` forces a kernel (``smet_compile.ops.choose``).
"""

from __future__ import annotations

from benchmarks import command
from benchmarks.gpu import SECTIONS as GPU_SECTIONS
from benchmarks.sections import linear, never_slower, optimizer, step, topology

CPU_SECTIONS = {
    "linear": linear.tables,
    "single": never_slower.single,
    "bf16": never_slower.bf16,
    "optimizer": optimizer.tables,
    "step": step.tables,
    "topology": topology.tables,
}


def main() -> None:
    sections = CPU_SECTIONS | GPU_SECTIONS
    args = command.options(__doc__, sections)
    command.run("Kernels", "python -m benchmarks.kernels", sections, args, "cpu")


if __name__ == "__main__":
    main()
