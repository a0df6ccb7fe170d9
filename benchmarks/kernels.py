"""Measures the kernels, as ratios side by side: products, optimizer, topology change, whole step.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.kernels [--only linear] [--repeats 9] [--out docs/results/kernels.md]

On the CPU. The section "peers" stands in ``docs/results/peers.md``. ``python -m benchmarks.gpu_check`` measures on a
GPU, and its part of the file stays as it is.
``SMET_COMPILE_KERNEL`` forces a kernel (``smet_compile.ops.choose``).
"""

from __future__ import annotations

from benchmarks import command
from benchmarks.sections import linear, never_slower, optimizer, peers, step, topology

SECTIONS = {
    "linear": linear.tables,
    "single": never_slower.single,
    "bf16": never_slower.bf16,
    "optimizer": optimizer.tables,
    "step": step.tables,
    "topology": topology.tables,
    "peers": peers.tables,
}


def main() -> None:
    args = command.options(__doc__, SECTIONS)
    command.run("Kernels", "python -m benchmarks.kernels", SECTIONS, args, "cpu")


if __name__ == "__main__":
    main()
