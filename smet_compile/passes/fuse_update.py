"""Moves each update to where its gradient is computed, and replaces the gradient by its two factors.

    grad = sampled_matmul(gy, x, ...)                    gx = masked_matmul(gy, values, ...)
    gx = masked_matmul(gy, values, ...)            →     sampled_update_(values, gy, x, ..., slots, ...)
    ...                                                  ...
    update_(values, grad, slots, ...)

It applies to a step of ``compile_train_step``. Autograd traces the updates after everything else, so all gradients
would be in memory at once. Here each update moves up to just after its gradient and the last reader of the old values,
so that it can be done in place. Where the gradient is one product that nothing else reads, the product becomes part of
the update, and a kernel may update each block once its gradient is summed: then no gradient is in memory at all.

An update is a call of ``auto_functionalized_v2``: ``args[0]`` is the op, ``_all_bases`` the tensors that it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from smet_compile.ops.choose import update_kernel_of
from smet_compile.ops.updates import NAMES, make_traced
from smet_compile.passes.graph import (
    PACK,
    SAMPLED,
    SCALE_ROWS,
    PassReport,
    arguments,
    aten,
    calls,
    is_call,
    smet,
    updated,
    val,
)
from smet_compile.passes.weight_views import CONVERT

FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
UPDATE, TORCH_OPTIM = smet.update_.default, smet.torch_optim_.default
SAMPLED_UPDATE = smet.sampled_update_.default
_NO_SINGLE_PRODUCT = "its gradient is no single product, or is read by others too"


def fuse_update(graph: fx.Graph) -> PassReport:
    """Fuses each update with the product that its gradient is, if it is one, and moves it up."""
    report = PassReport("fuse_update")
    for update in updates(graph, UPDATE, TORCH_OPTIM):
        _read_bases(update)
        product = _product(update.kwargs["grad"]) if update.args[0] is UPDATE else None
        if product is not None:
            update = _with_factors(product, update)
            report.matched += 1
        elif update.args[0] is UPDATE:
            scaled = is_call(update.kwargs["grad"], SCALE_ROWS)
            reason = "its gradient is corrected for batch norm" if scaled else _NO_SINGLE_PRODUCT
            report.skipped.append((str(update.kwargs["topology"]), reason))
        _move_up(update)
    graph.eliminate_dead_code()
    return report


def _read_bases(update: fx.Node) -> None:
    """Makes an update change inputs of the graph themselves, where it would change aliases of them."""
    aliases = [base for base in update.kwargs["_all_bases"] if is_call(base, aten.alias.default)]
    for alias in aliases:
        update.replace_input_with(alias, alias.args[0])
        if not alias.users:
            update.graph.erase_node(alias)


def _product(grad: Any) -> fx.Node | None:
    """Returns the product that ``grad`` is, perhaps converted, since updates convert too; None where others read it."""
    if len(grad.users) == 1 and is_call(grad, *CONVERT) and val(grad.args[0]).is_floating_point():
        grad = grad.args[0]
    return grad if is_call(grad, SAMPLED) and len(grad.users) == 1 else None


def _with_factors(product: fx.Node, update: fx.Node) -> fx.Node:
    """Replaces the update by one that takes the factors of ``product`` instead of the gradient, and returns it."""
    factors = arguments(product)
    options: dict[str, Any] = {key: value for key, value in update.kwargs.items() if key != "grad"}
    options |= {name: factors[name] for name in ("left", "right", "offsets")}
    with update.graph.inserting_before(update):
        made = update.graph.call_function(FUNCTIONALIZED, (SAMPLED_UPDATE,), options)
    made.meta.update({key: value for key, value in update.meta.items() if key != "eager_input_vals"})
    update.replace_all_uses_with(made)
    update.graph.erase_node(update)
    return made


def _move_up(update: fx.Node) -> None:
    """Moves an update up to where the gradient is known and the old values are no longer read."""
    values = updated(update)["values"]
    gradient: list[Any] = [update.kwargs[name] for name in ("grad", "left", "right") if name in update.kwargs]
    latest = max([*gradient, *_readers(values, update)])
    for node in [*_small_inputs(update, latest), update]:
        latest.append(node)
        latest = node


def _readers(values: fx.Node, update: fx.Node) -> list[fx.Node]:
    """Returns the nodes that read the old values, directly or through a conversion."""
    found = []
    for user in values.users:
        if user is update or is_call(user, aten.copy_.default):
            continue
        found.append(user)
        if is_call(user, *CONVERT, aten.alias.default):
            found += _readers(user, update)
    return found


def _small_inputs(update: fx.Node, latest: fx.Node) -> list[fx.Node]:
    """Returns the inputs of the update that come after ``latest`` in the graph (step count plus one), in order."""
    needed: set[fx.Node] = set()
    waiting = [update]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if latest < source and source not in needed:
                needed.add(source)
                waiting.append(source)
    return sorted(needed)


def updates(graph: fx.Graph, *ops: object) -> list[fx.Node]:
    """Returns the functionalized calls of ``ops``."""
    return [node for node in calls(graph, FUNCTIONALIZED) if node.args[0] in ops]


def updated_sites(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """Yields (name of the node that holds its topology, the update) for each site that is updated in ``graph``."""
    for node in updates(graph, SAMPLED_UPDATE):
        yield str(node.kwargs["topology"].name), node
    for node in updates(graph, UPDATE, TORCH_OPTIM):
        topology = _topology_of_gradient(node.kwargs["grad"])
        if topology is not None:
            yield topology, node


def updated_tensors(graph: fx.Graph) -> set[str]:
    """Returns the names of the inputs of ``graph`` that hold values which it updates."""
    return {updated(node)["values"].name for node in updates(graph, SAMPLED_UPDATE, UPDATE, TORCH_OPTIM)}


def _topology_of_gradient(node: fx.Node) -> str | None:
    """Returns the name of the topology of the site whose gradient ``node`` is; None where it cannot be told."""
    if is_call(node, SAMPLED, PACK, SCALE_ROWS):
        return str(arguments(node)["topology"].name)
    if is_call(node, aten.add.Tensor, *CONVERT):
        return _topology_of_gradient(node.args[0])
    return None


def kernel_of(update: fx.Node) -> str:
    """Returns the kernel that will make this update, a call of ``update_`` or ``sampled_update_``."""
    found = {name: fx.node.map_arg(value, val) for name, value in updated(update).items() if name in NAMES}
    found["grad"] = found["values"]  # a gradient has the dtype of its weight
    return update_kernel_of(make_traced(found), is_traced=True).name
