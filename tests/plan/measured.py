"""Measures what a real training step stores, by kind, and the most that its tensors hold at once."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import smet_compile as smet
from smet_compile.ops import find_sites

MOMENTS = {"exp_avg", "exp_avg_sq", "scales"}


def make(build: Callable[[], nn.Module], dtype: torch.dtype, density: float | None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(dtype).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model if density is None else smet.sparsify(model, density, **options)


def bytes_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, int]) -> Any:
    ours = {id(buffer) for site in find_sites(model).values() for buffer in site.compact.buffers()}
    state = [(key, t) for each in optimizer.state.values() for key, t in each.items() if isinstance(t, Tensor)]
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(gradients.values()),
        "moments": sum(t.nbytes for key, t in state if key in MOMENTS),
        "ages": sum(t.nbytes for key, t in state if key not in MOMENTS),
        "index": sum(b.nbytes for b in model.buffers() if id(b) in ours),
        "buffers": sum(b.nbytes for b in model.buffers() if id(b) not in ours),
    }


class Gradients:
    """Keeps the bytes of the gradients that the optimizer's last step found."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.of: dict[nn.Parameter, int] = {}
        self._optimizer = optimizer  # with a hook of its own it would be given every gradient
        register_optimizer_step_pre_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer is not self._optimizer:
            return
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.of = {p: p.grad.nbytes for p in held if p.grad is not None}


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
