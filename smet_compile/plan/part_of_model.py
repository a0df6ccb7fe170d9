"""Makes the run of one rank of tensor parallelism: its part of each layer that is cut, and all of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from smet_compile.convert import draw, make_compact
from smet_compile.convert.choose import Choice
from smet_compile.convert.find_weights import find_weights
from smet_compile.plan.run import PlannedRun
from smet_compile.plan.shapes import empty_copy
from smet_compile.plan.stored import Stored

_SIZES = ("out_features", "in_features")
"""The attributes of an ``nn.Linear`` that hold the size of its weight along each dimension."""


def run_of_part(run: PlannedRun, parts: Sequence[Stored], dims: Mapping[str, int], count: int) -> PlannedRun:
    """Returns a run that computes what a rank does, with the operations and activations of its part.

    Args:
        parts: the parameters of the rank. dims: names of those that are cut → the dimension. count: into how many.
    """
    model: Any = empty_copy(run.dense_model)
    for name, dim in dims.items():
        owner, _, tensor = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = getattr(module, tensor)
        shape = [size // count if i == dim else size for i, size in enumerate(whole.shape)]
        empty = torch.empty(shape, dtype=whole.dtype, device="meta")
        setattr(module, tensor, nn.Parameter(empty, whole.requires_grad))
        if tensor == "weight":
            setattr(module, _SIZES[dim], shape[dim])
    weights = find_weights(model, True)
    compact = [Choice(weights[each.name], each.layout, each.num_active) for each in parts if each.layout is not None]
    make_compact(model, [draw(each, "random", rescale=False, seed=0) for each in compact], reasons={})
    request = replace(run.request, model=model, mesh=None, tp_plan=None)
    return PlannedRun(request, None if compact else 1.0)
