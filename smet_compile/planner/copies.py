"""Copies of a model with other tensors in place of its own: on the meta device, sparse, dense again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.convert import draw, export_dense, make_compact
from smet_compile.convert.choose import Choice
from smet_compile.ops import find_sites


def meta_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """``model`` on the meta device, its floating-point tensors in ``dtype`` if there is one; ``model`` is untouched."""

    def like(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="meta")

    return copy_with(model, like).train()


def copy_with(model: nn.Module, like: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with other tensors in the place of parameters and buffers; tied ones stay tied."""
    known: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = like(tensor)
        known[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(model, known)


def make_sparse(model: nn.Module, choices: Iterable[Choice]) -> None:
    """``sparsify`` of a model on the meta device."""
    make_compact(model, [draw(choice, "random", rescale=False, seed=0) for choice in choices], reasons={})


def dense_copy(model: nn.Module) -> nn.Module:
    """A meta copy of ``model``, which is on the meta device, with every weight dense."""
    copied = meta_copy(model)
    return export_dense(copied) if find_sites(copied) else copied
