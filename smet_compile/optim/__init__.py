"""Provides optimizers that update active weights only, each block by its own age."""

from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.adamw import ActiveAdamW, NaiveAdamW
from smet_compile.optim.clipping import clip_grad_norm_
from smet_compile.optim.groups import decay_groups, param_groups, scale_initial_
from smet_compile.optim.lion import ActiveLion
from smet_compile.optim.scale import ActiveScale
from smet_compile.optim.sgd import ActiveSGD

OPTIMIZERS: dict[str, type[ActiveOptimizer]] = {
    "adamw": ActiveAdamW,
    "lion": ActiveLion,
    "sgd": ActiveSGD,
    "scale": ActiveScale,
}
"""The optimizers by their names in ``smet_compile.plan`` and on the command line."""

__all__ = [
    "OPTIMIZERS",
    "ActiveAdamW",
    "ActiveLion",
    "ActiveOptimizer",
    "ActiveSGD",
    "ActiveScale",
    "NaiveAdamW",
    "clip_grad_norm_",
    "decay_groups",
    "param_groups",
    "scale_initial_",
]
