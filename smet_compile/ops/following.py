"""Has what is kept for each block of a weight follow a topology that is loaded in the middle of a run.

As at a topology update, state stays with its weight, and a weight that was not active gets a new state. State that was
itself loaded since the last step belongs to the topology that is loaded after it, and stays as it is. So weights may be
loaded alone, and model and optimizer in either order. Where state cannot follow, the next step raises.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from smet_compile.format import Part, TopologyChange, unpack_bits
from smet_compile.format.user_warning import warn_user


class Before(NamedTuple):
    """Holds what is known of a weight before a topology is loaded into it.

    Args:
        bits: those of its topology; None where they are not known.
        num_rows: how many rows its values have.
        movers: what moves its state, by the ``id`` of each manager (``Keeper.find_mover``). It is found before the
            weight is resized, since the shapes of state are checked against those of the values. None where the number
            of blocks stays; a manager whose state cannot follow is left out.
    """

    bits: Tensor | None
    num_rows: int
    movers: dict[int, Mover] | None = None


@dataclass
class Load:
    """Describes a topology that was loaded into a weight.

    Args:
        name: that of the weight. values: its values, as they are now. num_blocks: of its layout here.
        known: what is known of the weight until then.
        after: the bits of the topology that was loaded.
        part: where the weight lies in one that tensor parallelism has cut.
    """

    name: str
    values: nn.Parameter
    num_blocks: int
    known: Before
    after: Tensor
    part: Part | None
    before: Tensor | None = field(init=False)
    """The bits of the topology until then; None where they are not known, or not on every rank."""
    changes: bool = field(init=False)
    """Whether the topology is another than before, on any rank."""

    def __post_init__(self) -> None:
        self.before = self.known.bits
        changes = self.before is None or not torch.equal(self.before, self.after)
        self.changes = changes
        if self.part is not None:
            of_parts = self.part.gather(torch.tensor([changes], dtype=torch.uint8, device=self.after.device))
            self.changes = bool(of_parts.any())
            if not of_parts.all():  # state follows on all ranks together or on none
                self.before = None

    @property
    def resizes(self) -> bool:
        """Tells whether the weight has another number of active blocks than before."""
        return self.known.num_rows != self.values.shape[0]

    def change(self) -> TopologyChange | None:
        """Returns what changed; None where the topology before is not known."""
        if self.before is None:
            return None
        before, after = (unpack_bits(bits, self.num_blocks) for bits in (self.before, self.after))
        return TopologyChange.between(self.values, before, after, self.part)


Mover = Callable[[TopologyChange], None]
"""Moves the state of one weight, which it was found for, as a topology change says."""


class Keeper(Protocol):
    """Records what happens to topologies, and knows how the state of its optimizers follows them: a manager."""

    def record_load(self, load: Load) -> None:
        """Notes a topology that was loaded into one of its weights."""

    def holders_of(self, values: nn.Parameter) -> list[Any]:
        """Returns its optimizers that hold ``values``, wrappers among them."""

    def find_mover(self, values: nn.Parameter) -> Mover:
        """Returns what moves the state that its optimizers keep for ``values``; ValueError where it cannot follow."""


_keepers: weakref.WeakValueDictionary[int, Keeper] = weakref.WeakValueDictionary()
_num_keepers = itertools.count()
_watched: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
"""The optimizers whose loads are noted, in the order in which they were first seen."""
_loaded: set[int] = set()
"""Ids of the parameters whose state was loaded since their last step, and whose topology was not since."""
_lost: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()
"""The names of parameters, by id, whose state belongs to another topology than the weight's, by optimizer."""
_recent: set[int] = set()
"""Ids of the values whose topology was loaded since the last step of any optimizer."""
_waiting: ContextVar[list[tuple[Any, ...]] | None] = ContextVar("waiting", default=None)


def keep(keeper: Keeper) -> None:
    """Has ``keeper`` follow what is loaded, for as long as somebody keeps it."""
    _keepers[next(_num_keepers)] = keeper


def watch(*optimizers: Any) -> None:
    """Notes from now on when a state is loaded into each ``torch.optim.Optimizer``.

    Some wrappers derive from it without its hooks; the optimizers in them have these.
    """
    for optimizer in optimizers:
        if optimizer not in _watched and "_optimizer_load_state_dict_post_hooks" in getattr(optimizer, "__dict__", {}):
            optimizer.register_load_state_dict_post_hook(_note_loaded)
            _watched[optimizer] = None


def _note_loaded(optimizer: Any) -> None:
    """Notes that state was loaded into an optimizer, and so into those that it wraps."""
    held = _held_by(optimizer)
    _loaded.update(held)
    for lost in _lost.values():
        for parameter in held & lost.keys():
            del lost[parameter]


def begin_step(optimizer: Any) -> None:
    """Notes a step of ``optimizer``. Raises ValueError where its state belongs to other weights."""
    watch(optimizer)
    check_state(optimizer)
    if _loaded:
        _loaded.difference_update(_held_by(optimizer))
    _recent.clear()


def check_state(optimizer: Any) -> None:
    """Raises ValueError where a topology was loaded that the state of ``optimizer`` could not follow."""
    if lost := _lost.get(optimizer):
        raise ValueError(
            f"{next(iter(lost.values()))}: expected state of {type(optimizer).__name__} for the blocks that are "
            "active, got that of others, since another topology was loaded; load the optimizer's state too, or make "
            "the optimizer anew. With a TopologyManager, made before, the state of any elementwise optimizer follows"
        )


@contextmanager
def deferred() -> Iterator[None]:
    """Has state follow what the block loads at the end of it; not at all if the block raises."""
    waiting: list[tuple[Any, ...]] = []
    token = _waiting.set(waiting)
    loaded, lost = set(_loaded), [(optimizer, dict(names)) for optimizer, names in _lost.items()]
    try:
        yield
    except BaseException:
        _loaded.clear()
        _loaded.update(loaded)
        _lost.update(lost)
        raise
    finally:
        _waiting.reset(token)
    outer = _waiting.get()
    if outer is not None:
        outer.extend(waiting)
        return
    for name, values, *bits in waiting:
        _follow(name, values, bits, may_warn=False)


def forget(values: nn.Parameter) -> None:
    """Makes optimizers forget the state of a weight without data, unless it was loaded since their last step."""
    if id(values) not in _loaded:
        for optimizer in _watched:
            optimizer.state.pop(values, None)


def note_resize(values: nn.Parameter, bits: Tensor) -> Before:
    """Notes what is known of a weight that is about to be resized, with the topology ``bits`` until now."""
    movers: dict[int, Mover] = {}
    for keeper in list(_keepers.values()):
        if keeper.holders_of(values):
            with suppress(ValueError):
                movers[id(keeper)] = keeper.find_mover(values)
    return Before(bits, values.shape[0], movers)


def follow(name: str, values: nn.Parameter, *bits: Any) -> None:
    """Moves whatever is kept for the blocks of a weight into which a topology was loaded.

    Args:
        name, values: see ``Load``. bits: its further arguments.
    """
    waiting = _waiting.get()
    if waiting is None:
        _follow(name, values, bits, may_warn=True)
    else:
        waiting.append((name, values, *bits))


@torch.no_grad()
def _follow(name: str, values: nn.Parameter, bits: Sequence[Any], may_warn: bool) -> None:
    num_rows = bits[1].num_rows
    stays = _stays(values, num_rows)
    is_second = id(values) in _recent
    _loaded.discard(id(values))
    _recent.add(id(values))
    keepers = [keeper for _, keeper in sorted(_keepers.items(), reverse=True) if keeper.holders_of(values)]
    has_rows = any(_has_rows(optimizer, values, num_rows) for optimizer in _watched)
    if not keepers and not has_rows and values.grad is None:
        return  # under tensor parallelism, ranks need not load at the same time
    load = Load(name, values, *bits)
    for keeper in keepers:
        keeper.record_load(load)
    if not load.changes:
        return
    if stays and is_second and has_rows and may_warn:
        warn_user(
            f"{name}: two topologies were loaded, and the optimizer's state in between; it is taken for that of the "
            "second one. If it is that of the first, load these two by load_checkpoint, and then the weights"
        )
    change = load.change()
    _follow_gradient(values, change)
    if not stays:
        _follow_state(load, change, keepers)


def _stays(values: nn.Parameter, num_rows: int) -> bool:
    """Tells whether the state of a weight was loaded for the topology that is there now.

    Of a weight that had another number of rows, ``num_rows``, the number of rows of its state says for which it was.
    """
    is_of_before = num_rows != values.shape[0] and any(_has_rows(each, values, num_rows) for each in _watched)
    return id(values) in _loaded and not is_of_before


def _follow_gradient(values: nn.Parameter, change: TopologyChange | None) -> None:
    if values.grad is not None and change is not None:
        change.remap_(values.grad)
    else:
        values.grad = None


def _follow_state(load: Load, change: TopologyChange | None, keepers: list[Keeper]) -> None:
    """Moves the state of the optimizers that hold a weight; notes those whose state cannot follow."""
    done: set[int] = set()
    for keeper in keepers:
        theirs = {id(optimizer) for optimizer in keeper.holders_of(load.values)}
        if theirs & done or _moves_state(keeper, load, change):
            done |= theirs
    for optimizer in list(_watched):
        if id(optimizer) in done or id(load.values) not in _held_by(optimizer):
            continue
        if change is not None and hasattr(optimizer, "on_topology_change"):
            optimizer.on_topology_change(change)
        elif _has_rows(optimizer, load.values, load.known.num_rows):
            _lost.setdefault(optimizer, {})[id(load.values)] = load.name


def _moves_state(keeper: Keeper, load: Load, change: TopologyChange | None) -> bool:
    """Has a manager move the state of its optimizers; returns whether it could."""
    movers = load.known.movers
    if change is None or (movers is not None and id(keeper) not in movers):
        return False
    try:
        move = keeper.find_mover(load.values) if movers is None else movers[id(keeper)]
        move(change)
    except ValueError:
        return False
    return True


def _held_by(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _has_rows(optimizer: Any, values: nn.Parameter, num_rows: int) -> bool:
    """Tells whether the optimizer keeps something for each row of the values, of which there were ``num_rows``."""
    state = optimizer.state.get(values, {})
    return any(isinstance(each, Tensor) and each.dim() and each.shape[0] == num_rows for each in state.values())
