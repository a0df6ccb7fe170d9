"""The gate: kernels follow indices by address, so they receive only topologies and ages that passed here.

A check reads every bit once. Its result is kept with the versions of the tensors that were read, so that a tensor is
read again only after it was replaced or changed in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.format import Layout, count_active, empty_index, spare_bits, write_index

_GENERATIONS_OF_A_BYTE = 256
_GENERATION_DTYPES = (torch.uint8, torch.int16, torch.int32)


class _Passed(NamedTuple):
    """Records the state of the tensors that passed.

    Args:
        tensor: what the record is kept for. state: as it was then.
        others, other_states: the tensors that were read with it, and their states.
        facts: what else was compared.
    """

    tensor: weakref.ref[Tensor]
    state: tuple[int, ...]
    others: tuple[weakref.ref[Tensor], ...]
    other_states: tuple[tuple[int, ...], ...]
    facts: tuple[Any, ...]

    def still_holds(self, tensor: Tensor, others: list[Tensor], facts: tuple[Any, ...]) -> bool:
        if self.tensor() is not tensor or self.state != _state(tensor) or len(self.others) != len(others):
            return False
        for known, state, other in zip(self.others, self.other_states, others, strict=True):
            if known() is not other or state != _state(other):
                return False
        return self.facts == facts


def _state(tensor: Tensor) -> tuple[int, ...]:
    """Returns what changes with every change in place; tensors made in inference mode do not count theirs.

    The address changes where ``tensor.data`` was set to another tensor, which raises no version.
    """
    try:
        version = tensor._version
    except RuntimeError:
        version = -1
    return version, tensor.data_ptr()


_passed: dict[int, _Passed] = {}
"""The record of each tensor by its id, while it lives: read in every op, where a weak dictionary costs too much."""
_owners = WeakIdKeyDictionary()


def _note(tensor: Tensor, others: list[Tensor], facts: tuple[Any, ...]) -> None:
    key = id(tensor)

    def forget(dead: weakref.ref[Tensor]) -> None:
        known = _passed.get(key)
        if known is not None and known.tensor is dead:
            del _passed[key]

    states = tuple(_state(other) for other in others)
    references = tuple(weakref.ref(other) for other in others)
    _passed[key] = _Passed(weakref.ref(tensor, forget), _state(tensor), references, states, facts)


def _holds(tensor: Tensor, others: list[Tensor], facts: tuple[Any, ...]) -> bool:
    known = _passed.get(id(tensor))
    return known is not None and known.still_holds(tensor, others, facts)


def belongs_to(topology: Tensor, check_again: Callable[[], object]) -> None:
    """Notes who checks ``topology`` after it was changed in place; ``check_again`` is a bound method, held weakly."""
    _owners[topology] = weakref.WeakMethod(check_again)


def passed(topology: Tensor, index: list[Tensor], layout: Layout, num_active: int) -> None:
    """Notes that ``topology`` and the lists derived from it were checked, as they are now."""
    _note(topology, index, (layout, num_active))


def has_passed(topology: Tensor, index: list[Tensor], layout: Layout, num_active: int) -> bool:
    """Returns whether nothing was changed since these tensors passed."""
    return _holds(topology, index, (layout, num_active))


def is_known(topology: Tensor) -> bool:
    """Returns whether somebody owns this very tensor, whatever became of its content."""
    return topology in _owners


def check_topology(topology: Tensor, index: list[Tensor], layout: Layout, num_active: int) -> None:
    """Raises ValueError unless ``topology`` holds ``num_active`` blocks of ``layout`` and ``index`` is derived from it.

    To be called by every op before a kernel is chosen. Whoever owns the topology is asked first, and can name it.
    """
    if is_traced(topology) or has_passed(topology, index, layout, num_active):
        return
    owner = _owners.get(topology)
    check_again = None if owner is None else owner()
    if check_again is not None:
        check_again()
        if has_passed(topology, index, layout, num_active):
            return
    error = topology_error(topology, layout, num_active) or _index_error(topology, index, layout, num_active)
    if error is not None:
        raise ValueError(f"topology: {error}")
    passed(topology, index, layout, num_active)


def topology_error(bits: Tensor, layout: Layout, num_active: int) -> str | None:
    """Says why ``bits`` cannot be the topology of ``num_active`` values of ``layout``; None where they can."""
    shape = (-(-layout.num_blocks // 8),)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != shape:
        return f"expected uint8 of shape {shape}, got {bits.dtype} of {tuple(bits.shape)}"
    if spare := spare_bits(bits, layout.num_blocks):
        return f"expected zeros behind the last of {layout.num_blocks} blocks, got the spare bits {spare:b}"
    count = count_active(bits)
    if count != num_active:
        return f"expected {num_active} active blocks, one for each row of the values, got {count}"
    return None


def _index_error(topology: Tensor, index: list[Tensor], layout: Layout, num_active: int) -> str | None:
    """Compares the lists with those that follow from the topology, which passed."""
    if not index:
        return None
    derived = empty_index(layout, num_active, topology.device)
    write_index(derived, topology, layout)
    lists = index[0]
    if len(index) != 1 or lists.dtype != derived.dtype or not torch.equal(lists, derived):
        return "expected the lists that are derived from it, got others; pass CompactWeight.index, or []"
    return None


def check_ages(name: str, generation: Tensor | None, births: Tensor | None, num_active: int) -> None:
    """Raises ValueError unless every block's generation is an entry of the table ``births``.

    Args:
        generation: (num_active,) uint8, int16 or int32. births: (num_generations,) int64. None: there are no ages.
    """
    if generation is None or births is None:
        if generation is not births:
            raise ValueError(f"{name}: expected generation and births, or neither, got one of them")
        return
    if births.dtype != torch.int64 or births.dim() != 1 or births.numel() == 0:
        raise ValueError(
            f"{name}: expected births of int64 and one dimension, got {births.dtype} of {tuple(births.shape)}"
        )
    if generation.dtype not in _GENERATION_DTYPES or tuple(generation.shape) != (num_active,):
        raise ValueError(
            f"{name}: expected a generation of uint8, int16 or int32 and shape {(num_active,)}, got "
            f"{generation.dtype} of {tuple(generation.shape)}"
        )
    whole_table = generation.dtype == torch.uint8 and births.numel() >= _GENERATIONS_OF_A_BYTE
    if whole_table or is_traced(generation):
        return
    facts = (births.numel(),)
    if _holds(generation, [], facts):
        return
    if num_active and not (int(generation.min()) >= 0 and int(generation.max()) < births.numel()):
        raise ValueError(
            f"{name}: expected generations from 0 to {births.numel() - 1}, the entries of births, got "
            f"{int(generation.min())} to {int(generation.max())}; load a state that was saved whole"
        )
    _note(generation, [], facts)


def is_traced(tensor: Tensor) -> bool:
    """Returns whether the tensor only stands for one: on the meta device, or while something is traced."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta
