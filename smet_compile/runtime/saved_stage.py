"""Brings a fresh model and its optimizers to the density stage of a checkpoint, so that the rest can be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from smet_compile.ops import CompactWeight, Site, canonical_name, find_sites
from smet_compile.ops.loading import mask_of_other_number


def find_resized(saved: Mapping[str, Any], model: nn.Module) -> list[tuple[Site, Tensor]]:
    """Returns each compact weight that has another number of active blocks in the checkpoint, and its mask there.

    ``saved`` are the tensors of the model by canonical names. A topology that the weight could not have is left out:
    the checks of the checkpoint name it.
    """
    sites = {id(site.compact): site for site in find_sites(model).values()}
    found = []
    for raw, module in model.named_modules():
        if not isinstance(module, CompactWeight):
            continue
        bits = saved.get(f"{canonical_name(model, raw)}.topology")
        mask = mask_of_other_number(module, bits) if isinstance(bits, Tensor) else None
        if mask is not None:
            found.append((sites[id(module)], mask))
    return found


def check_state_is_loaded(resized: Iterable[tuple[Site, Tensor]], optimizers: Iterable[Any]) -> None:
    """Raises ValueError where ``optimizers``, whose state is not loaded, keep some for a weight to be resized."""
    states = [getattr(each, "state", {}) for each in optimizers]
    for site, mask in resized:
        if any(state.get(site.values) for state in states):
            raise ValueError(
                f"{site.name}: expected the optimizer with a checkpoint of another density stage, got the manager "
                f"alone, while there is state for {site.num_active:,} active blocks and the checkpoint has "
                f"{int(mask.sum()):,}; pass optimizer=, or go back to its weights alone by model.load_state_dict"
            )


def resize_as_saved(resized: Iterable[tuple[Site, Tensor]], optimizers: Iterable[Any]) -> None:
    """Gives weights the masks of a checkpoint, with values of zero, and makes optimizers forget their state."""
    for site, mask in resized:
        site.compact.resize(site.values, mask)
        site.mark_resized()
        for optimizer in optimizers:
            optimizer.state.pop(site.values, None)
