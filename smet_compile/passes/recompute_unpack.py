"""recompute_unpack: no dense weight is saved for backward, whatever reads it.

    dense = unpack(values, ...)                     dense = unpack(values, ...)   # MUST_RECOMPUTE
    y = convolution(x, dense)            →          y = convolution(x, dense)
    gx = convolution_backward(gy, x, dense)         gx = convolution_backward(gy, x, dense)

The partitioner then unpacks again in backward instead of keeping ``dense``. Autograd has been traced when passes run,
so the sinks, which only autograd needs, are taken off as well.
"""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from smet_compile.passes.graph import UNPACK, PassReport, calls

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
        report.matched += 1
    return report


def mark_seen(graph: fx.Graph) -> None:
    """What is left to do where the passes are switched off: nobody is to be warned that they did not run."""
    for node in calls(graph, UNPACK):
        node.args = (*node.args[:8], False)
