"""Follows active weights through a flow: which units are alive, which are read, and how many paths there are.

A unit is zero (always, whatever the input), constant (only biases come to it), or live: an active path leads to it
from the model's input. It is read where an active path leads from it to the model's output. A factor that is zero
blocks the paths through the other factors.

Shape suffixes: N active blocks, S stacked matrices (R, C) of M block rows and K block columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from smet_compile.format import Layout, positions_of, unpack_bits
from smet_compile.microscope.flow import Flow, Link, Node
from smet_compile.microscope.per_site import DeadUnits
from smet_compile.microscope.reading import Reading

_ZERO, _CONSTANT, _LIVE = 0, 1, 2
_START = {"zero": _ZERO, "constant": _CONSTANT, "input": _LIVE}
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ActiveMatrix:
    """Describes a stack of matrices of which some blocks are active; ``positions_N`` None: all of them.

    Says which columns reach which rows, in time linear in its active blocks. Entries of vectors number rows, or
    columns, through all matrices of the stack.
    """

    layout: Layout
    positions_N: Tensor | None = None

    @classmethod
    def of(cls, topology: Tensor, layout: Layout) -> ActiveMatrix:
        """Makes the matrix from the packed bits of its topology."""
        return cls(layout, positions_of(unpack_bits(topology.cpu(), layout.num_blocks)))

    @property
    def num_active(self) -> int:
        """Counts the active blocks."""
        return self.layout.num_blocks if self.positions_N is None else self.positions_N.numel()

    @property
    def num_active_weights(self) -> int:
        """Counts the weights inside of active blocks; a block that hangs over an edge has fewer."""
        stack, rows, cols = self.layout.num_matrices, self.layout.rows, self.layout.cols
        return self.count((torch.ones(stack * rows), torch.ones(stack * cols)))

    @cached_property
    def block_row_N(self) -> Tensor:
        """Returns the block row of each active block, numbered through all matrices of the stack."""
        assert self.positions_N is not None
        return self.positions_N // self.layout.block_cols

    @cached_property
    def block_col_N(self) -> Tensor:
        """Returns the block column of each active block, likewise."""
        assert self.positions_N is not None
        matrix_N = self.positions_N // (self.layout.block_rows * self.layout.block_cols)
        return matrix_N * self.layout.block_cols + self.positions_N % self.layout.block_cols

    def to_rows(self, at_cols: Tensor) -> Tensor:
        """Sums over each row's active weights what stands at their columns."""
        layout = self.layout
        if self.positions_N is None:
            return at_cols.view(layout.num_matrices, layout.cols).sum(1).repeat_interleave(layout.rows)
        blocks = self._blocks(at_cols, layout.cols, layout.block_shape[1]).sum(1)
        rows = blocks.new_zeros(layout.num_matrices * layout.block_rows)
        rows.index_add_(0, self.block_row_N, blocks[self.block_col_N])
        return self._per_entry(rows, layout.rows, layout.block_shape[0])

    def to_cols(self, at_rows: Tensor) -> Tensor:
        """Sums over each column's active weights what stands at their rows."""
        layout = self.layout
        if self.positions_N is None:
            return at_rows.view(layout.num_matrices, layout.rows).sum(1).repeat_interleave(layout.cols)
        blocks = self._blocks(at_rows, layout.rows, layout.block_shape[0]).sum(1)
        cols = blocks.new_zeros(layout.num_matrices * layout.block_cols)
        cols.index_add_(0, self.block_col_N, blocks[self.block_row_N])
        return self._per_entry(cols, layout.cols, layout.block_shape[1])

    def count(self, *masks: tuple[Tensor, Tensor]) -> int:
        """Counts active weights in one of the rows and one of the columns of any pair of masks (rows, columns)."""
        if len(masks) == 1:
            rows, cols = masks[0]
            return int((self.to_rows(cols.double()) * rows).sum())
        assert self.positions_N is not None
        layout, (bm, bn) = self.layout, self.layout.block_shape
        step = max(1, _WEIGHTS_AT_ONCE // (bm * bn))
        pairs = [(self._blocks(rows, layout.rows, bm), self._blocks(cols, layout.cols, bn)) for rows, cols in masks]
        total = 0
        for first in range(0, self.positions_N.numel(), step):
            row, col = self.block_row_N[first : first + step], self.block_col_N[first : first + step]
            inside = [rows[row].unsqueeze(2) & cols[col].unsqueeze(1) for rows, cols in pairs]
            total += int(torch.stack(inside).any(0).sum())
        return total

    def _blocks(self, entries: Tensor, length: int, block: int) -> Tensor:
        """Cuts the ``length`` entries of each matrix into blocks: (blocks, block)."""
        return torch.nn.functional.pad(entries.view(-1, length), (0, -length % block)).view(-1, block)

    def _per_entry(self, blocks: Tensor, length: int, block: int) -> Tensor:
        """Returns what stands at each block, at each of its entries that is inside the matrix."""
        wide = blocks.view(self.layout.num_matrices, -1).repeat_interleave(block, dim=1)
        return wide[:, :length].reshape(-1)


Matrices = Mapping[str, ActiveMatrix]


@dataclass(frozen=True)
class Reach:
    """Says how one weight lies in the whole model.

    Args:
        starved: (S C,) bool: inputs with active weights to which nothing comes that depends on the model's input.
        unread: (S R,) bool: outputs with active weights of which nothing arrives at the model's output.
        num_live_weights: active weights on a path from input to output all of which is active.
    """

    starved: Tensor
    unread: Tensor
    num_live_weights: int


def reach_of_sites(
    reading: Reading, matrices: dict[str, ActiveMatrix], dead: dict[str, DeadUnits]
) -> tuple[dict[str, Reach], float | None]:
    """Returns the reach of each site that the forward uses, and log10 of the share of paths that are alive."""
    flow = reading.flow
    dense = {name: ActiveMatrix(layout) for name, layout in reading.layouts.items()}
    actual = dense | matrices
    states = _states(flow, actual)
    is_read = _is_read(flow, actual, states)
    reaches = {name: _reach(flow, name, actual[name], dead[name], states, is_read) for name in matrices}
    possible = _count_paths(flow, dense, _states(flow, dense)).log10
    share = _count_paths(flow, actual, states).log10 - possible if possible > -math.inf else None
    return {name: reach for name, reach in reaches.items() if reach is not None}, share


def _reach(
    flow: Flow, name: str, matrix: ActiveMatrix, dead: DeadUnits, states: list[Tensor], is_read: list[Tensor]
) -> Reach | None:
    """Returns the reach of one weight. Where it is used several times, a unit lives that lives in one of the uses."""
    uses = [(columns, rows, node.transposed) for columns, rows, node in flow.uses if node.weight == name]
    if not uses:
        return None
    is_fed, is_wanted, masks = torch.zeros_like(dead.inputs), torch.zeros_like(dead.outputs), []
    for columns, rows, transposed in uses:
        live, read = states[columns] == _LIVE, is_read[rows]
        masks.append((live, read) if transposed else (read, live))
        same_way = transposed == uses[-1][2]
        is_fed |= live if same_way else read
        is_wanted |= read if same_way else live
    return Reach(~is_fed & ~dead.inputs, ~is_wanted & ~dead.outputs, matrix.count(*masks))


def _states(flow: Flow, matrices: Matrices) -> list[Tensor]:
    """Returns, for the units of each node, zero, constant or live (uint8)."""
    states: list[Tensor] = []
    for node in flow.nodes:
        if node.kind in _START:
            states.append(torch.full((node.num_units,), _START[node.kind], dtype=torch.uint8))
        elif node.kind == "matrix":
            columns = states[node.links[0].source]
            reached = [_through(node, matrices, (columns >= level).double()) > 0 for level in (_CONSTANT, _LIVE)]
            states.append(reached[0].to(torch.uint8) + reached[1])
        else:
            brought = torch.stack([_largest(link, states[link.source], node.num_units) for link in node.links])
            state, is_blocked = brought.amax(0), brought.amin(0) == _ZERO
            states.append(state.masked_fill(is_blocked, _ZERO) if node.kind == "product" else state)
    return states


def _through(node: Node, matrices: Matrices, columns: Tensor) -> Tensor:
    matrix = matrices[node.weight]
    return matrix.to_cols(columns) if node.transposed else matrix.to_rows(columns)


def _largest(link: Link, state: Tensor, num_units: int) -> Tensor:
    """Returns the largest state that a link brings to each unit."""
    if link.targets is None:
        return state[link.units]
    return torch.zeros(num_units, dtype=torch.uint8).scatter_reduce_(0, link.targets, state[link.units], "amax")


def _is_open(node: Node, link: Link, states: list[Tensor]) -> Tensor | None:
    """Returns where no other factor of a product is zero; None for other nodes."""
    if node.kind != "product":
        return None
    return torch.stack([states[other.source][other.units] != _ZERO for other in node.links if other is not link]).all(0)


def _is_read(flow: Flow, matrices: Matrices, states: list[Tensor]) -> list[Tensor]:
    """Returns, for the units of each node, whether an active path leads from them to the output (bool)."""
    is_read = [torch.zeros(node.num_units, dtype=torch.bool) for node in flow.nodes]
    is_read[flow.output][:] = True
    for node, wanted in zip(reversed(flow.nodes), reversed(is_read), strict=True):
        for link in node.links:
            if node.kind == "matrix":
                matrix = matrices[node.weight]
                back = matrix.to_rows if node.transposed else matrix.to_cols
                is_read[link.source] |= back(wanted.double()) > 0
                continue
            through = wanted if link.targets is None else wanted[link.targets]
            gate = _is_open(node, link, states)
            is_read[link.source][link.units[through if gate is None else through & gate]] = True
    return is_read


@dataclass(frozen=True)
class _Paths:
    """Counts paths to some units: ``share`` times e to the ``log_scale``. The largest share is 1, or all are 0."""

    share: Tensor
    log_scale: float

    @classmethod
    def of(cls, counts: Tensor, log_scale: float) -> _Paths:
        largest = float(counts.max()) if counts.numel() else 0.0
        return cls(counts / largest, log_scale + math.log(largest)) if largest > 0 else cls(counts, -math.inf)

    def at(self, log_scale: float) -> Tensor:
        """Returns the numbers over e to the ``log_scale``, which is at least as large."""
        return self.share * math.exp(self.log_scale - log_scale) if self.log_scale > -math.inf else self.share

    @property
    def log10(self) -> float:
        """Returns the logarithm of the sum over all units; minus infinity where there is no path."""
        total = float(self.share.sum())
        return (self.log_scale + math.log(total)) / math.log(10) if total > 0 else -math.inf


def _count_paths(flow: Flow, matrices: Matrices, states: list[Tensor]) -> _Paths:
    """Counts the paths from the input to the output, forwards: every node adds up what comes to it."""
    counted: list[_Paths] = []
    for node in flow.nodes:
        if node.kind in _START:
            count = torch.full((node.num_units,), float(node.kind == "input"), dtype=torch.float64)
            counted.append(_Paths.of(count, 0.0))
        elif node.kind == "matrix":
            columns = counted[node.links[0].source]
            counted.append(_Paths.of(_through(node, matrices, columns.share), columns.log_scale))
        else:
            counted.append(_sum_of_paths(node, counted, states))
    return counted[flow.output]


def _sum_of_paths(node: Node, counted: list[_Paths], states: list[Tensor]) -> _Paths:
    scale = max(counted[link.source].log_scale for link in node.links)
    total = torch.zeros(node.num_units, dtype=torch.float64)
    for link in node.links if scale > -math.inf else ():
        gate = _is_open(node, link, states)
        count = counted[link.source].at(scale)[link.units]
        count = count if gate is None else count * gate
        total = total + count if link.targets is None else total.index_add_(0, link.targets, count)
    return _Paths.of(total, scale)
