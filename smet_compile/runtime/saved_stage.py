"""Brings a fresh model and its optimizers to the density stage of a checkpoint, so that the rest can be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from smet_compile.format import count_active, unpack_bits
from smet_compile.ops import CompactWeight, Site, canonical_name, find_sites
from smet_compile.ops.gate import topology_error


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
        bits, layout = saved.get(f"{canonical_name(model, raw)}.topology"), module.layout
        if isinstance(bits, Tensor) and _is_of_other_number(bits, module):
            found.append((sites[id(module)], unpack_bits(bits, layout.num_blocks).to(module.topology.device)))
    return found


def _is_of_other_number(bits: Tensor, compact: CompactWeight) -> bool:
    if bits.is_meta or bits.dtype != compact.topology.dtype or bits.shape != compact.topology.shape:
        return False
    count = count_active(bits)
    return count not in (0, compact.num_active) and topology_error(bits, compact.layout, count) is None


def resize_as_saved(resized: Iterable[tuple[Site, Tensor]], optimizers: Iterable[Any]) -> None:
    """Gives weights the masks of a checkpoint, with values of zero, and makes optimizers forget their state."""
    for site, mask in resized:
        site.compact.resize(site.values, mask)
        site.mark_resized()
        for optimizer in optimizers:
            optimizer.state.pop(site.values, None)
