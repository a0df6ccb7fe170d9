"""Defines the law of updates: the reference of an optimizer step by any rule, in plain torch. Kernels must equal it.

A step reads rows of a parameter and its state as fp32 or fp64, moves them by the rule, rounds them to their storage,
and writes them where the gradient is finite. ``update_all`` here takes all rows of a parameter at once. ``ops.plain``
takes a few rows at a time with the same ``Begun`` and ``Location``, so that temporary tensors stay small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import WEIGHTS_OF_A_GROUP, Layout, Topology, positions_of
from smet_compile.ops import law
from smet_compile.ops.law import SIGNED_CODES, UNSIGNED_CODES, CodeFormat, Groups, decode, encode
from smet_compile.ops.rules import Block
from smet_compile.ops.updates import Update


class Noise(NamedTuple):
    """Holds the keys of blocks, and the places of entries within them, in shapes that broadcast to the rows."""

    keys: Tensor
    places: Tensor

    def bits(self, stream: int) -> Tensor:
        return law.noise_bits(self.keys, self.places, stream)


class Location(NamedTuple):
    """Says where some rows of a parameter lie in the dense weight. The rows are whole groups of codes.

    Args:
        blocks: positions (n,) of their blocks; for a plain parameter those of its entries in the whole parameter, in
            the shape of the rows.
        layout: the layout of a compact weight; None for a plain parameter.
        group_range: the groups of codes that the rows belong to, where the host knows them; None to ask the device.
        first_place: the position of a plain parameter's first entry, from which on groups are counted.
    """

    blocks: Tensor
    layout: Layout | None
    group_range: range | None = None
    first_place: int = 0

    def noise(self, key: Tensor) -> Noise:
        """Returns the keys and places of the entries' noise, given the key of the step."""
        if self.layout is None or self.layout.single_weights:
            return Noise(law.block_keys(key, self.blocks // law.SPAN), self.blocks % law.SPAN)
        bm, bn = self.layout.block_shape
        places = torch.arange(bm * bn, device=self.blocks.device).view(bm, bn)
        return Noise(law.block_keys(key, self.blocks).view(-1, 1, 1), places)

    @property
    def groups(self) -> Groups:
        if self.layout is None:
            return self._consecutive((self.blocks - self.first_place) // WEIGHTS_OF_A_GROUP)
        if self.layout.tiles:
            return Groups(self.blocks, torch.arange(len(self.blocks), device=self.blocks.device).view(-1, 1, 1))
        group = self.blocks // self.layout.blocks_per_group
        return self._consecutive(group if self.layout.single_weights else group.view(-1, 1, 1))

    def _consecutive(self, group: Tensor) -> Groups:
        """Returns the groups of blocks, given each block's group number in ascending order."""
        known = self.group_range
        if known is None:
            known = range(int(group.view(-1)[0]), int(group.view(-1)[-1]) + 1)
        return Groups(torch.arange(known.start, known.stop, device=group.device), group - known.start)

    def units(self, layout: Layout, are_columns: bool) -> Tensor:
        """Returns the index of the output unit that each entry belongs to; broadcasts over the entries.

        Units are the rows, or the columns, of all matrices one after another.
        """
        if self.layout is None or self.layout.single_weights:
            row, col = self.blocks // layout.cols, self.blocks % layout.cols
            return row // layout.rows * layout.cols + col if are_columns else row
        (bm, bn), device = layout.block_shape, self.blocks.device
        line, across = self.blocks // layout.block_cols, self.blocks % layout.block_cols
        matrix = line // layout.block_rows
        if are_columns:
            inside = (across[:, None] * bn + torch.arange(bn, device=device)).clamp(max=layout.cols - 1)
            return (matrix[:, None] * layout.cols + inside)[:, None, :]
        # A row beyond the edge holds zeros, which add nothing to the unit that they are counted for.
        first = line % layout.block_rows * bm
        inside = (first[:, None] + torch.arange(bm, device=device)).clamp(max=layout.rows - 1)
        return (matrix[:, None] * layout.rows + inside)[:, :, None]


class _Numbers(NamedTuple):
    """Reads and writes rows of a tensor in fp64, fp32, fp16 or bf16."""

    tensor: Tensor

    @property
    def takes_noise(self) -> bool:
        return self.tensor.dtype == torch.bfloat16

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def write(self, before: Tensor, after: Tensor, finite: Tensor, noise: Tensor | None) -> None:
        if noise is not None:
            after, before = law.round_stochastic(after, noise), self.tensor
        self.tensor.copy_(torch.where(finite, after, before))


class _Codes(NamedTuple):
    """Reads and writes rows of 8-bit codes, which are whole groups. ``scales`` are all scales of the slot."""

    codes: Tensor
    scales: Tensor
    groups: Groups
    kind: CodeFormat

    @property
    def takes_noise(self) -> bool:
        return True

    def read(self, dtype: torch.dtype) -> Tensor:
        return decode(self.codes, self.groups.spread(self.scales[self.groups.numbers]), self.kind).to(dtype)

    def write(self, before: Tensor, after: Tensor, finite: Tensor, noise: Tensor | None) -> None:
        """Encodes every group with an updated block under a new scale; leaves all other groups as they are."""
        moment = torch.where(finite, after, before)
        if not self.kind.signed:
            moment = moment.clamp(max=torch.finfo(moment.dtype).max)
        changed = self.groups.largest(finite.to(moment.dtype)) > 0
        new_scales = law.scales_of(self.groups.largest(moment.abs()))
        scales = torch.where(changed, new_scales, self.scales[self.groups.numbers])
        codes = encode(moment, self.groups.spread(scales), self.kind, noise)
        self.codes.copy_(torch.where(self.groups.spread(changed), codes, self.codes))
        self.scales[self.groups.numbers] = scales


class Begun:
    """Begins an update: counts the step and computes step sizes. ``move`` then updates rows, all at once or in chunks.

    Args:
        update: the update; its values must not be empty.
    """

    def __init__(self, update: Update) -> None:
        update.step.add_(1)
        self.update = update
        step, births = update.step, update.births
        age = (step if births is None else step - births).clamp(min=1).double()
        rule_age = step.double().expand_as(age) if update.rule.shared_step else age
        self.options = update.rule.named_options(update.options)
        warmup_steps = law.warmup_of(births, update.warmup_steps, update.initial_warmup_steps)
        self.rates = law.step_sizes(age, update.lr.reshape(()), update.density_rate, warmup_steps)
        self.of_age = update.rule.of_age(rule_age, self.options)
        self.stored, self.grad = [update.values, *update.slots], update.grad
        if update.topology is None and all(t.is_contiguous() for t in self.stored):
            self.stored, self.grad = [t.view(-1) for t in self.stored], update.grad.reshape(-1)
        seed = update.noise_seed
        draws = seed is not None and update.rounds_stochastically
        self.noise_key = law.noise_key(seed or 0, step) if draws else None
        self.squares: Tensor | None = None
        self.norms: Tensor | None = None

    @property
    def needs_locations(self) -> bool:
        """Tells whether noise, codes or norms depend on where the rows lie in the dense weight."""
        return self.noise_key is not None or self.update.is_coded or self.update.rule.normalized is not None

    def measure_units(self, rows: slice, location: Location) -> None:
        """Adds the squares of these rows to their output units' sums. A normalized rule needs all before ``move``."""
        normalized, layout = self.update.rule.normalized, self.update.layout
        assert normalized is not None
        if layout is None:
            raise ValueError(f"rule {self.update.rule.name}: expected a layout that says what a row is, got none")
        are_columns = self.update.units_are_columns
        if self.squares is None:
            self.squares = _no_squares(self.update, layout)
        block, finite, _ = self._read(rows, location)
        squares = torch.where(finite, normalized(block, self.options), 0).double().square_()
        unit = location.units(layout, are_columns)
        if unit.shape != squares.shape:
            squares = squares.sum(1 if are_columns else 2, keepdim=True)
        unit, squares = unit.reshape(-1), squares.reshape(-1)
        # Both ways add up in a fixed order; on a GPU ``bincount`` does not.
        if squares.device.type == "cpu":
            self.squares += torch.bincount(unit, squares, minlength=self.squares.numel())
        else:
            self.squares.index_put_((unit,), squares, accumulate=True)

    def move(self, rows: slice, location: Location | None) -> None:
        """Updates some rows in place, and counts the skipped blocks. ``location`` may be None unless it is needed."""
        block, finite, stores = self._read(rows, location)
        layout = self.update.layout
        if self.squares is not None and location is not None and layout is not None:
            if self.norms is None:
                if self.update.sum_over_ranks is not None:
                    self.update.sum_over_ranks(self.squares)
                self.norms = self.squares.sqrt().to(block.weight.dtype)
            block = block._replace(unit_norm=self.norms[location.units(layout, self.update.units_are_columns)])
        new = self.update.rule.step(block, self.options)
        old = (block.weight, *block.slots)
        noise = location.noise(self.noise_key) if location and self.noise_key is not None else None
        for stream, (store, before, after) in enumerate(zip(stores, old, new, strict=True)):
            store.write(before, after, finite, noise.bits(stream) if noise and store.takes_noise else None)
        self.update.num_skipped.add_(finite.numel() - finite.sum())

    def _read(self, rows: slice, location: Location | None) -> tuple[Block, Tensor, list[_Numbers | _Codes]]:
        """Returns the rows as a ``Block``, a mask of finite gradients, and readers and writers of weight and slots."""
        generation = self.update.generation
        grad = self.grad[rows]
        stores = self._stores(rows, location)
        dtype = law.compute_dtype(self.stored[0].dtype)
        weight, *slots = [store.read(dtype) for store in stores]
        born = None if generation is None else generation[rows]
        rate, *of_age = (law.per_block(table, born, weight) for table in (self.rates, *self.of_age))
        finite = law.finite_blocks(grad, num_block_dims=0 if self.update.topology is None else grad.dim() - 1)
        return Block(weight, grad.to(dtype), tuple(slots), rate, tuple(of_age)), finite, stores

    def _stores(self, rows: slice, location: Location | None) -> list[Any]:
        values, *slots = (tensor[rows] for tensor in self.stored)
        scales = self.update.scales
        if scales is None:
            return [_Numbers(values), *map(_Numbers, slots)]
        assert location is not None
        groups = location.groups
        kinds = (SIGNED_CODES if slot.signed else UNSIGNED_CODES for slot in self.update.rule.slots)
        coded = (_Codes(codes, row, groups, kind) for codes, row, kind in zip(slots, scales, kinds, strict=True))
        return [_Numbers(values), *coded]


def decode_slot(codes: Tensor, scales: Tensor, signed: bool, topology: Topology) -> Tensor:
    """Converts the 8-bit codes of one slot of a compact weight to fp32; ``scales`` (num_groups,) are the slot's."""
    groups = Location(positions_of(topology.mask()), topology.layout).groups
    return decode(codes, groups.spread(scales[groups.numbers]), SIGNED_CODES if signed else UNSIGNED_CODES)


def update_all(updates: list[Update]) -> None:
    """Makes every update, each with all of its rows at once."""
    for update in updates:
        if update.values.numel() == 0:
            move_nothing(update)
            continue
        begun = Begun(update)
        everything = slice(0, len(begun.grad))
        location = locate_all(begun) if begun.needs_locations else None
        if update.rule.normalized is not None and location is not None:
            begun.measure_units(everything, location)
        begun.move(everything, location)


def move_nothing(update: Update) -> None:
    """Makes the update of a parameter of which no row is here; other ranks may wait for its part of their norms."""
    update.step.add_(1)
    if update.rule.normalized is not None and update.sum_over_ranks is not None and update.layout is not None:
        update.sum_over_ranks(_no_squares(update, update.layout))


def _no_squares(update: Update, layout: Layout) -> Tensor:
    num_units = layout.num_matrices * (layout.cols if update.units_are_columns else layout.rows)
    return torch.zeros(num_units, dtype=torch.float64, device=update.grad.device)


def locate_all(begun: Begun) -> Location:
    """Returns the location of all rows of a parameter."""
    topology = begun.update.topology
    if topology is None:
        grad, first = begun.grad, begun.update.first_place
        places = torch.arange(first, first + grad.numel(), device=grad.device).view(grad.shape)
        return Location(places, None, first_place=first)
    return Location(topology.mask().nonzero().squeeze(1), topology.layout)
