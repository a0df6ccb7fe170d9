"""The figure of what a training step stores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import smet_compile as smet


def draw_memory() -> Figure:
    """Bytes per dense weight of the tensors of a training step, by kind."""
    figure, columns = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    cases: tuple[tuple[torch.dtype, Any], ...] = ((torch.float32, None), (torch.bfloat16, "int8"))
    for axes, (dtype, moments) in zip(columns, cases, strict=True):
        bars = {"dense\nAdamW": measure_bytes(dtype, moments, None, 1)}
        for density in (0.5, 0.25, 0.1):
            for name, block in (("single", 1), ("64 tiles", 64)):
                bars[f"{name}\nd = {density}"] = measure_bytes(dtype, moments, density, block)
        bottoms = dict.fromkeys(bars, 0.0)
        for kind in ("weights", "gradients", "moments", "ages", "index"):
            heights = {name: kinds[kind] for name, kinds in bars.items()}
            axes.bar(list(bars), list(heights.values()), 0.7, list(bottoms.values()), label=kind)
            bottoms = {name: bottoms[name] + heights[name] for name in bars}
        for name, total in bottoms.items():
            axes.text(name, total + 0.1, f"{total:.2f}", ha="center", fontsize=9)
        sort = "fp32 weights and moments" if moments is None else "bf16 weights, 8-bit moments (dense: bf16)"
        axes.set_title(sort, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
    columns[0].set(ylabel="bytes per dense weight", ylim=(0, 17.5))
    columns[1].legend()
    figure.tight_layout()
    return figure


def measure_bytes(dtype: torch.dtype, moments: Any, density: float | None, block: int) -> dict[str, float]:
    """Bytes per dense weight of a layer of 1024 x 1024, by kind, as they lie in memory before an optimizer's step."""
    layer = nn.Linear(1024, 1024, bias=False, dtype=dtype)
    optimizer: torch.optim.Optimizer
    if density is None:
        optimizer = torch.optim.AdamW(layer.parameters())
    else:
        smet.sparsify(layer, density, block_shape=block)
        optimizer = smet.ActiveAdamW(layer, moment_dtype=moments)
    (weight,) = layer.parameters()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    moment_keys = {"exp_avg", "exp_avg_sq", "scales"}
    kinds: dict[str, Iterable[Any]] = {
        "weights": [weight],
        "gradients": [weight.grad],
        "moments": [state[key] for key in moment_keys & state.keys()],
        "ages": [state[key] for key in state.keys() - moment_keys],
        "index": layer.buffers(),
    }
    sizes = {kind: sum(t.nbytes for t in tensors if isinstance(t, Tensor)) for kind, tensors in kinds.items()}
    return {kind: num_bytes / 1024**2 for kind, num_bytes in sizes.items()}
