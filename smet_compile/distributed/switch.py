"""Changes how a live run lies on its ranks, between two steps, in memory and bit for bit."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from smet_compile.distributed import streams
from smet_compile.distributed.arrival import finish, put_back
from smet_compile.distributed.checksum import differing
from smet_compile.distributed.layout import TensorNote
from smet_compile.distributed.run import Prepared, Run
from smet_compile.distributed.space import Item, SwitchPlan, plan_switch
from smet_compile.distributed.taken import Note, Taken
from smet_compile.distributed.transfer import WAYS, Meter, Transfer, Way
from smet_compile.format.arguments import flag, one_of, whole_number


@dataclass(frozen=True)
class SwitchOptions:
    """Says how a run moves.

    Args:
        keep_source: keeps the old state until every rank has verified the new one; the run is as it was where that
            fails. Otherwise each tensor is freed as soon as it has gone, and moved back where the new run cannot be
            made.
        chunk_bytes: the most that is sent at a time.
        way: how ranks send it (``smet_compile.distributed.transfer``).
    """

    keep_source: bool = False
    chunk_bytes: int = 1 << 26
    way: Way = "pairs"

    def __post_init__(self) -> None:
        flag("keep_source", self.keep_source)
        whole_number("chunk_bytes", self.chunk_bytes, at_least=1)
        one_of("way", self.way, WAYS)


_DEFAULT = SwitchOptions()


@dataclass(frozen=True)
class Switched:
    """Holds the outcome of a switch.

    Args:
        run: the run in its new layout; None on a rank that takes no part in it.
        plan: what was to be sent.
        meter: what was counted.
        seconds: seconds of this rank, by phase: "agree", "plan", "transfer", "verify" (with ``keep_source``), "finish".
    """

    run: Run | None
    plan: SwitchPlan
    meter: Meter
    seconds: dict[str, float] = field(default_factory=dict)


def switch(run: Run | None, prepared: Prepared, options: SwitchOptions = _DEFAULT) -> Switched:
    """Moves a run to the ranks and the layout of a prepared model. Every rank of the default process group calls it.

    Args:
        run: what this rank has of the run; None where it takes no part yet. It is used up.
        prepared: the new layout, by ``Blueprint.prepare(mesh)``; it is used up, too.

    Raises:
        ValueError: the run cannot move: the new model has other parameters, its groups or its manager are others,
            or ``optimize`` fails. It is raised on every rank, and the run is as it was.
        RuntimeError: with ``keep_source``, a tensor did not arrive as it was; the run is as it was.
    """
    return move(Taken.of(run), prepared, options)


@torch.no_grad()
def move(taken: Taken, prepared: Prepared, options: SwitchOptions) -> Switched:
    """Does what ``switch`` does with the state of a run that was taken out of it."""
    clock = _Clock()
    note, target, states = _agree_on(taken, prepared)
    _check_alike(note.tensors, target)
    note.modes.check(target)
    clock.ends("agree")
    items = note.items(target)
    _check_plans(items)
    plan = plan_switch(items, options.chunk_bytes)
    clock.ends("plan")
    arrived: dict[str, Tensor] = {}
    device = torch.device(prepared.mesh.device_type)
    release = None if options.keep_source else taken.release
    transfer = Transfer(items, device, taken.stored.get, arrived.__setitem__, release, options.way)
    transfer.run(options.chunk_bytes)
    clock.ends("transfer")
    if options.keep_source:
        wrong = differing(items, taken.stored.get, arrived.get, device)
        if wrong:
            raise RuntimeError(
                f"{wrong[0]}: expected what the old layout has, got something else after the transfer ({len(wrong)} "
                "tensors are wrong); the run is as it was"
            )
        clock.ends("verify")
    moved = dict(arrived)
    try:
        run = finish(prepared, note, arrived, states, taken)
    except ValueError:
        if not options.keep_source:
            put_back(items, moved, taken, device, options.chunk_bytes, options.way)
        if taken.stream is not None:
            taken.stream.resume()
        raise
    clock.ends("finish")
    return Switched(run, plan, transfer.meter, clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ends(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


def _agree_on(taken: Taken, prepared: Prepared) -> tuple[Note, dict[str, TensorNote], Mapping[int, streams.Stream]]:
    """Returns the first holder's note, the new layout and the streams by share of the data, on every rank."""
    found: list[Any] = [None] * distributed.get_world_size()
    has = taken.note is not None, prepared.tensors is not None
    distributed.all_gather_object(found, (*has, taken.share, taken.stream, taken.refusal))
    refusal = next((each[-1] for each in found if each[-1]), "")
    if refusal:
        raise ValueError(f"{refusal}; the run is as it was")
    states: dict[int, streams.Stream] = {}
    for _, _, share, stream, _ in found:
        if share is not None:
            states.setdefault(share, stream)
    holders, targets = ([rank for rank, each in enumerate(found) if each[side]] for side in (0, 1))
    if not holders or not targets:
        raise ValueError("switch: expected a run on some rank, got None on all; pass what this rank has of it")
    return _from(taken.note, holders[0]), _from(prepared.tensors, targets[0]), states


def _from(own: Any, rank: int) -> Any:
    """Returns on every rank what one of them has."""
    box = [own if distributed.get_rank() == rank else None]
    distributed.broadcast_object_list(box, src=rank)
    return box[0]


def _check_alike(old: dict[str, TensorNote], new: dict[str, TensorNote]) -> None:
    for name in old.keys() ^ new.keys():
        where = "the run" if name in old else "the new model"
        raise ValueError(f"{name}: expected the same tensors in both, got one that only {where} has; build it alike")
    for name, note in old.items():
        other = new[name]
        if (note.shape, note.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name}: expected {note.dtype} of shape {note.shape} as in the run, got {other.dtype} of "
                f"{other.shape}; build the model with the same sizes, density, slabs and dtype"
            )
        if (note.parts and note.parts.whole) != (other.parts and other.parts.whole):
            raise ValueError(
                f"{name}: expected the layout {note.parts and note.parts.whole} as in the run, got "
                f"{other.parts and other.parts.whole}; sparsify with the same block_shape and slabs"
            )


def _check_plans(items: list[Item]) -> None:
    """Raises on every rank where ranks would follow different plans."""
    text = repr([(item.name, item.shape, item.dtype, *_regions(item)) for item in items])
    own = zlib.crc32(text.encode())
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    ends = torch.tensor([own, -own], device=device)
    distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise RuntimeError("switch: expected the same plan on every rank, got different ones; the run is as it was")


def _regions(item: Item) -> list[Any]:
    return [sorted(placed.regions.items()) for placed in (item.source, item.target)]
