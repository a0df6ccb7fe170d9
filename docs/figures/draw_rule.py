"""The figure of a grown weight's first steps."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites

LATE, WARMUP, SHOWN_STEPS = 8000, 100, 130
RULES: dict[str, Callable[[nn.Module], smet.ActiveAdamW]] = {
    "correction by the global step (naive)": lambda model: smet.NaiveAdamW(model, lr_density_exponent=0.0),
    "by the block's age": lambda model: smet.ActiveAdamW(model, warmup_steps=0, lr_density_exponent=0.0),
    f"by age, warm-up W = {WARMUP} (SMET)": lambda model: smet.ActiveAdamW(
        model, warmup_steps=WARMUP, lr_density_exponent=0.0
    ),
}


def draw_rule() -> Figure:
    """Size of a grown weight's first steps, for a gradient that is constant and for one that is noise."""
    figure, columns = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    ages = range(1, SHOWN_STEPS + 1)
    for label, make in RULES.items():
        for axes, sizes_T in zip(columns, steps_after_growth(make), strict=True):
            axes.plot(ages, sizes_T, label=label)
            peak = int(sizes_T.argmax())
            for place in {0, peak} if sizes_T[peak] > 1.5 else ():
                said = f"{sizes_T[place]:.2f} at t = {place + 1}"
                axes.annotate(said, (place + 1, sizes_T[place]), (6, 2), textcoords="offset points", fontsize=9)
                axes.plot(place + 1, sizes_T[place], "ko", markersize=3)
    for axes, title in zip(columns, ("constant gradient", "gradient of pure noise (mean over weights)"), strict=True):
        axes.set(title=title, xlabel="t, steps since growth", yscale="log", ylim=(0.008, 10))
    columns[0].set_ylabel("size of the step / learning rate")
    columns[0].legend(fontsize=9, loc="lower right")
    figure.tight_layout()
    return figure


def steps_after_growth(make: Callable[[nn.Module], smet.ActiveAdamW], late: int = LATE) -> list[Tensor]:
    """(SHOWN_STEPS,) mean |step| / lr of the blocks grown after ``late`` steps: constant gradient, noise."""
    generator = torch.Generator().manual_seed(0)
    model = smet.sparsify(nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)), 0.25)
    optimizer = make(model)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=8 * late, every=late, drop_fraction=0.25, schedule="constant"
    )
    constant, noisy = (site.values for site in find_sites(model).values())
    moved: list[list[Tensor]] = [[], []]
    for step in range(1, late + SHOWN_STEPS + 1):
        constant.grad = torch.ones_like(constant)
        noisy.grad = torch.randn(noisy.shape, generator=generator)
        before = [values.detach().clone() for values in (constant, noisy)]
        optimizer.step()
        if step > late:
            for sizes, old, values in zip(moved, before, (constant, noisy), strict=True):
                grown = optimizer.block_ages(values) == step - late
                sizes.append((old - values.detach())[grown].abs().mean() / optimizer.param_groups[0]["lr"])
        manager.step()
    return [torch.stack(sizes) for sizes in moved]
