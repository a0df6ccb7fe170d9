"""Clips the norm of gradients that are cut over different meshes, which torch's own function refuses to add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from smet_compile.format.arguments import described, flag, number
from smet_compile.shards import is_sharded, local, named


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales all gradients together so that their norm is at most ``max_norm``; returns the norm before.

    It does what ``torch.nn.utils.clip_grad_norm_`` does, also where gradients are cut over meshes of different
    dimensions, as under tensor parallelism with ``fully_shard``: each part of a gradient counts once, whichever ranks
    hold it. A gradient that is not sharded counts as the same on all ranks. Every rank has to call.

    Args:
        parameters: a model, or parameters; those without a gradient are left out.
        max_norm: the largest norm that is left as it is.
        norm_type: p of the p-norm, or ``math.inf`` for the largest.
        error_if_nonfinite: whether a norm that is not finite is an error instead of a factor that is not finite.

    Returns: the norm, a tensor without dimensions, the same on every rank.

    Raises:
        ValueError: an argument out of range; a gradient that ranks have yet to add up.
        RuntimeError: a norm that is not finite, where ``error_if_nonfinite`` says so. No gradient has then changed.
    """
    max_norm = number("max_norm", max_norm, at_least=0)
    norm_type = math.inf if norm_type == math.inf else number("norm_type", norm_type, above=0)
    error_if_nonfinite = flag("error_if_nonfinite", error_if_nonfinite)
    listed = _listed(parameters)
    grads = [p.grad for p in listed if p.grad is not None]
    norm = _norm(listed, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of order {norm_type:g} of the gradients is {float(norm)}, so they cannot be "
            "clipped; pass error_if_nonfinite=False to scale them by it all the same"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        here = local(grad)
        here.mul_(factor.to(device=here.device, dtype=here.dtype if here.is_floating_point() else factor.dtype))
    return norm


def _listed(parameters: Any) -> list[Tensor]:
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    listed = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, Iterable) else None
    if listed is None or not all(isinstance(each, Tensor) for each in listed):
        raise ValueError(
            f"parameters: expected a model or parameters, got {described(parameters)}; pass model or model.parameters()"
        )
    return listed


def _norm(parameters: list[Tensor], norm_type: float) -> Tensor:
    """Returns the norm of all gradients; those that are cut over the same groups of ranks are added up together.

    Every rank goes through the groups in the order of the parameters, with or without gradients.
    """
    alike: dict[tuple[str, ...], tuple[list[Any], list[Tensor]]] = {}
    device = local(parameters[0]).device if parameters else torch.device("cpu")
    for parameter in parameters:
        grad = parameter.grad
        groups = _groups(parameter if grad is None else grad)
        key = tuple(group.group_name for group in groups)
        _, norms = alike.setdefault(key, (groups, [torch.zeros((), device=device)]))
        here = local(grad)
        if here is not None and here.numel():
            norms.append(torch.linalg.vector_norm(here, norm_type, dtype=_at_least_fp32(here.dtype)).to(device))
    totals = [torch.zeros((), device=device)]
    for groups, norms in alike.values():
        total = torch.linalg.vector_norm(torch.stack(_of_one_dtype(norms)), norm_type)
        for group in groups:
            total = _over_ranks(total, norm_type, group)
        totals.append(total)
    return torch.linalg.vector_norm(torch.stack(_of_one_dtype(totals)), norm_type)


def _of_one_dtype(norms: list[Tensor]) -> list[Tensor]:
    widest = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    return [norm.to(widest) for norm in norms]


def _over_ranks(norm: Tensor, norm_type: float, group: Any) -> Tensor:
    """Returns the norm of what the ranks of a group hold together."""
    largest = norm.clone()
    with named("finding the largest gradient"):
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=group)
    if norm_type == math.inf:
        return largest
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)  # so that no power is out of range
    powers = (norm / scale) ** norm_type
    with named("adding up the norms of gradients"):
        distributed.all_reduce(powers, group=group)
    return powers ** (1 / norm_type) * scale


def _groups(grad: Any) -> list[Any]:
    """Returns the groups whose ranks hold different parts of a gradient."""
    if not is_sharded(grad):
        return []
    mesh, groups = grad.device_mesh, []
    for dim, placement in enumerate(grad.placements):
        if placement.is_partial():
            raise ValueError(
                f"expected gradients that ranks have added up, got {placement} over {mesh}; redistribute them first"
            )
        if not placement.is_replicate() and mesh.size(dim) > 1:
            groups.append(mesh.get_group(dim))
    return groups


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
