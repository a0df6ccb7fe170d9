"""Follows a compiled training step through its two graphs: which buffers code generation makes, and for how long.

Pointwise work is fused into what reads it, so it takes memory only where a kernel of its own (a product, attention, an
op of ours) or the caller wants it as a tensor. Everything else makes a tensor. That is a model of Inductor, not
Inductor: docs/planning.md says how well it predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import smet_compile.ops  # noqa: F401  registers the ops
from smet_compile.plan.degrees import Degrees, Term
from smet_compile.plan.fusion import base, is_effect, is_fused, packet, shape, users, wants_tensor
from smet_compile.plan.timeline import Timeline

_COMPACT: set[Any] = {torch.ops.smet.pack, torch.ops.smet.sampled_matmul}


@dataclass(eq=False)
class Buffer:
    """``num_holders``: values of a graph that are it, or a view of it."""

    bytes: float
    term: Term
    num_holders: int = 0


def compiled_timeline(forward: fx.Graph, backward: fx.Graph | None, degrees: Degrees) -> Timeline:
    """Of a step's two graphs as the partitioner leaves them; the inputs of the first are held by somebody else."""
    timeline = Timeline()
    inputs = {node.name for node in forward.find_nodes(op="placeholder")}
    saved = _Half(forward, degrees, timeline).run(dict.fromkeys(inputs))
    timeline.begin_backward()
    if backward is not None:
        for buffer in filter(None, saved.values()):
            buffer.num_holders = 0
        known = {node.name: None for node in backward.find_nodes(op="placeholder") if node.name in inputs}
        loss = {"tangents_1": None}
        _Half(backward, degrees, timeline).run(loss | known | saved)
    return timeline


class _Half:
    """One of the two graphs."""

    def __init__(self, graph: fx.Graph, degrees: Degrees, timeline: Timeline) -> None:
        self.degrees = degrees
        self.timeline = timeline
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.outputs = {base(node) for node in graph.output_node().all_input_nodes}
        self.names = {node.name: base(node) for node in graph.output_node().all_input_nodes}
        self.buffers = {node for node in self.nodes if self._is_buffer(node)}
        self.held_of: dict[fx.Node, Buffer | None] = {}
        self._reads: dict[fx.Node, set[fx.Node]] = {}

    def run(self, held: dict[str, Buffer | None]) -> dict[str, Buffer | None]:
        """``held``: input name → the buffer that it is, None where somebody else holds it. Returns the same of the
        outputs; everything else is dead by then. An input that is not in ``held`` is made at the beginning."""
        last = self._last_reads()
        dying: dict[int, list[fx.Node]] = {}
        for node, place in last.items():
            dying.setdefault(place, []).append(node)
        for place, node in enumerate(self.nodes):
            dead = [each for each in dying.get(place, ()) if each not in self.outputs]
            if node.op == "placeholder" and node.name in held:
                self._take(node, held[node.name])
            elif node in self.buffers:
                early = [each for each in dead if is_fused(node) and self._fits(node, each)]
                self._free(early)
                self._make(node)
                dead = [each for each in dead if each not in early]
            self._free(dead)
        return {name: self.held_of.get(node) for name, node in self.names.items()}

    def _take(self, node: fx.Node, buffer: Buffer | None) -> None:
        self.held_of[node] = buffer
        if buffer is not None:
            buffer.num_holders += 1

    def _fits(self, node: fx.Node, dead: fx.Node) -> bool:
        """Whether ``node`` may be written over ``dead``, which this graph made."""
        new, old = node.meta.get("val"), dead.meta.get("val")
        if dead.op == "placeholder" or not isinstance(new, Tensor) or not isinstance(old, Tensor):
            return False
        return math.prod(shape(new)) * new.itemsize == math.prod(shape(old)) * old.itemsize

    def _free(self, dead: list[fx.Node]) -> None:
        for node in dead:
            buffer = self.held_of.get(node)
            if buffer is None:
                continue
            buffer.num_holders -= 1
            if buffer.num_holders == 0:
                self.timeline.remove(buffer.bytes, buffer.term)

    def _make(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return
        size, term = self.degrees.of(shape(value))
        term = Term(0, 0, compact=True) if packet(node) in _COMPACT else term
        self.held_of[node] = buffer = Buffer(size * value.element_size(), term, num_holders=1)
        self.timeline.add(buffer.bytes, buffer.term)

    def _last_reads(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes):
            if node in self.buffers or node.op == "output" or is_effect(node):
                for read in self._read_by(node):
                    last[read] = place
        for node in self.buffers:
            if node not in last:
                last[node] = self.nodes.index(node)
        return last

    def _read_by(self, node: fx.Node) -> set[fx.Node]:
        """The buffers that the kernel of ``node`` reads, through all that is fused into it."""
        if node not in self._reads:
            found: set[fx.Node] = set()
            for source in map(base, node.all_input_nodes):
                if source in self.buffers:
                    found.add(source)
                elif not is_effect(source):
                    found |= self._read_by(source)
            self._reads[node] = found
        return self._reads[node]

    def _is_buffer(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        if node.op != "call_function" or base(node) is not node or is_effect(node):
            return False
        if not is_fused(node):
            return not isinstance(node.meta.get("val"), tuple | list)
        return node in self.outputs or any(wants_tensor(user) for user in users(node))
