"""Marks unpacked weights for recomputation, so that no dense weight is saved for backward, whatever reads it.

    dense = unpack(values, ...)                     dense = unpack(values, ...)   # MUST_RECOMPUTE
    y = convolution(x, dense)            →          y = convolution(x, dense)
    gx = convolution_backward(gy, x, dense)         gx = convolution_backward(gy, x, dense)

The partitioner then unpacks again in backward instead of saving ``dense``, or a tensor of its size that is computed
from it and inputs alone (a scaled or normalized weight, autocast's copy). Inputs that the graph changes, such as a
buffer, have other values by then, so that what is computed from them is saved. The sinks are removed as well: only
autograd needs them, and it has been traced before passes run.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from smet_compile.passes.graph import UNPACK, OpOverload, PassReport, arguments, aten, calls, prims, val

_AFTER_ALL_REGIONS = 2**40
"""A number above that of every checkpointed region: torch saves an output of one region that a later region reads."""

_CHEAP_TAGS = {"pointwise", "reduction"}
_MOVES: tuple[Any, ...] = (aten.clone.default, aten._to_copy.default, aten.constant_pad_nd.default, aten.cat.default)
_MOVES += (aten.flip.default, aten.roll.default, prims.rev.default)


def must_recompute(node: fx.Node) -> None:
    """Makes the partitioner compute ``node`` again in backward."""
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = _AFTER_ALL_REGIONS


def recompute_unpack(graph: fx.Graph) -> PassReport:
    """Marks every unpack and what is computed from it alone, and removes the sinks."""
    report = PassReport("recompute_unpack")
    inputs = _lasting_inputs(graph)
    for node in calls(graph, UNPACK):
        known = arguments(node) | {"update_sink": None, "growth_sink": None, "traced": False, "scales_rows": False}
        seen = tuple(known.values())
        if node.meta.get("ac_graph_id") == _AFTER_ALL_REGIONS and node.args == seen:
            continue
        must_recompute(node)
        _set_arguments(node, seen)
        for derived in _derived(node, inputs):
            must_recompute(derived)
        report.matched += 1
    return report


def _set_arguments(node: fx.Node, args: tuple[Any, ...]) -> None:
    """Gives a call other arguments. Inductor would compare them with those that it was traced with."""
    node.args = args
    node.meta.pop("eager_input_vals", None)


def _lasting_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Returns the inputs of the forward that have the same values in backward: those that no call changes in place."""
    changed = {node for call in graph.nodes if call.op == "call_function" for node in _changed_by(call)}
    inputs = (node for node in graph.nodes if node.op == "placeholder" and not node.name.startswith("tangents"))
    return {node for node in inputs if node not in changed}


def _changed_by(call: fx.Node) -> list[Any]:
    """Returns the arguments that a call changes in place."""
    if not isinstance(call.target, OpOverload) or not call.target._schema.is_mutable:
        return []
    changed = {each.name for each in call.target._schema.arguments if each.is_write}
    return [value for name, value in arguments(call).items() if name in changed and isinstance(value, fx.Node)]


def _derived(weight: fx.Node, inputs: set[fx.Node]) -> list[fx.Node]:
    """Returns nodes as large as ``weight`` that are cheaply computed from it and ``inputs`` alone."""
    found = {weight: True}
    waiting = [weight]
    while waiting:
        for user in waiting.pop().users:
            known = all(source in found or source in inputs for source in user.all_input_nodes)
            if user not in found and known and _is_cheap(user):
                found[user] = _size(user) == _size(weight)
                waiting.append(user)
    return [node for node, is_as_large in found.items() if is_as_large and node is not weight]


def _is_cheap(node: fx.Node) -> bool:
    """Tells whether computing a node takes about as long as reading its result."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload):
        return op is operator.getitem
    tags = {tag.name for tag in op.tags}
    return op in _MOVES or op.is_view or bool(tags & _CHEAP_TAGS)


def _size(node: fx.Node) -> int | None:
    size = val(node).numel() if isinstance(val(node), torch.Tensor) else None
    return size if isinstance(size, int) else None


def mark_seen(graph: fx.Graph) -> None:
    """Suppresses the warning of a graph that the passes did not see, where they are turned off."""
    for node in calls(graph, UNPACK):
        _set_arguments(node, tuple((arguments(node) | {"traced": False}).values()))
