"""Collects dense gradients in backward for topology policies: of the best inactive blocks, and of the active ones.

The dense gradient of one weight at a time exists, inside backward. What outlives it is a ``Collected``: the positions
of the inactive blocks whose gradient is largest so far with the sum of their gradients, and, where a policy wants it,
the sum of the active blocks' gradients. A block that is no longer among the largest loses its sum.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.format import (
    Band,
    Layout,
    all_block_means,
    bands_of,
    block_means,
    blocks,
    patterns,
    positions_of,
    unpack_bits,
)
from smet_compile.ops.law import compute_dtype
from smet_compile.ops.library import library
from smet_compile.ops.sinks import define_sink, open_sink, save_inputs
from smet_compile.ops.torch_insides import refuse_branches, run_first_in_backward, save_without_check
from smet_compile.shards import reduce_over_groups

NO_GRADIENT = -1
"""The positions are filled with this number until a gradient has come."""
_IN_A_BRANCH = (
    "expected a read outside of compiled branches and loops, since a policy asks for its dense gradient (as "
    'grow="gradient" does), got one inside {}; choose policies that need none, such as grow="random", compute both '
    "branches and choose by torch.where, or leave the model that calls it uncompiled"
)
_BUFFERS = "Tensor positions, Tensor sums, Tensor active_sums"


class Collected(NamedTuple):
    """Holds what backward collects of the dense gradients of one weight.

    Args:
        positions: (K,) int64, the inactive blocks of largest mean \\|sum of gradients\\|: equally many of each slab and
            of each group of the weight's pattern, best first in each. A group with too few inactive blocks fills up
            with active ones.
        sums: (K,) or (K, bm, bn), the sums of their gradients since each of them was among the K; at least fp32.
        active_sums: (N,) or (N, bm, bn), the sum of the active blocks' gradients; empty where no policy wants it.
    """

    positions: Tensor
    sums: Tensor
    active_sums: Tensor

    @classmethod
    def empty(cls, values: Tensor, layout: Layout, num_kept: int, num_active: int) -> Collected:
        """Makes buffers for the weight of ``values``, without any gradient yet.

        Args:
            num_kept: the number of inactive blocks. num_active: that of the active ones; 0 where no policy wants them.
        """
        dtype, device = compute_dtype(values.dtype), values.device
        sums = torch.zeros(layout.values_shape(num_kept), dtype=dtype, device=device)
        active_sums = torch.zeros(layout.values_shape(num_active) if num_active else (0,), dtype=dtype, device=device)
        return cls(torch.full((num_kept,), NO_GRADIENT, device=device), sums, active_sums)

    def has_gradient(self) -> bool:
        """Tells whether a gradient has come; waits for the device."""
        return bool(self.positions[0] != NO_GRADIENT)

    def forget(self) -> None:
        """Forgets all gradients that have come."""
        self.positions.fill_(NO_GRADIENT)
        self.active_sums.zero_()

    def scale_(self, factor: float) -> None:
        """Multiplies all sums, so that gradients of later steps count for more."""
        self.sums.mul_(factor)
        self.active_sums.mul_(factor)


library.define(
    f"collect_gradient(Tensor grad_dense, {_BUFFERS}, Tensor topology, str layout, int group_size, str reduced_over) "
    "-> (Tensor, Tensor, Tensor)"
)


def _collect_gradient(
    grad_dense: Tensor,
    positions: Tensor,
    sums: Tensor,
    active_sums: Tensor,
    bits: Tensor,
    layout_text: str,
    group_size: int,
    reduced_over: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the new buffers: the gradient is added, and the best blocks are chosen again (RigL, Evci et al. 2020).

    A gradient that is not finite everywhere counts as zero. It is the mean over the ranks of the process groups whose
    names are in ``reduced_over``.
    """
    grad_dense = reduce_over_groups(grad_dense, reduced_over)
    layout = Layout.from_text(layout_text)
    active, finite = unpack_bits(bits, layout.num_blocks), grad_dense.isfinite().all()
    bands = bands_of(layout)
    kept = zip(bands, positions.chunk(len(bands)), sums.chunk(len(bands)), strict=True)
    found = [
        _best_of_band(band, band.cut_dense(grad_dense), known, band.cut(active), finite, group_size)
        for band, *known in kept
    ]
    best, new_sums = found[0] if len(bands) == 1 else map(torch.cat, zip(*found, strict=True))
    if not active_sums.numel():
        return best, new_sums, active_sums.clone()
    packed = blocks.pack(grad_dense, positions_of(active, active_sums.shape[0]), layout)
    return best, new_sums, active_sums + torch.where(finite, packed, 0)


def _best_of_band(
    band: Band,
    grad_dense: Tensor,
    collected: Sequence[Tensor],
    active: Tensor,
    finite: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns positions and sums of the best blocks of one slab, of which all the arguments are."""
    positions, sums = collected
    layout, is_known = band.layout, positions != NO_GRADIENT
    known = band.within(torch.where(is_known, positions, band.place(torch.zeros_like(positions))))
    scores = torch.where(finite, all_block_means(grad_dense, layout), 0)
    totals = torch.where(_like(is_known, sums), sums, 0) + _blocks_at(grad_dense, known, finite, layout)
    row_of = torch.full((layout.num_blocks + 1,), NO_GRADIENT, dtype=torch.int32, device=positions.device)
    rows = torch.arange(positions.numel(), dtype=torch.int32, device=positions.device)
    row_of.index_put_((torch.where(is_known, known, layout.num_blocks),), rows)
    old_row = row_of[: layout.num_blocks]
    scores = torch.where(
        old_row >= 0, block_means(totals, known, layout)[old_row.clamp(min=0)].to(scores.dtype), scores
    )
    best = _best_of_groups(scores.masked_fill_(active, -1).view(-1, group_size), positions.numel())
    row = old_row[best]
    fresh = _blocks_at(grad_dense, best, finite, layout).to(sums.dtype)
    new_sums = torch.where(_like(row >= 0, sums), totals[row.clamp(min=0)], fresh)
    return band.place(best), new_sums


def _best_of_groups(scores_GB: Tensor, count: int) -> Tensor:
    """Returns the positions of the best blocks, equally many of each group and ``count`` altogether."""
    num_groups, size = scores_GB.shape
    best_GK = scores_GB.topk(count // num_groups, dim=1).indices
    return (best_GK + size * torch.arange(num_groups, device=best_GK.device)[:, None]).flatten()


def _blocks_at(grad_dense: Tensor, positions: Tensor, finite: Tensor, layout: Layout) -> Tensor:
    return torch.where(finite, blocks.pack(grad_dense, positions, layout), 0)


def _like(flags: Tensor, rows: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (rows.dim() - 1))


library.impl("collect_gradient", _collect_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::collect_gradient", lib=library)
def _(
    grad_dense: Tensor,
    positions: Tensor,
    sums: Tensor,
    active_sums: Tensor,
    bits: Tensor,
    layout_text: str,
    group_size: int,
    reduced_over: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(positions), torch.empty_like(sums), torch.empty_like(active_sums)


def _zeros_like_dense(leaf: Tensor, positions: Tensor, sums: Tensor, active_sums: Tensor, *rest: Any) -> Tensor:
    _, layout_text, *_ = rest
    return leaf.new_zeros(()).expand(Layout.from_text(layout_text).shape)


def _collect_in_backward(ctx: Any, grad_dense: Tensor) -> tuple[Any, ...]:
    *buffers, bits, layout_text, group_size, reduced_over = ctx.inputs
    _growth_sinks.pop(buffers[0], None)
    with torch.no_grad():
        if buffers[0] in _followed and buffers[0] not in _before:
            _before[buffers[0]] = [buffer.clone() for buffer in buffers]
        found = torch.ops.smet.collect_gradient(grad_dense, *buffers, bits, layout_text, group_size, reduced_over)
        for buffer, new in zip(buffers, found, strict=True):
            buffer.copy_(new)
    return (None,) * 8


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves the inputs. The backward of another graph may change the buffers before, where both read the weight."""
    save_inputs(ctx, inputs, output)
    _, *buffers = inputs[: 1 + len(Collected._fields)]
    save_without_check(buffers)


def _open_growth_sink(leaf: Tensor, positions: Tensor, *rest: Any) -> Tensor:
    """Returns the sink that fills the buffers. All reads of a weight share it until its backward has run.

    Its leaf under tensor parallelism is the local tensor of the read that opened it. Reads of a later graph share it
    where that graph has no backward, as a validation loss that is kept. The parameter then waits for the leaf's node,
    which has to run as soon as it can: otherwise FSDP2 has taken the gradients of the module by then.
    """
    known = _growth_sinks.get(positions)
    sink = None if known is None else known()
    if sink is None or not sink.requires_grad:
        sink = open_sink("growth_sink", leaf, positions, *rest)
        run_first_in_backward(leaf)
        _growth_sinks[positions] = weakref.ref(sink)
    return sink


_growth_sinks = WeakIdKeyDictionary()

# By the positions of a ``Collected``: the parameter whose gradient it goes with, and the buffers before the backward
# passes that no step has used yet. A compiled backward is none that is seen here.
_followed = WeakIdKeyDictionary()
_before = WeakIdKeyDictionary()


def follow_gradient(collected: Collected, values: Tensor) -> None:
    """Has a gradient of ``values`` that is given up (``zero_grad`` without a step) be given up in ``collected`` too.

    The next eager read of the weight finds that ``values`` has no gradient any more.
    """
    _followed[collected.positions] = weakref.ref(values)


def keep_for_good(collected: Collected) -> None:
    """Keeps what was collected by now, whatever becomes of the gradient; called after the optimizer's step."""
    _before.pop(collected.positions, None)


def used_by_steps(collected: Collected) -> Collected:
    """Returns what backward passes collected whose gradients a step has used."""
    return Collected(*_before.get(collected.positions, collected))


def give_up_rest(collected: Collected) -> None:
    """Takes back what backward passes collected whose gradients no step has used."""
    with torch.no_grad():
        for buffer, used in zip(collected, used_by_steps(collected), strict=True):
            if buffer is not used:
                buffer.copy_(used)
    keep_for_good(collected)


def _give_up_without_gradient(collected: Collected) -> None:
    if collected.positions in _before:
        values = _followed[collected.positions]()
        if values is not None and values.grad is None:
            give_up_rest(collected)


def sink_of(compact: Any, leaf: Tensor, tracing: bool) -> Tensor | None:
    """Returns the sink for the dense gradient of a weight; None where nobody asks for it, or there is no gradient.

    A compiled branch or loop must not change what lies outside, as a sink does in backward. A read there is refused
    before the first step, not by the compiler in the first one whose gradient is collected.
    """
    collected = compact.collected
    if not leaf.requires_grad or not (compact.is_collected or collected is not None):
        return None
    if tracing and torch.is_grad_enabled():
        refuse_branches(compact.name, _IN_A_BRANCH)
    if collected is None:
        return None
    if not tracing:
        _give_up_without_gradient(collected)
    group_size = patterns.group_size(compact.pattern, bands_of(compact.layout)[0].layout)
    sink: Tensor = torch.ops.smet.growth_sink(
        leaf, *collected, compact.topology, compact.layout.text, group_size, compact.reduced_over
    )
    return sink


define_sink(
    "growth_sink",
    f"{_BUFFERS}, Tensor topology, str layout, int group_size, str reduced_over",
    _open_growth_sink,
    _zeros_like_dense,
    _collect_in_backward,
    _save_inputs,
)
