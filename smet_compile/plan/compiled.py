"""Follows a compiled training step through its two graphs: which buffers code generation makes, and for how long.

Pointwise work is fused into its readers, so it takes memory only where a kernel of its own (a product, attention, an
op of ours) or the caller wants it as a tensor. Everything else makes a tensor. That is a model of Inductor, not
Inductor: docs/planning.md says how well it predicts.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import smet_compile.ops  # noqa: F401  registers the ops
from smet_compile.plan.timeline import Degrees, Term, Timeline

_aten, _prims = torch.ops.aten, torch.ops.prims
OpOverload = type(_aten.mm.default)
_FUSED: set[Any] = {
    _aten.clone, _aten._to_copy, _aten.constant_pad_nd, _aten.cat, _aten.embedding, _aten.index, _aten.gather,
    _aten.full, _aten.full_like, _aten.arange, _aten.empty, _aten.lift_fresh_copy, _aten.scalar_tensor, _aten.flip,
    _aten.select_scatter, _aten.slice_scatter, _aten.scatter, _prims.convert_element_type, _prims.iota,
}  # fmt: skip
_REDUCED: set[Any] = {
    _aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.var_mean, _aten.any, _aten.all, _aten.prod, _aten.argmax,
}  # fmt: skip
_COMPACT: set[Any] = {torch.ops.smet.pack, torch.ops.smet.sampled_matmul}


@dataclass(eq=False)
class Buffer:
    """Stands for memory that a graph makes. ``num_holders``: the number of live values that are it, or a view of it."""

    bytes: float
    term: Term
    num_holders: int = 0


def compiled_timeline(forward: fx.Graph, backward: fx.Graph | None, degrees: Degrees) -> Timeline:
    """Returns the timeline of a step's two graphs as the partitioner leaves them.

    The inputs of the forward graph belong to the caller and are not counted.
    """
    timeline = Timeline()
    inputs = {node.name for node in forward.find_nodes(op="placeholder")}
    saved = _GraphFollower(forward, degrees, timeline).run(dict.fromkeys(inputs))
    timeline.begin_backward()
    if backward is not None:
        for buffer in filter(None, saved.values()):
            buffer.num_holders = 0
        known = {node.name: None for node in backward.find_nodes(op="placeholder") if node.name in inputs}
        loss = {"tangents_1": None}
        _GraphFollower(backward, degrees, timeline).run(loss | known | saved)
    return timeline


class _GraphFollower:
    """Follows one of the two graphs."""

    def __init__(self, graph: fx.Graph, degrees: Degrees, timeline: Timeline) -> None:
        self.degrees = degrees
        self.timeline = timeline
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.outputs = {node.name: _base(node) for node in graph.output_node().all_input_nodes}
        self.tensors = {node for node in self.nodes if self._makes_tensor(node)}
        self.buffer_of: dict[fx.Node, Buffer | None] = {}
        self._reads: dict[fx.Node, set[fx.Node]] = {}

    def run(self, given: dict[str, Buffer | None]) -> dict[str, Buffer | None]:
        """Adds to the timeline what the graph makes, and removes what dies.

        Args:
            given: input name → its buffer, None where it belongs to the caller. Other inputs are made at the beginning.

        Returns: output name → its buffer. All other buffers are dead by then.
        """
        dying: dict[int, list[fx.Node]] = {}
        for node, place in self._last_reads().items():
            dying.setdefault(place, []).append(node)
        kept = set(self.outputs.values())
        for place, node in enumerate(self.nodes):
            dead = [each for each in dying.get(place, ()) if each not in kept]
            if node.op == "placeholder" and node.name in given:
                self._take(node, given[node.name])
            elif node in self.tensors:
                overwritten = [each for each in dead if _is_fused(node) and _may_overwrite(node, each)]
                self._free(overwritten)
                self._make(node)
                dead = [each for each in dead if each not in overwritten]
            self._free(dead)
        return {name: self.buffer_of.get(node) for name, node in self.outputs.items()}

    def _take(self, node: fx.Node, buffer: Buffer | None) -> None:
        self.buffer_of[node] = buffer
        if buffer is not None:
            buffer.num_holders += 1

    def _free(self, dead: list[fx.Node]) -> None:
        for node in dead:
            buffer = self.buffer_of.get(node)
            if buffer is None:
                continue
            buffer.num_holders -= 1
            if buffer.num_holders == 0:
                self.timeline.remove(buffer.bytes, buffer.term)

    def _make(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return
        size, term = self.degrees.of_shape(_shape(value))
        term = Term(0, 0, compact=True) if _packet(node) in _COMPACT else term
        self.buffer_of[node] = buffer = Buffer(size * value.element_size(), term, num_holders=1)
        self.timeline.add(buffer.bytes, buffer.term)

    def _last_reads(self) -> dict[fx.Node, int]:
        """Returns the place of the last read of each tensor, its own place where nothing reads it."""
        last: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes):
            if node in self.tensors or node.op == "output" or _is_effect(node):
                for read in self._read_by(node):
                    last[read] = place
        for place, node in enumerate(self.nodes):
            if node in self.tensors:
                last.setdefault(node, place)
        return last

    def _read_by(self, node: fx.Node) -> set[fx.Node]:
        """Returns the tensors that the kernel of ``node`` reads, through all that is fused into it."""
        if node not in self._reads:
            found: set[fx.Node] = set()
            for source in map(_base, node.all_input_nodes):
                if source in self.tensors:
                    found.add(source)
                elif not _is_effect(source):
                    found |= self._read_by(source)
            self._reads[node] = found
        return self._reads[node]

    def _makes_tensor(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        if node.op != "call_function" or _base(node) is not node or _is_effect(node):
            return False
        if not _is_fused(node):
            return not isinstance(node.meta.get("val"), tuple | list)
        return node in self.outputs.values() or any(_wants_tensor(user) for user in _users(node))


def _may_overwrite(node: fx.Node, dead: fx.Node) -> bool:
    """Returns True where ``node`` may be written over ``dead``, which this graph made and which has its size."""
    new, old = node.meta.get("val"), dead.meta.get("val")
    if dead.op == "placeholder" or not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return False
    return math.prod(_shape(new)) * new.itemsize == math.prod(_shape(old)) * old.itemsize


def _shape(value: Tensor) -> list[int]:
    """Returns the lengths of this run; a checkpointed region holds some of them as symbols."""
    return [length.node.hint if isinstance(length, torch.SymInt) else length for length in value.shape]


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_fused(node: fx.Node) -> bool:
    """Returns True where code generation merges ``node`` into its readers."""
    op = node.target
    if not isinstance(op, OpOverload):
        return False
    return torch.Tag.pointwise in op.tags or op.overloadpacket in _FUSED


def _is_effect(node: fx.Node) -> bool:
    """Returns True where ``node`` writes into existing tensors and makes none."""
    return _packet(node) is _aten.copy_ or "auto_functionalized" in str(node.target)


def _wants_tensor(user: fx.Node) -> bool:
    if user.op == "output" or _is_effect(user):
        return True
    return not _is_fused(user) and _packet(user) not in _REDUCED


def _base(node: fx.Node) -> fx.Node:
    """Returns the node that ``node`` is a view or a part of; itself where it is neither."""
    op = node.target
    if isinstance(op, OpOverload) and (op.is_view or op.overloadpacket is _aten.reshape):
        return _base(node.all_input_nodes[0])
    if op is operator.getitem and isinstance(node.args[0], fx.Node) and _is_effect(node.args[0]):
        return node.args[0]
    return node


def _users(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes that read ``node`` or a view of it."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= _users(user) if _base(user) is not user and user.op != "output" else {user}
    return found
