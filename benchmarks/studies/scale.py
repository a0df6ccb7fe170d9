"""How large the studies are: what two cores finish in hours, what a GPU does, and what a test can afford."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.studies.case import Shape


@dataclass(frozen=True)
class Scale:
    """Shapes and lengths.

    Args:
        small: 1.3M parameters on the CPU, for what needs many runs of single weights.
        large: 2.4M parameters, wide enough for tiles of 64.
        budgets, widest: widths of the dense models that set the budgets of `equal_memory`, and the largest it tries.
        rate_steps, spike_steps, sensitivity_steps, quality_steps: lengths of the runs of each study.
    """

    small: Shape
    large: Shape
    rate_steps: int
    spike_steps: int
    sensitivity_steps: int
    quality_steps: int
    budgets: tuple[int, ...]
    widest: int
    memory_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    eager: bool = False


SCALES = {
    "cpu": Scale(
        small=Shape(hidden=128, intermediate=352, heads=4, layers=6, sequence=64, batch=8),
        large=Shape(hidden=256, intermediate=640, heads=4, layers=3, sequence=64, batch=8),
        rate_steps=500,
        spike_steps=1200,
        sensitivity_steps=1200,
        quality_steps=2000,
        budgets=(96, 160),
        widest=1024,
        memory_steps=1500,
    ),
    "gpu": Scale(
        small=Shape(hidden=256, intermediate=688, heads=4, layers=4, sequence=256, batch=64, device="cuda"),
        large=Shape(hidden=512, intermediate=1376, heads=8, layers=8, sequence=256, batch=64, device="cuda"),
        rate_steps=2000,
        spike_steps=4000,
        sensitivity_steps=4000,
        quality_steps=10000,
        budgets=(256, 512),
        widest=4096,
        memory_steps=10000,
    ),
    "quick": Scale(
        small=Shape(hidden=32, intermediate=64, heads=2, layers=1, sequence=16, batch=2),
        large=Shape(hidden=256, intermediate=256, heads=2, layers=1, sequence=16, batch=2),
        rate_steps=4,
        spike_steps=40,
        sensitivity_steps=8,
        quality_steps=4,
        budgets=(64,),
        widest=256,
        memory_steps=4,
        seeds=(0, 1),
        eager=True,
    ),
}
