"""recompute_unpack: no dense weight is saved for backward, whatever reads it.

    dense = unpack(values, ...)                     dense = unpack(values, ...)   # MUST_RECOMPUTE
    y = convolution(x, dense)            →          y = convolution(x, dense)
    gx = convolution_backward(gy, x, dense)         gx = convolution_backward(gy, x, dense)

The partitioner then unpacks again in backward instead of keeping ``dense``, or what is computed from it alone entry by
entry (a scaled weight, autocast's copy of it). Autograd has been traced when passes run, so the sinks, which only
autograd needs, are taken off as well.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from smet_compile.passes.graph import UNPACK, PassReport, calls, val

_AFTER_ALL_REGIONS = 2**40
"""An output of one checkpointed region that a later one reads is saved; this is read by no later one."""


def must_recompute(node: fx.Node) -> None:
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = _AFTER_ALL_REGIONS


def recompute_unpack(graph: fx.Graph) -> PassReport:
    report = PassReport("recompute_unpack")
    for node in calls(graph, UNPACK):
        seen = (*node.args[:6], None, None, False)
        if node.meta.get("ac_graph_id") == _AFTER_ALL_REGIONS and node.args == seen:
            continue
        must_recompute(node)
        node.args = seen
        for derived in _derived(node):
            must_recompute(derived)
        report.matched += 1
    return report


def _derived(weight: fx.Node) -> list[fx.Node]:
    """What is computed entry by entry from ``weight`` and inputs of the graph alone, and is as large."""
    found = [weight]
    for node in found:
        for user in node.users:
            others = [source for source in user.all_input_nodes if source not in found]
            alone = all(source.op == "placeholder" and not _is_tangent(source) for source in others)
            if user not in found and alone and _is_entry_by_entry(user, weight):
                found.append(user)
    return found[1:]


def _is_tangent(node: fx.Node) -> bool:
    return node.name.startswith("tangents")


def _is_entry_by_entry(node: fx.Node, weight: fx.Node) -> bool:
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
        return False
    same_size = isinstance(val(node), torch.Tensor) and val(node).numel() == val(weight).numel()
    random = torch.Tag.nondeterministic_seeded in op.tags
    copies = op in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
    return same_size and not random and (copies or op.is_view or torch.Tag.pointwise in op.tags)


def mark_seen(graph: fx.Graph) -> None:
    """What is left to do where the passes are switched off: nobody is to be warned that they did not run."""
    for node in calls(graph, UNPACK):
        node.args = (*node.args[:8], False)
