"""Makes the state of one parameter under any rule, keeps the ages of its blocks, and checks a state that is loaded.

An age takes one byte per block. ``generation`` holds a number for each block, and the table ``births`` the step at
which each generation was born. Blocks are born only at topology updates, so few generations are alive at a time. When
the table is full, generations without blocks are removed. If there are none, those so old that neither bias corrections
nor warm-up depend on their age are merged. If even that frees no entry, the table grows, so that an age is never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import TopologyChange, positions_of
from smet_compile.ops import Site, captures
from smet_compile.ops.law import num_scales
from smet_compile.ops.law_of_updates import decode_slot
from smet_compile.ops.rules import Slot, known_slots
from smet_compile.optim.options import MOST_STEPS
from smet_compile.shards import Rows, local

_FREE = -1
_SIZES = tuple(2**bits for bits in range(8, 32))
_DTYPES = ((256, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))


def first_generation(num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns generation (N,) uint8 and births (256,) int64 for blocks that are all born at step 0."""
    births = torch.full((256,), _FREE, dtype=torch.int64, device=device)
    births[0] = 0
    return torch.zeros(num_blocks, dtype=torch.uint8, device=device), births


def check_generations(name: str, generation: Tensor, births: Tensor, num_blocks: int, step: int) -> None:
    """Raises ValueError for a table that no training makes, or for a block whose generation is not in the table."""
    size = births.numel()
    if births.dtype != torch.int64 or births.dim() != 1 or size not in _SIZES:
        raise ValueError(f"{name}: expected births of int64, 256 or a larger power of two, got {births.dtype} {size}")
    if bool(((births < _FREE) | (births > step)).any()):
        raise ValueError(f"{name}: expected births of {_FREE} or from 0 to step {step}, got others")
    if generation.dtype != _dtype_for(size) or generation.shape != (num_blocks,):
        raise ValueError(
            f"{name}: expected a generation of {_dtype_for(size)} for each of {num_blocks} blocks, got "
            f"{generation.dtype} of shape {tuple(generation.shape)}"
        )
    here: Tensor = local(generation)
    if here.numel() > 0 and not 0 <= int(here.min()) <= int(here.max()) < size:
        raise ValueError(f"{name}: expected generations from 0 to {size - 1}, got others")
    is_used = torch.zeros_like(births, dtype=torch.bool).index_fill_(0, here.long(), True)
    if bool((births[is_used] == _FREE).any()):
        raise ValueError(f"{name}: expected generations that have a birth, got one that is free")


def find_ages(generation: Tensor, births: Tensor, step: Tensor) -> Tensor:
    """Returns the age (N,) int64 of each block: the steps since it was born."""
    return step - births.index_select(0, generation.int())


def add_generation(state: dict[str, Tensor], change: TopologyChange, mature_age: int) -> bool:
    """Makes a new generation of the blocks that a topology change grew, born at the step of ``state``.

    All ranks have one table ``births``. ``mature_age`` is the age from which a block's age no longer matters
    (``Rule.mature_age``, and both warm-ups).

    Returns whether the table had to grow, so that the state has new tensors.
    """
    generation, births, step = local(state["generation"]), state["births"], state["step"]
    if not (births == _FREE).any():
        _forget_empty(generation, births, change.rows)
    if not (births == _FREE).any():
        _merge_mature(generation, births, int(step) - mature_age)
    grows = not (births == _FREE).any()
    if grows:
        generation, births = _grow(generation, births)
        state["generation"], state["births"] = change.rows.wrap(change.values, generation), births
    slot = int((births == _FREE).nonzero()[0])
    births[slot] = step
    generation[~change.survived_here] = slot
    return grows


def _forget_empty(generation: Tensor, births: Tensor, rows: Rows) -> None:
    population = rows.sum_(torch.bincount(generation.int(), minlength=births.numel()))
    births[population == 0] = _FREE


def _merge_mature(generation: Tensor, births: Tensor, latest_birth: int) -> None:
    """Merges all generations born at or before ``latest_birth`` into the youngest of them."""
    slots = ((births != _FREE) & (births <= latest_birth)).nonzero().squeeze(1)
    if slots.numel() < 2:
        return
    youngest = slots[births[slots].argmax()]
    renumbered = torch.arange(births.numel(), device=births.device)
    renumbered[slots] = youngest
    generation.copy_(renumbered.index_select(0, generation.int()))
    births[slots[slots != youngest]] = _FREE


def _grow(generation: Tensor, births: Tensor) -> tuple[Tensor, Tensor]:
    size = births.numel() * 2
    grown = torch.full((size,), _FREE, dtype=torch.int64, device=births.device)
    grown[: births.numel()] = births
    return generation.to(_dtype_for(size)), grown


def _dtype_for(size: int) -> torch.dtype:
    """Returns the smallest dtype for the number of a generation in a table of ``size``."""
    return next(dtype for limit, dtype in _DTYPES if size <= limit)


_COUNTS = ("step", "num_skipped")
_GENERIC = frozenset({*_COUNTS, "scales", "generation", "births"})


def moment_dtype(parameter: Tensor, wanted: torch.dtype | str | None) -> torch.dtype:
    """Returns the dtype of the slots: ``wanted``, uint8 (codes) for "int8", fp32 for None; fp64 for fp64 weights."""
    if parameter.dtype == torch.float64:
        return torch.float64
    return wanted if isinstance(wanted, torch.dtype) else torch.uint8 if wanted == "int8" else torch.float32


@dataclass(frozen=True)
class StateKind:
    """Describes which state a parameter has.

    Args:
        slots: the slots of its rule. dtype: their dtype. site: None unless the parameter is compact.
        has_ages: whether its blocks have ages.
    """

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    site: Site | None
    has_ages: bool

    @property
    def has_scales(self) -> bool:
        return self.dtype == torch.uint8 and bool(self.slots)

    def scales_shape(self, parameter: Tensor) -> tuple[int, int]:
        """Returns the shape of the scales: one per slot for each group of dense positions."""
        return len(self.slots), num_scales(parameter.numel(), self.site.whole if self.site else None)


def new_state(parameter: nn.Parameter, kind: StateKind) -> dict[str, Tensor]:
    """Makes the state before the first step: slots and counts of zero, and all blocks in the first generation.

    Raises RuntimeError while a CUDA graph is captured, whose replays would make it zero again.
    """
    device = parameter.device
    captures.refuse_in_capture(device, "the optimizer's state")
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    for slot in kind.slots:
        state[slot.name] = torch.zeros_like(parameter, dtype=kind.dtype, memory_format=torch.preserve_format)
    state["num_skipped"] = torch.zeros((), dtype=torch.int64, device=device)
    if kind.has_scales:
        state["scales"] = torch.zeros(kind.scales_shape(parameter), device=device)
    if kind.site is not None and kind.has_ages:
        rows = kind.site.rows
        generation, state["births"] = first_generation(rows.num_here, device)
        state["generation"] = rows.wrap(parameter, generation)
    return state


def ready_state(name: str, parameter: nn.Parameter, kind: StateKind, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state of a parameter, which is made where there is none yet.

    Raises ValueError where it was made for a parameter of another dtype.
    """
    if not state:
        return new_state(parameter, kind)
    for slot in kind.slots:
        if state[slot.name].dtype != kind.dtype:
            raise ValueError(
                f"{name}: expected {slot.name} of {kind.dtype} for a parameter of {parameter.dtype}, got "
                f"{state[slot.name].dtype}: the model was converted after the optimizer's first step; convert it back, "
                "or make the optimizer anew"
            )
    return state


def read_slot(state: dict[str, Tensor], slots: tuple[Slot, ...], name: str, site: Site | None) -> Tensor | None:
    """Returns the slot called ``name``, decoded to fp32 if the state holds codes; None where it is not there.

    It is sharded as the values are.
    """
    number = next((i for i, slot in enumerate(slots) if slot.name == name), None)
    if number is None or name not in state:
        return None
    if "scales" not in state or site is None:
        return state[name]
    rows = site.rows
    topology = site.topology_of(rows.here)
    decoded = decode_slot(local(state[name]), state["scales"][number], slots[number].signed, topology)
    return rows.wrap(site.values, decoded)


def share_scales(scales: Tensor, change: TopologyChange) -> None:
    """Gives every rank the scales of all tiles: until now each knows those of its own tiles alone."""
    sum_scales_(scales, change.old_places_here, change.rows)


def sum_scales_(scales: Tensor, places: Tensor, rows: Rows) -> Tensor:
    """Replaces the scales (number of slots, number of tiles) of active tiles by those of the ranks that hold them.

    Args:
        places: where the tiles of this rank's rows lie in the whole weight, of which this rank alone knows the scales.
    """
    if not rows.groups:
        return scales
    is_here = scales.new_zeros(1, scales.shape[1])
    is_here[:, places] = 1
    *of_slots, is_active = rows.sum_(torch.cat((torch.where(is_here > 0, scales, 0), is_here)))
    return scales.copy_(torch.where(is_active > 0, torch.stack(of_slots), scales))


def of_all_ranks(parameters: Sequence[tuple[dict[str, Tensor], Rows, Site | None]]) -> list[dict[str, Tensor]]:
    """Returns the counts and scales of sharded parameters that all ranks have together; every rank has to ask.

    Counts are added up for all parameters at once, as far as the same ranks hold their parts.
    """
    found: list[dict[str, Tensor]] = [{} for _ in parameters]
    together: dict[Any, list[int]] = {}
    for number, (state, rows, _) in enumerate(parameters):
        groups = tuple(group.group_name for group in rows.groups)
        together.setdefault((groups, state["num_skipped"].device), []).append(number)
    for numbers in together.values():
        counts = torch.stack([parameters[number][0]["num_skipped"] for number in numbers])
        for number, count in zip(numbers, parameters[numbers[0]][1].sum_(counts), strict=True):
            found[number]["num_skipped"] = count.clone()
    for (state, rows, site), each in zip(parameters, found, strict=True):
        if "scales" in state and site is not None:
            places = positions_of(site.topology_of(rows.here).mask())
            each["scales"] = sum_scales_(state["scales"].clone(), places, rows)
    return found


def is_kept_by_wrapper(key: str, rows: Any, change: TopologyChange) -> bool:
    """Tells whether a tensor in the state, not one of the rule's, has a row for each block and is not the values."""
    is_other = key not in _GENERIC and change.has_old_rows(rows)
    return is_other and local(rows).data_ptr() != local(change.values).data_ptr()


def check_state(name: str, parameter: nn.Parameter, kind: StateKind, state: Any) -> None:
    """Raises ValueError where ``state`` cannot be the state of this optimizer for the parameter."""
    shape = tuple(parameter.shape)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {slot.name: (kind.dtype, shape) for slot in kind.slots}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{name}: expected a state of tensors, got others; load the state of the same optimizer")
    _check_kinds(name, wanted, state)
    if kind.has_scales:
        wanted["scales"] = (torch.float32, kind.scales_shape(parameter))
    wanted |= {count: (torch.int64, ()) for count in _COUNTS}
    has_ages = kind.site is not None and kind.has_ages
    keys = wanted.keys() | ({"generation", "births"} if has_ages else set())
    others = set(state) - keys  # those of a wrapper round the optimizer, such as slow weights
    is_wrong = others & (known_slots() | _GENERIC) or any(state[key].shape not in (shape, ()) for key in others)
    if is_wrong or not keys <= set(state):
        raise ValueError(
            f"{name}: expected a state of {', '.join(sorted(keys))}, got {', '.join(map(str, state)) or 'none'}; load "
            "the state of the same optimizer and a model made sparse in the same way"
        )
    _check_kinds(name, wanted, state)
    _check_values(name, state, [slot.name for slot in kind.slots if not slot.signed])
    if has_ages and kind.site is not None:
        check_generations(name, state["generation"], state["births"], parameter.shape[0], int(state["step"]))


def _check_kinds(name: str, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]], state: dict[str, Tensor]) -> None:
    for key, (dtype, shape) in wanted.items():
        if key in state and (state[key].dtype != dtype or state[key].shape != shape):
            raise ValueError(
                f"{name}: expected {key} of {dtype} and shape {shape}, got {state[key].dtype} and "
                f"{tuple(state[key].shape)}; load the state of the same optimizer, with the same moment_dtype, and a "
                "model made sparse in the same way"
            )


def _check_values(name: str, state: dict[str, Tensor], unsigned: list[str]) -> None:
    """Checks counts, signs and scales. Slots may be infinite or nan, as after an overflow."""
    for key in _COUNTS:
        if not 0 <= int(state[key]) <= MOST_STEPS:
            raise ValueError(f"{name}: expected {key} from 0 to {MOST_STEPS}, got {int(state[key])}")
    for key in (*unsigned, "scales"):
        here = local(state.get(key))
        if here is not None and bool((here < 0).any()):
            raise ValueError(f"{name}: expected {key} of at least 0, got {float(here.min())}")
    if "scales" in state and not bool(state["scales"].isfinite().all()):
        raise ValueError(f"{name}: expected finite scales, got others")
