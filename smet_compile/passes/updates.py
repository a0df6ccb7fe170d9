"""The optimizer's updates in a graph. Functionalization has wrapped them: what they change comes out as a result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from smet_compile.ops.choose import update_kernel_of
from smet_compile.ops.updates import NAMES, traced
from smet_compile.passes.graph import PACK, SAMPLED, arguments, aten, calls, is_call, smet, updated, val
from smet_compile.passes.weight_views import CONVERT

FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
UPDATE, TORCH_OPTIM = smet.update_.default, smet.torch_optim_.default
SAMPLED_UPDATE = smet.sampled_update_.default


def updates(graph: fx.Graph, *ops: object) -> list[fx.Node]:
    """The calls of ``ops``, functionalized."""
    return [node for node in calls(graph, FUNCTIONALIZED) if node.args[0] in ops]


def updated_sites(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """(name of the node that holds its topology, the update) for each site updated in ``graph``."""
    for node in updates(graph, SAMPLED_UPDATE):
        yield str(node.kwargs["topology"].name), node
    for node in updates(graph, UPDATE, TORCH_OPTIM):
        source = _gradient(node.kwargs["grad"])
        if source is not None:
            yield source, node


def _gradient(node: fx.Node) -> str | None:
    """The topology of the site whose gradient ``node`` is."""
    if is_call(node, SAMPLED, PACK):
        return str(arguments(node)["topology"].name)
    if is_call(node, aten.add.Tensor, *CONVERT):
        return _gradient(node.args[0])
    return None


def kernel_of(update: fx.Node) -> str:
    """Returns the kernel that will make this update, a call of ``update_`` or ``sampled_update_``."""
    found = {name: fx.node.map_arg(value, val) for name, value in updated(update).items() if name in NAMES}
    found["grad"] = found["values"]  # a gradient has the dtype of its weight
    return update_kernel_of(traced(found), is_traced=True).name
