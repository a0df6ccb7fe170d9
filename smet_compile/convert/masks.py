"""Gives the masks of a model's compact weights, and reads masks that say where weights are to be active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.convert.find_weights import Weight
from smet_compile.format import Layout, all_block_means, arguments, pack_bits, unpack, unpack_bits
from smet_compile.ops import Site, canonical_name, find_sites
from smet_compile.ops.sites import check_sparsified

_ADVICE = "pass a bool tensor of the weight's shape, as smet_compile.masks(model) returns"


@torch.no_grad()
def masks(model: nn.Module) -> dict[str, Tensor]:
    """Returns for each compact weight, by its name in the plain model, a dense bool tensor: True where it is active.

    ``sparsify(other, masks=masks(model), block_shape=...)`` makes another model sparse in the same places. A weight
    that is dense has no entry. Under tensor parallelism every rank has to ask, and gets the masks of whole weights.

    Raises:
        ValueError: no model, one that was never made sparse, or one without data yet.
    """
    arguments.module("masks", model)
    check_sparsified("masks", model)
    return {name: _dense_mask(site) for name, site in find_sites(model).items()}


def _dense_mask(site: Site) -> Tensor:
    active = unpack_bits(site.bits_of_whole(pack_bits(site.mask())), site.whole.num_blocks)
    ones = torch.ones(site.values_shape, dtype=torch.bool, device=active.device)
    return unpack(ones, active, site.whole)


def read_masks(model: nn.Module, given: Any, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Returns the masks that ``sparsify(masks=...)`` was given, bool and by the names in ``weights``.

    Raises ValueError for a name that no weight has, for a weight that cannot be sparse, and for what is no mask.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"masks: expected a dict from names of weights to bool tensors, got {arguments.described(given)}; pass "
            "for example smet_compile.masks(model)"
        )
    found: dict[str, Tensor] = {}
    for name, mask in given.items():
        weight = _find(model, name, weights)
        if weight.name in found:
            raise ValueError(f"masks: expected one mask for {weight.name}, got two; leave out {name!r}")
        if weight.never_reason is not None:
            raise ValueError(f"masks: {weight.name} cannot be sparse: {weight.never_reason}; leave out its mask")
        found[weight.name] = _check_mask(weight, mask)
    return found


def _find(model: nn.Module, name: str, weights: Mapping[str, Weight]) -> Weight:
    """Returns the weight of this name, or the only one of the module of this name."""
    by_name = [w for w in weights.values() if name in (w.name, canonical_name(model, w.name), w.name_of_computed)]
    in_module = [w for w in weights.values() if name in (w.module_name, canonical_name(model, w.module_name))]
    found = by_name or in_module
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(weight.name for weight in found)
        raise ValueError(f"masks: expected the name of one weight, got {name!r}, which has several ({names}); pass one")
    some = ", ".join(list(weights)[:3])
    raise ValueError(f"masks: {name!r} is none of the parameters of two or more dimensions ({some}, ...)")


def _check_mask(weight: Weight, mask: Any) -> Tensor:
    """Returns the mask of a weight as bool, on the device of the weight."""
    tensor = weight.tensor
    if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.is_meta:
        raise ValueError(f"{weight.name}: expected a mask, got {arguments.described(mask)}; {_ADVICE}")
    if mask.shape != tensor.shape:
        raise ValueError(
            f"{weight.name}: expected a mask of shape {tuple(tensor.shape)}, got {tuple(mask.shape)}; {_ADVICE}"
        )
    if tensor.is_meta:
        raise ValueError(f"{weight.name}: expected a weight with data for a mask, got one on the meta device; load it")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{weight.name}: expected a mask of 0 and 1, got other numbers; {_ADVICE}")
    mask = mask.detach().to(device=tensor.device, dtype=torch.bool)
    if not bool(mask.any()):
        raise ValueError(f"{weight.name}: expected a mask with an active weight, got one that is all false; exclude it")
    if bool(mask.all()):
        raise ValueError(
            f"{weight.name}: expected a mask with an inactive weight, got one that is all true; leave it out of masks, "
            "and the weight stays dense"
        )
    return mask


def block_mask(name: str, mask: Tensor, layout: Layout) -> Tensor:
    """Returns the mask (num_blocks,) of the blocks in which any entry of ``mask`` is true; not all of them may be."""
    blocks = all_block_means(mask, layout) > 0
    if bool(blocks.all()):
        raise ValueError(
            f"{name}: expected a mask that leaves a block of {layout.block_shape} inactive, got one with active "
            "weights in every block; take smaller blocks"
        )
    return blocks
