"""Scales the finished steps of an optimizer by the factor of each row: an option for Adam that is not SparseOpt's.

SparseOpt multiplies gradients. Adam divides by their size, so that a factor that stays the same cancels. To move the
rows of a weight by different amounts under Adam, the step itself has to be scaled, weight decay included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from smet_compile.ops import Site
from smet_compile.ops.law import compute_dtype
from smet_compile.ops.row_scale import block_factors
from smet_compile.ops.torch_insides import outside_graphs

_SCALING = "_smet_step_scaling"


class _StepScaling:
    """Keeps the values from before a step and scales what the step has added to them."""

    def __init__(self, optimizer: Optimizer, sites: Iterable[Site]) -> None:
        self._sites = list(sites)
        self._before: list[tuple[Site, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._note_values),
            optimizer.register_step_post_hook(self._scale_steps),
        ]

    @outside_graphs("a scaled step runs in eager mode; compile what calls it without fullgraph=True")
    def _note_values(self, *_: Any) -> None:
        trained = [site for site in self._sites if site.values.grad is not None]
        self._before = [(site, site.values.detach().clone()) for site in trained]

    @outside_graphs("a scaled step runs in eager mode; compile what calls it without fullgraph=True")
    @torch.no_grad()
    def _scale_steps(self, *_: Any) -> None:
        for site, before in self._before:
            factors = block_factors(site.compact.active, compute_dtype(before.dtype))
            site.values.copy_(before + factors * (site.values - before))
        self._before = []

    def remove(self) -> None:
        """Ends the scaling."""
        for handle in self._handles:
            handle.remove()


def scale_steps(optimizer: Optimizer, sites: Iterable[Site]) -> None:
    """Makes each step of ``optimizer`` move row i of ``sites`` by √(k_i / k̄) times what it would; no sites end that."""
    known: _StepScaling | None = optimizer.__dict__.pop(_SCALING, None)
    if known is not None:
        known.remove()
    sites = list(sites)
    if sites:
        optimizer.__dict__[_SCALING] = _StepScaling(optimizer, sites)


def scales_steps(optimizer: Any) -> bool:
    """Tells whether ``scale_steps`` is in force, which changes the values after ``optimizer.step()``."""
    return _SCALING in optimizer.__dict__
