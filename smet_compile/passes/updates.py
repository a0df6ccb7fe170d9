"""The optimizer's updates in a graph. Functionalization has wrapped them: what they change comes out as a result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from smet_compile.ops.choose import update_kernel_of
from smet_compile.passes.graph import PACK, SAMPLED, aten, calls, is_call, smet, val
from smet_compile.passes.weight_views import CONVERT

FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
ACTIVE_ADAMW, TORCH_OPTIM = smet.active_adamw_.default, smet.torch_optim_.default
SAMPLED_ACTIVE_ADAMW = smet.sampled_active_adamw_.default


def updates(graph: fx.Graph, *ops: object) -> list[fx.Node]:
    """The calls of ``ops``, functionalized."""
    return [node for node in calls(graph, FUNCTIONALIZED) if node.args[0] in ops]


def updated_sites(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """(name of the node that holds its topology, the update) for each site updated in ``graph``."""
    for node in updates(graph, SAMPLED_ACTIVE_ADAMW):
        yield str(node.kwargs["topology"].name), node
    for node in updates(graph, ACTIVE_ADAMW, TORCH_OPTIM):
        source = _gradient(node.kwargs["grad"])
        if source is not None:
            yield source, node


def _gradient(node: fx.Node) -> str | None:
    """The topology of the site whose gradient ``node`` is."""
    if is_call(node, SAMPLED):
        return str(node.args[2].name)
    if is_call(node, PACK):
        return str(node.args[1].name)
    if is_call(node, aten.add.Tensor, *CONVERT):
        return _gradient(node.args[0])
    return None


def kernel_of(update: fx.Node) -> str:
    """The kernel that will make this update: of ``active_adamw_`` and ``sampled_active_adamw_``."""
    bases, kwargs = update.kwargs["_all_bases"], update.kwargs
    found: list[Any] = []
    for argument in update.args[0]._schema.arguments:
        number = kwargs.get(f"_{argument.name}_base_index")
        node = kwargs.get(argument.name) if number is None else bases[number]
        if argument.name not in ("grad", "left", "right", "offsets"):
            found.append(fx.node.map_arg(node, val))
    values, *rest = found
    return update_kernel_of((values, values, *rest), traced=True).name  # a gradient has the dtype of its weight
