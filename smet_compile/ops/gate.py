"""Checks topologies and ages before a kernel receives them: kernels read and write where indices point to.

A check reads every bit, so its result is remembered by the identity of the bits. It holds until the bits or the lists
are replaced or changed in place. Every op calls ``find`` first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.format import Layout, Topology, count_active, empty_lists, spare_bits, write_lists
from smet_compile.ops import captures

GENERATIONS_OF_A_BYTE = 256
_GENERATION_DTYPES = (torch.uint8, torch.int16, torch.int32)


_topologies: dict[int, weakref.ref[Topology]] = {}
"""The topologies that passed, by the id of their bits. Every op reads it; a weak dictionary would be too slow."""
_owners = WeakIdKeyDictionary()
"""Methods that check bits again after a change, by bits."""


def admit(topology: Topology) -> None:
    """Notes that ``topology`` was checked. The note lasts as long as somebody else holds the topology."""
    key = id(topology.bits)

    def forget(dead: weakref.ref[Topology]) -> None:
        if _topologies.get(key) is dead:
            del _topologies[key]

    _topologies[key] = weakref.ref(topology, forget)


def belongs_to(bits: Tensor, check_again: Callable[[], object]) -> None:
    """Notes a method, held weakly, that checks ``bits`` after a change: admits them again, or raises."""
    _owners[bits] = weakref.WeakMethod(check_again)


def is_owned(bits: Tensor) -> bool:
    """Tells whether ``belongs_to`` was called for this tensor object, whatever its content is now."""
    return bits in _owners


def find(bits: Tensor, lists: Tensor, layout_text: str, num_active: int) -> Topology:
    """Returns the checked topology of these tensors. If they changed since the last check, their owner checks first.

    Raises ValueError where the bits do not hold ``num_active`` blocks of the layout, or do not agree with the lists.
    """
    topology = _admitted(bits, lists, layout_text, num_active)
    if topology is not None:
        return topology
    captures.refuse_in_capture(bits.device, "a topology that was checked")
    owner = _owners.get(bits)
    check_again = None if owner is None else owner()
    if check_again is not None:
        check_again()
        topology = _admitted(bits, lists, layout_text, num_active)
        if topology is not None:
            return topology
    layout = Layout.from_text(layout_text)
    if not is_traced(bits):
        error = topology_error(bits, layout, num_active) or _lists_error(bits, lists, layout, num_active)
        if error is not None:
            raise ValueError(f"topology: {error}")
    topology = Topology(layout, bits, lists, num_active)
    admit(topology)
    return topology


def is_admitted(bits: Tensor, lists: Tensor, layout_text: str, num_active: int) -> bool:
    """Returns whether these tensors passed, and nothing was changed since."""
    return _admitted(bits, lists, layout_text, num_active) is not None


def _admitted(bits: Tensor, lists: Tensor, layout_text: str, num_active: int) -> Topology | None:
    """Returns the topology that was checked before, unchanged since; None where there is none."""
    known = _topologies.get(id(bits))
    topology = None if known is None else known()
    if (
        topology is not None
        and topology.bits is bits
        and topology.lists is lists
        and topology.num_active == num_active
        and topology.is_unchanged()
    ):
        if topology.layout.text == layout_text:
            return topology
        return topology.constant(("layout", layout_text), lambda: _of_another_shape(topology, layout_text))
    return None


def _of_another_shape(topology: Topology, layout_text: str) -> Topology | None:
    """Returns the same topology for another shape of the same matrices, such as that of a 1x1 convolution's product."""
    layout = Layout.from_text(layout_text)
    same = ("matrix", "num_matrices", "block_shape", "slabs")
    if any(getattr(layout, name) != getattr(topology.layout, name) for name in same):
        return None
    return Topology(layout, topology.bits, topology.lists, topology.num_active)


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


def _lists_error(bits: Tensor, lists: Tensor, layout: Layout, num_active: int) -> str | None:
    """Says where the lists differ from those that follow from the bits; None where they are equal."""
    derived = empty_lists(layout, num_active, bits.device)
    write_lists(derived, bits, layout)
    if lists.dtype != derived.dtype or lists.device != derived.device or not torch.equal(lists, derived):
        return "expected the lists that are derived from it, got others; pass CompactWeight.lists"
    return None


class _Ages(NamedTuple):
    """Records generations that passed the check: a weak reference, their state then, and the number of births."""

    generation: weakref.ref[Tensor]
    state: tuple[int, int]
    num_births: int


_checked_ages: dict[int, _Ages] = {}


def check_ages(name: str, generation: Tensor | None, births: Tensor | None, num_active: int) -> None:
    """Raises ValueError unless every block's generation is an entry of the table ``births``.

    Args:
        generation: (num_active,) uint8, int16 or int32. births: (num_generations,) int64. Both None without ages.
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
    whole_table = generation.dtype == torch.uint8 and births.numel() >= GENERATIONS_OF_A_BYTE
    if whole_table or is_traced(generation):
        return
    known = _checked_ages.get(id(generation))
    state = _state(generation)
    if known is not None and known.generation() is generation and known[1:] == (state, births.numel()):
        return
    captures.refuse_in_capture(generation.device, "ages that were checked")
    if num_active and not (int(generation.min()) >= 0 and int(generation.max()) < births.numel()):
        raise ValueError(
            f"{name}: expected generations from 0 to {births.numel() - 1}, the entries of births, got "
            f"{int(generation.min())} to {int(generation.max())}; load a state that was saved whole"
        )
    _note_ages(generation, _state(generation), births.numel())


def _note_ages(generation: Tensor, state: tuple[int, int], num_births: int) -> None:
    key = id(generation)

    def forget(dead: weakref.ref[Tensor]) -> None:
        known = _checked_ages.get(key)
        if known is not None and known.generation is dead:
            del _checked_ages[key]

    _checked_ages[key] = _Ages(weakref.ref(generation, forget), state, num_births)


def _state(tensor: Tensor) -> tuple[int, int]:
    """Returns version and address, one of which changes with every change."""
    try:
        version: int = tensor._version
    except RuntimeError:  # tensors made in inference mode have no version
        version = -1
    return version, tensor.data_ptr()


def is_traced(tensor: Any) -> bool:
    """Tells whether the tensor has no data: on the meta device, or a fake tensor while something is traced."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta
