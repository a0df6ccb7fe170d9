"""Stops an optimizer that made its moments before sparsify from going on with them.

The parameter object it holds now holds compact values: moments of the dense shape belong to other weights. Some of
torch's optimizers would fail half way through a step, the fused ones not at all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.ops.outside_graphs import outside_graphs

_dense_shapes: Any = WeakIdKeyDictionary()


def watch(values: Tensor, dense_shape: torch.Size) -> None:
    """Notes that ``values`` was a dense parameter of ``dense_shape`` until now."""
    _install()
    _dense_shapes[values] = dense_shape


def forget(parameter: Tensor) -> None:
    """Takes back ``watch``: the parameter is dense again."""
    _dense_shapes.pop(parameter, None)


@functools.cache
def _install() -> None:
    """One hook for every optimizer, with the first compact weight."""
    register_optimizer_step_pre_hook(check)


@outside_graphs("an optimizer's step is checked in eager mode; compile what calls it without fullgraph=True")
def check(optimizer: Optimizer, *_: Any) -> None:
    """Raises ValueError before a step with moments from before sparsify."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        dense_shape = _dense_shapes.get(parameter)
        if dense_shape is None:
            continue
        for key, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == dense_shape:
                raise ValueError(
                    f"{type(optimizer).__name__}: expected {key!r} of shape {tuple(parameter.shape)}, got "
                    f"{tuple(dense_shape)}: sparsify was called after this optimizer had stepped; make it anew"
                )
