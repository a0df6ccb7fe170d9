"""fuse_update: the update takes the two factors of a gradient in place of the gradient, where the gradient is made.

    grad = sampled_matmul(gy, x, ...)                    gx = masked_matmul(gy, values, ...)
    gx = masked_matmul(gy, values, ...)            →     sampled_update_(values, gy, x, ..., slots, ...)
    ...                                                  ...
    update_(values, grad, slots, ...)

Fires where a training step was compiled with its update (``compile_train_step``). Autograd runs the updates after all
else, with every gradient waiting for its own: here each moves up to its gradient, behind the last reader of the old
values, so that the update may be done in place. Where the gradient is one product that nothing else reads, the product
goes into the update, and a kernel can update each block as its gradient is summed up: gradient bytes zero.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from smet_compile.passes.graph import SAMPLED, PassReport, arguments, aten, is_call, updated, val
from smet_compile.passes.updates import FUNCTIONALIZED, SAMPLED_UPDATE, TORCH_OPTIM, UPDATE, updates
from smet_compile.passes.weight_views import CONVERT


def fuse_update(graph: fx.Graph) -> PassReport:
    report = PassReport("fuse_update")
    for update in updates(graph, UPDATE, TORCH_OPTIM):
        _read_bases(update)
        product = _product(update.kwargs["grad"]) if update.args[0] is UPDATE else None
        if product is not None:
            update = _take(product, update)
            report.matched += 1
        elif update.args[0] is UPDATE:
            reason = "its gradient is no single product, or is read by others too"
            report.skipped.append((str(update.kwargs["topology"]), reason))
        _move_up(update)
    graph.eliminate_dead_code()
    return report


def _read_bases(update: fx.Node) -> None:
    """What is changed is the input of the graph, not an alias of it."""
    aliases = [base for base in update.kwargs["_all_bases"] if is_call(base, aten.alias.default)]
    for alias in aliases:
        update.replace_input_with(alias, alias.args[0])
        if not alias.users:
            update.graph.erase_node(alias)


def _product(grad: Any) -> fx.Node | None:
    """The product that ``grad`` is, through a conversion to the dtype of the values; the update converts too."""
    if len(grad.users) == 1 and is_call(grad, *CONVERT) and val(grad.args[0]).is_floating_point():
        grad = grad.args[0]
    return grad if is_call(grad, SAMPLED) and len(grad.users) == 1 else None


def _take(product: fx.Node, update: fx.Node) -> fx.Node:
    """The update with the factors of ``product`` in place of the gradient."""
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
    """To where the gradient is known and the old values are read no more."""
    values = updated(update)["values"]
    gradient: list[Any] = [update.kwargs[name] for name in ("grad", "left", "right") if name in update.kwargs]
    latest = max([*gradient, *_readers(values, update)])
    for node in [*_small_inputs(update, latest), update]:
        latest.append(node)
        latest = node


def _readers(values: fx.Node, update: fx.Node) -> list[fx.Node]:
    """What reads the old values, itself or through a conversion."""
    found = []
    for user in values.users:
        if user is update or is_call(user, aten.copy_.default):
            continue
        found.append(user)
        if is_call(user, *CONVERT, aten.alias.default):
            found += _readers(user, update)
    return found


def _small_inputs(update: fx.Node, latest: fx.Node) -> list[fx.Node]:
    """What the update needs that comes after ``latest`` (its step count plus one), in order."""
    needed: set[fx.Node] = set()
    waiting = [update]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if latest < source and source not in needed:
                needed.add(source)
                waiting.append(source)
    return sorted(needed)
