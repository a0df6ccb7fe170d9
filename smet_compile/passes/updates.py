"""The optimizer's updates in a graph. Functionalization has wrapped them: what they change comes out as a result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from smet_compile.passes.graph import PACK, SAMPLED, aten, calls, is_call, smet
from smet_compile.passes.weight_views import CONVERT

FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
ACTIVE_ADAMW, TORCH_OPTIM = smet.active_adamw_.default, smet.torch_optim_.default
SAMPLED_ACTIVE_ADAMW = smet.sampled_active_adamw_.default


def updates(graph: fx.Graph, *ops: object) -> list[fx.Node]:
    """The calls of ``ops``, functionalized."""
    return [node for node in calls(graph, FUNCTIONALIZED) if node.args[0] in ops]


def updated_sites(graph: fx.Graph) -> Iterator[tuple[str, bool]]:
    """(name of the node that holds its topology, whether it takes the product) for each site updated in ``graph``."""
    for node in updates(graph, SAMPLED_ACTIVE_ADAMW):
        yield str(node.kwargs["topology"].name), True
    for node in updates(graph, ACTIVE_ADAMW, TORCH_OPTIM):
        source = _gradient(node.kwargs["grad"])
        if source is not None:
            yield source, False


def _gradient(node: fx.Node) -> str | None:
    """The topology of the site whose gradient ``node`` is."""
    if is_call(node, SAMPLED):
        return str(node.args[2].name)
    if is_call(node, PACK):
        return str(node.args[1].name)
    if is_call(node, aten.add.Tensor, *CONVERT):
        return _gradient(node.args[0])
    return None
