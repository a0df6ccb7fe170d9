"""recompute_unpack: no dense weight is saved for backward, whatever reads it.

    dense = unpack(values, ...)                     dense = unpack(values, ...)   # MUST_RECOMPUTE
    y = convolution(x, dense)            →          y = convolution(x, dense)
    gx = convolution_backward(gy, x, dense)         gx = convolution_backward(gy, x, dense)

The partitioner then unpacks again in backward instead of keeping ``dense``, or what is computed from it alone and is as
large (a scaled or normalized weight, autocast's copy of it). Autograd has been traced when passes run, so the sinks,
which only autograd needs, are taken off as well.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from smet_compile.passes.graph import UNPACK, PassReport, arguments, aten, calls, prims, val

_AFTER_ALL_REGIONS = 2**40
"""An output of one checkpointed region that a later one reads is saved; this is read by no later one."""

_CHEAP_TAGS = {"pointwise", "reduction"}
_MOVES: tuple[Any, ...] = (aten.clone.default, aten._to_copy.default, aten.constant_pad_nd.default, aten.cat.default)
_MOVES += (aten.flip.default, aten.roll.default, prims.rev.default)


def must_recompute(node: fx.Node) -> None:
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = _AFTER_ALL_REGIONS


def recompute_unpack(graph: fx.Graph) -> PassReport:
    report = PassReport("recompute_unpack")
    for node in calls(graph, UNPACK):
        known = arguments(node) | {"update_sink": None, "growth_sink": None, "traced": False}
        seen = tuple(known.values())
        if node.meta.get("ac_graph_id") == _AFTER_ALL_REGIONS and node.args == seen:
            continue
        must_recompute(node)
        node.args = seen
        for derived in _derived(node):
            must_recompute(derived)
        report.matched += 1
    return report


def _derived(weight: fx.Node) -> list[fx.Node]:
    """What is computed from ``weight`` and inputs of the graph alone, without a product, and is as large."""
    found = {weight: True}
    waiting = [weight]
    while waiting:
        for user in waiting.pop().users:
            known = all(_is_known(source, found) for source in user.all_input_nodes)
            if user not in found and known and _is_cheap(user):
                found[user] = _size(user) == _size(weight)
                waiting.append(user)
    return [node for node, is_as_large in found.items() if is_as_large and node is not weight]


def _is_known(node: fx.Node, found: dict[fx.Node, bool]) -> bool:
    return node in found or (node.op == "placeholder" and not node.name.startswith("tangents"))


def _is_cheap(node: fx.Node) -> bool:
    """Whether it costs about as much to compute as to read."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
        return op is operator.getitem
    tags = {tag.name for tag in op.tags}
    return op in _MOVES or op.is_view or bool(tags & _CHEAP_TAGS)


def _size(node: fx.Node) -> int | None:
    size = val(node).numel() if isinstance(val(node), torch.Tensor) else None
    return size if isinstance(size, int) else None


def mark_seen(graph: fx.Graph) -> None:
    """What is left to do where the passes are switched off: nobody is to be warned that they did not run."""
    for node in calls(graph, UNPACK):
        node.args = tuple((arguments(node) | {"traced": False}).values())
