"""Defines sinks: tensors that receive a weight's gradient in autograd and consume it at once, so that none is kept.

A sink is an expanded zero, which takes no memory. ``unpack`` takes it as an input and returns a gradient for it. All
reads of a weight share one sink, so autograd adds up their gradients before the sink's own backward runs. That backward
makes the optimizer's update of the values (update sinks, opened once in a step), or collects the dense gradient (growth
sinks, ``ops.growth``). A loss may use a parameter in another way too, as a penalty on ``model.parameters()`` does, with
a gradient that no sink gets. ``find_other_uses`` finds that, and the sink sends its own gradient on to the parameter.
Counts tell others what was done in backward. ``torch_optim_`` is the op for Adam and SGD of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from smet_compile.ops import updates
from smet_compile.ops.library import library
from smet_compile.ops.torch_insides import run_first_in_backward, traced_readers

ADAM_OPTIONS = ("beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize", "fused")
SGD_OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "fused")
"""The options of ``torch_optim_`` in their order; flags are 0 or 1."""
_STATE = (
    "Tensor{}? first, Tensor{}? second, Tensor{}? largest, Tensor{}? step, Tensor{} num_updates, Tensor{} num_skipped, "
    "Tensor lr, str rule, Tensor options"
)
_TORCH_OPTIM_SINK = "Tensor values, " + _STATE.replace("{}", "")


class _Update(NamedTuple):
    """Holds the arguments of ``torch_optim_``.

    Args:
        values, grad: of any one shape; ``values`` is updated.
        first, second, largest, step: exp_avg, exp_avg_sq, max_exp_avg_sq and step count, or the momentum buffer;
            None where the optimizer keeps none.
        num_updates: int64 scalar, raised by one; 0 where the state is new.
        num_skipped: raised by one where the gradient is not finite, which makes the topology manager wait. The update
            is made all the same, as in eager mode.
        lr: of shape (1,); float64 stands for a Python number. rule: "adam" or "sgd".
        options: the values of ``ADAM_OPTIONS`` or ``SGD_OPTIONS``, as float64 on the CPU. Numbers would be constants of
            the compiled graph, and a schedule of one (OneCycleLR cycles betas) would make a new graph in every step.
    """

    values: Tensor
    grad: Tensor
    first: Tensor | None
    second: Tensor | None
    largest: Tensor | None
    step: Tensor | None
    num_updates: Tensor
    num_skipped: Tensor
    lr: Tensor
    rule: str
    options: Tensor

    @property
    def numbers(self) -> list[float]:
        numbers: list[float] = self.options.tolist()
        return numbers

    @property
    def rate(self) -> Any:
        return self.lr.item() if self.lr.dtype == torch.float64 else self.lr.reshape(())


def torch_optim_(*arguments: Any) -> None:
    """Does what ``optimizer.step()`` does to one parameter. The arguments are the fields of ``_Update``."""
    update = _Update(*arguments)
    (_adam if update.rule == "adam" else _sgd)(update)
    update.num_updates.add_(1)
    update.num_skipped.add_(~update.grad.isfinite().all())


library.define(
    f"torch_optim_(Tensor(a!) values, Tensor grad, {_STATE.format(*(f'({x}!)' for x in 'bcdefg'))}) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # torch's own steps read rate and step count on the host, unless capturable
)
library.impl("torch_optim_", torch_optim_, "CompositeExplicitAutograd")


@torch.library.register_fake("smet::torch_optim_", lib=library)
def _(*args: Any) -> None:
    return None


def _adam(update: _Update) -> None:
    beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, fused = update.numbers
    assert update.first is not None and update.second is not None and update.step is not None
    adam(
        [update.values],
        [update.grad],
        [update.first],
        [update.second],
        [] if update.largest is None else [update.largest],
        [update.step],
        foreach=False,
        fused=bool(fused),
        amsgrad=bool(amsgrad),
        beta1=beta1,
        beta2=beta2,
        lr=update.rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(maximize),
        decoupled_weight_decay=bool(decoupled),
    )


def _sgd(update: _Update) -> None:
    """Updates by SGD. torch has no buffer before the first update, where ours is zero; with dampening that differs."""
    if update.first is None or not update.numbers[SGD_OPTIONS.index("dampening")]:
        _make_sgd_step(update, [update.first])
        return
    new_buffer: list[Tensor | None] = [None]
    first_step = update._replace(values=update.values.clone())
    _make_sgd_step(first_step, new_buffer)
    _make_sgd_step(update, [update.first])
    assert new_buffer[0] is not None
    for tensor, if_first in ((update.values, first_step.values), (update.first, new_buffer[0])):
        tensor.copy_(torch.where(update.num_updates == 0, if_first, tensor))


def _make_sgd_step(update: _Update, buffers: list[Tensor | None]) -> None:
    momentum, dampening, weight_decay, nesterov, maximize, fused = update.numbers
    sgd(
        [update.values],
        [update.grad],
        buffers,
        foreach=False,
        fused=bool(fused),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=update.rate,
        dampening=dampening,
        nesterov=bool(nesterov),
        maximize=bool(maximize),
    )


_COUNTS, _SENDS_ON = "_smet_update_counts", "_smet_sends_on"
_OPENS_A_SINK = "smet.new_"


def _zeros_like_values(leaf: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return values.new_zeros(()).expand(values.shape)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.inputs = inputs


def _no_gradients(ctx: Any) -> tuple[Any, ...]:
    """Returns None for the leaf and for each other input; for a list of tensors, a list of None."""
    return None, *([None] * len(value) if _is_tensor_list(value) else None for value in ctx.inputs)


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Tensor) for item in value)


def _update_by(op: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, *rest = ctx.inputs
    if getattr(ctx, _SENDS_ON, False):
        _, *to_others = _no_gradients(ctx)
        return grad, *to_others
    with torch.no_grad():
        getattr(torch.ops.smet, op)(values.detach(), grad, *rest)
    return _no_gradients(ctx)


def open_sink(name: str, *inputs: Any) -> Tensor:
    """Opens a new sink, whose backward runs as soon as its gradient is complete.

    The first input is what the sink depends on, since autograd runs the backward only of what needs a gradient.
    """
    sink: Tensor = getattr(torch.ops.smet, f"new_{name}")(*inputs)
    run_first_in_backward(sink)
    return sink


def define_sink(
    name: str,
    schema: str,
    choose: Callable[..., Tensor],
    make: Callable[..., Tensor],
    backward: Any,
    save: Callable[..., None] = save_inputs,
) -> None:
    """Defines a sink as two ops: ``name`` is composite and chooses the sink, ``new_`` + name has the backward.

    Args:
        choose: opens a sink, or returns one that is open already. make: makes the tensor.
        backward, save: those of ``torch.library.register_autograd``.
    """
    library.define(f"{name}(Tensor leaf, {schema}) -> Tensor")
    library.impl(name, choose, "CompositeImplicitAutograd")
    library.define(f"new_{name}(Tensor leaf, {schema}) -> Tensor")
    library.impl(f"new_{name}", make, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smet::new_{name}", make, lib=library)
    torch.library.register_autograd(f"smet::new_{name}", backward, setup_context=save, lib=library)


for _name, _op, _schema in (
    ("update_sink", "update_", updates.schema(between="", mutates=False)),
    ("torch_optim_sink", "torch_optim_", _TORCH_OPTIM_SINK),
):
    define_sink(_name, _schema, partial(open_sink, _name), _zeros_like_values, partial(_update_by, _op))


def _find_other_uses(loss: Tensor, parameters: list[Tensor], sinks: list[Tensor]) -> Tensor:
    """Makes the sink of a parameter that the loss uses in another way, too, send its gradient on and update nothing.

    It runs before any backward: in a compiled step while that is traced, which then has no update of such parameters.
    Uses without a gradient count there: a graph may compute them again in backward, after an update.
    """
    opened = {sink.grad_fn for sink in sinks}
    nodes: dict[Any, Any] = {}
    for parameter, sink in zip(parameters, sinks, strict=True):
        if not all(_OPENS_A_SINK in reader for reader in traced_readers(parameter)):
            setattr(sink.grad_fn, _SENDS_ON, True)
        nodes[get_gradient_edge(parameter).node] = sink.grad_fn
    waiting, seen = [loss.grad_fn], {loss.grad_fn, None}
    while waiting:
        node = waiting.pop()
        if node in nodes:
            setattr(nodes[node], _SENDS_ON, True)
        for source, _ in () if node is None or node in opened else node.next_functions:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return loss


library.define("find_other_uses(Tensor loss, Tensor[] parameters, Tensor[] sinks) -> Tensor")
library.impl("find_other_uses", _find_other_uses, "CompositeImplicitAutograd")
find_other_uses = torch.ops.smet.find_other_uses


@dataclass(frozen=True, eq=False)
class UpdateCounts:
    """Holds counts of the updates of one parameter in backward, as int64 scalars.

    Args:
        num_updates: the number of updates. Backward raises it in place.
        num_skipped: the number of blocks that these updates skipped, since a gradient was not finite; raised likewise.
        first_updates, first_skipped: copies of the two from before the first step that they counted.
    """

    num_updates: Tensor
    num_skipped: Tensor
    first_updates: Tensor
    first_skipped: Tensor


def counts_of(optimizer: Optimizer) -> dict[nn.Parameter, UpdateCounts]:
    """Returns the counts of every parameter that was updated in backward. A checkpoint does not contain them."""
    counts: dict[nn.Parameter, UpdateCounts] = optimizer.__dict__.setdefault(_COUNTS, {})
    return counts


def count_by(optimizer: Optimizer, parameter: nn.Parameter, num_updates: Tensor, num_skipped: Tensor) -> None:
    """Notes which tensors count the updates of ``parameter``. New tensors (a state was loaded) make new counts."""
    known = counts_of(optimizer).get(parameter)
    if known is None or known.num_updates is not num_updates or known.num_skipped is not num_skipped:
        first = num_updates.clone(), num_skipped.clone()
        counts_of(optimizer)[parameter] = UpdateCounts(num_updates, num_skipped, *first)
