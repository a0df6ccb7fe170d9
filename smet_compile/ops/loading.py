"""Loads the values and the topology of a compact weight together or not at all, and no dense weight in their place.

A row of the values belongs to whichever block the topology names. Values with another topology are other weights, so
whatever does not fit is refused before ``nn.Module.load_state_dict`` writes the first of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import Layout, count_active, slabs, unpack_bits
from smet_compile.ops import following, gate
from smet_compile.shards import is_sharded, local

_VALUES, _BITS, _LAYOUT, _LEFT = "original", "0.topology", "smet_layout", "left_by_load"
_TOGETHER = (
    "a row of the values belongs to the block that the topology names. Save and load the whole model.state_dict(), not "
    "its parameters alone"
)


_DENSE = (
    "expected compact weights, got a dense one; resume from a checkpoint of the sparse run, or load dense weights "
    "before smet.sparsify"
)


def refuse_dense(own: Any, compact_names: Callable[[nn.Module], Iterable[str]]) -> None:
    """Has modules of the class ``own`` refuse dense weights in the place of compact ones, even without ``strict``.

    Without ``strict`` the other tensors of a dense model would be loaded alone, in silence. A dense weight beside its
    values is left out: a checkpoint of Hugging Face's Trainer has both.

    Args:
        compact_names: returns the names of the compact weights of a module.
    """
    load = own._load_from_state_dict

    def load_compact(self: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in compact_names(self):
            if f"{prefix}{name}" not in state:
                continue
            del state[f"{prefix}{name}"]
            is_compact = f"{prefix}parametrizations.{name}.{_VALUES}" in state
            if not is_compact and not any(_DENSE in error for error in args[-1]):  # one stands for all
                args[-1].append(f"{prefix}{name}: {_DENSE}")
        load(self, state, prefix, *args)

    own._load_from_state_dict = load_compact


def install(chain: nn.Module) -> None:
    """Has ``chain``, the parametrizations of a compact weight, check its part of a state dict before it is loaded.

    What is kept for each block follows a topology that was loaded (``following``).
    """
    chain.register_state_dict_post_hook(_note_layout)
    chain.register_load_state_dict_pre_hook(_refuse_parts)
    chain.register_load_state_dict_post_hook(_follow_topology)


def _note_layout(chain: Any, _: dict[str, Any], __: str, metadata: dict[str, Any]) -> None:
    """Notes in the metadata of a state dict, where modules note their versions, how the weight is cut into blocks."""
    metadata[_LAYOUT] = _cut_of(chain[0])


def _cut_of(compact: Any) -> str:
    """Returns shape, matrix and block shape of the whole weight as a text.

    Pattern and slabs, which restrict the active blocks alone, are left out: every topology is checked against them.
    """
    layout: Layout = compact.layout if compact.part is None else compact.part.whole
    return dataclasses.replace(layout, slabs=None).text


def _refuse_parts(chain: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
    """Refuses values or a topology that do not fit, each other or the weight: what is there now then stays."""
    values, bits = state.get(prefix + _VALUES), state.get(prefix + _BITS)
    error, left = _layout_error(chain, values, metadata, prefix), None
    if error is None and chain[0].takes_stages:
        left = _take_stage(chain, values, bits)
    error = error or _error_of(chain, values, bits, prefix)
    is_loaded = error is None and bits is not None and not bits.is_meta
    chain[0].__dict__[_LEFT] = (left or _before(chain)) if is_loaded else None
    if error is None:
        return
    args[-1].append(error)
    for key, present in ((_VALUES, chain.original), (_BITS, chain[0].topology)):
        if prefix + key in state:
            state[prefix + key] = present


def _take_stage(chain: Any, values: Any, bits: Any) -> following.Before | None:
    """Gives the weight the number of blocks that it has in a state dict of another density stage.

    Returns what was there before, so that the optimizers' state follows once the rest is loaded; None where the number
    stays. A weight without data had no blocks whose state could follow.
    """
    compact = chain[0]
    mask = mask_of_other_number(compact, bits) if isinstance(bits, Tensor) else None
    if mask is None or not isinstance(values, Tensor) or is_sharded(values):
        return None
    if tuple(values.shape) != compact.layout.values_shape(int(mask.sum())):
        return None
    before = None
    if compact.has_data():
        before = following.note_resize(chain.original, compact.topology.clone())
    else:
        following.forget(chain.original)
    compact.resize(chain.original, mask)
    mark_resized(chain)
    return before


def mask_of_other_number(compact: Any, bits: Tensor) -> Tensor | None:
    """Returns the mask of a topology with another number of active blocks than ``compact`` has.

    Returns None for one with as many, and for one that the weight could not have.
    """
    topology = compact.topology
    if bits.is_meta or topology.is_meta or bits.dtype != topology.dtype or bits.shape != topology.shape:
        return None
    count = count_active(bits)
    if count in (0, compact.num_active) or gate.topology_error(bits, compact.layout, count) is not None:
        return None
    mask = unpack_bits(bits, compact.layout.num_blocks).to(topology.device)
    return mask if slabs.mask_error(mask, compact.pattern, compact.layout) is None else None


def mark_resized(chain: Any) -> None:
    """Takes the parameter out of its module and puts it back, after its shape has changed.

    Compiled code of torch 2.11 looks at the shape of a parameter again only where a dict of modules has changed.
    """
    chain._parameters["original"] = chain._parameters.pop("original")


def _before(chain: Any) -> following.Before | None:
    """Notes the topology that the rows of the values belong to; None where there is nothing to load into."""
    compact = chain[0]
    if gate.is_traced(compact.topology):
        return None
    return following.Before(compact.topology.clone() if compact.has_data() else None, chain.original.shape[0])


def _follow_topology(chain: Any, _: Any) -> None:
    compact = chain[0]
    left: following.Before | None = compact.__dict__.pop(_LEFT, None)
    if left is not None:
        after = compact.topology.clone()
        following.follow(compact.name, chain.original, compact.layout.num_blocks, left, after, compact.part)


def _error_of(chain: Any, values: Any, bits: Any, prefix: str) -> str | None:
    """Says why values and topology of a state dict cannot be loaded; None where they can, or are not in it."""
    name, compact = name_of(prefix), chain[0]
    if values is None and bits is None:
        return None
    if not all(isinstance(each, Tensor | None) for each in (values, bits)):
        return f"{name}: expected tensors, got {type(values).__name__} and {type(bits).__name__}; {_TOGETHER}"
    if values is None:
        is_present = compact.has_data() and torch.equal(bits_here(compact, bits), compact.topology)
        return None if is_present else f"{name}: expected values with the topology, got a topology alone; {_TOGETHER}"
    if bits is None:
        return f"{name}: expected a topology with the values, got values alone; {_TOGETHER}"
    if values.shape != chain.original.shape:
        return (
            f"{name}: expected values of shape {tuple(chain.original.shape)}, got {tuple(values.shape)}; sparsify with "
            "the same block_shape, density and pattern"
        )
    return misfit(compact, bits, name)


def _layout_error(chain: Any, values: Any, metadata: dict[str, Any], prefix: str) -> str | None:
    """Says why values were saved of a weight that is cut otherwise; None where they were not, or nothing is known."""
    own = _cut_of(chain[0])
    saved = metadata.get(_LAYOUT, own)
    if values is None or saved == own:
        return None
    return (
        f"{name_of(prefix)}: expected a weight of shape, matrix and block shape {own}, got one of {saved!s:.80}; load "
        "it into a model of the same shapes, sparsified with the same block_shape"
    )


def misfit(compact: Any, bits: Tensor | None, name: str) -> str | None:
    """Says why ``bits`` cannot be the topology of the compact weight ``name``; None where they can.

    ``bits`` are those of the weight here, or of all parts of it that tensor parallelism made.
    """
    if bits is None or bits.is_meta:
        return None
    here = 1 if compact.part is None else compact.part.count
    saved = bits.shape[0] if bits.dim() == 2 else here
    error: str | None = compact.topology_error(bits_here(compact, bits)) if saved == here else ""
    if error is None:
        return None
    if saved != here or (here > 1 and bits.dim() == 1 and bits.shape != compact.topology.shape):
        parts = f"{saved} parts" if saved != here and saved > 1 else "the whole weight"
        return (
            f"{name}: topology: expected that of {f'{here} parts' if here > 1 else 'the whole weight'}, as tensor "
            f"parallelism over {here} ranks has it, got that of {parts}; a state dict goes on with as many ranks of "
            "tensor parallelism alone. Use save_checkpoint and load_checkpoint, whose file goes everywhere"
        )
    return f"{name}: topology: {error}; sparsify with the same block_shape, density and pattern"


def bits_here(compact: Any, bits: Tensor) -> Tensor:
    """Returns the bits of the part of a weight that tensor parallelism left here; others as they are."""
    if compact.part is None or bits.dim() != 2:
        return bits
    if is_sharded(bits):
        here: Tensor = local(bits)[0]
        return here
    return bits[compact.part.band.number]


def name_of(prefix: str) -> str:
    """Returns the name of a weight from the prefix of its parametrizations in a state dict."""
    return prefix.replace("parametrizations.", "").removesuffix(".")
