"""Scales the finished steps of an optimizer by the factor of each row: an option for Adam that is not SparseOpt's.

SparseOpt multiplies gradients. Adam divides by their size, so that a factor that stays the same cancels. To move the
rows of a weight by different amounts under Adam, the step itself has to be scaled, weight decay included. In bf16 a
step is seldom more than the last bit of a weight, so the scaled one is rounded at random, which keeps its mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from smet_compile.format import positions_of
from smet_compile.ops import Site
from smet_compile.ops.law import compute_dtype, noise_key, round_stochastic
from smet_compile.ops.law_of_updates import Location
from smet_compile.ops.row_scale import block_factors
from smet_compile.ops.torch_insides import outside_graphs

_SCALING = "_smet_step_scaling"
_NOISE_SEED = 0x5CA1E
"""Seed of the rounding, which sets its noise apart from that of the optimizer's own step."""


class _StepScaling:
    """Keeps the values from before a step and scales what the step has added to them."""

    def __init__(self, optimizer: Optimizer, sites: Iterable[Site]) -> None:
        self._sites = list(sites)
        self._before: list[tuple[Site, Tensor]] = []
        after_step = optimizer.register_step_post_hook(self._scale_steps)
        self._handles = [optimizer.register_step_pre_hook(self._note_values), after_step]
        hooks = optimizer._optimizer_step_post_hooks
        for earlier in [number for number in hooks if number != after_step.id]:
            hooks[earlier] = hooks.pop(earlier)  # a topology update comes after the scaling

    @outside_graphs("a scaled step runs in eager mode; compile what calls it without fullgraph=True")
    def _note_values(self, *_: Any) -> None:
        trained = [site for site in self._sites if site.values.grad is not None]
        self._before = [(site, site.values.detach().clone()) for site in trained]

    @outside_graphs("a scaled step runs in eager mode; compile what calls it without fullgraph=True")
    @torch.no_grad()
    def _scale_steps(self, optimizer: Optimizer, *_: Any) -> None:
        for site, before in self._before:
            factors = block_factors(site.compact.active, compute_dtype(before.dtype))
            scaled = before + factors * (site.values - before)
            if site.values.dtype == torch.bfloat16:
                scaled = round_stochastic(scaled, _noise(site, optimizer.state[site.values].get("step", 0)))
            site.values.copy_(scaled)
        self._before = []

    def remove(self) -> None:
        """Ends the scaling."""
        for handle in self._handles:
            handle.remove()


def _noise(site: Site, step: Any) -> Tensor:
    """Returns 16 random bits for each value, which depend on the step and on the place of the block alone."""
    number = torch.as_tensor(step, device=site.values.device).long()
    blocks = positions_of(site.mask())
    return Location(blocks, site.layout).noise(noise_key(_NOISE_SEED, number)).bits(0).view(site.values.shape)


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
