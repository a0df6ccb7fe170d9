"""Prepares updates that are made within the backward pass: for each optimizer, the op and arguments of a sink."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from smet_compile.ops import captures, following
from smet_compile.ops.choose import update_kernel_of
from smet_compile.ops.gate import is_traced
from smet_compile.ops.optimizers import inner_optimizers
from smet_compile.ops.sinks import ADAM_OPTIONS, SGD_OPTIONS, counts_of
from smet_compile.ops.torch_insides import keep_address
from smet_compile.ops.updates import Update, flatten
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.rates import Options, Rates


class BackwardUpdate(NamedTuple):
    """Holds one parameter's update in backward, prepared outside the compiled step.

    Args:
        sink: the op that opens the sink. arguments: its arguments after the leaf and the values.
        num_updates, num_skipped: int64 scalars that the update raises, by one and by the number of skipped blocks.
        made_state: whether the optimizer's state for the parameter was made for this update.
    """

    sink: Any
    arguments: tuple[Any, ...]
    num_updates: Tensor
    num_skipped: Tensor
    made_state: bool


class MakeUpdate(Protocol):
    """Makes the update of one parameter in backward."""

    def __call__(self, values: nn.Parameter, group: dict[str, Any]) -> BackwardUpdate: ...

    def forget(self, values: nn.Parameter) -> None:
        """Deletes the state that was made for an update that did not happen."""


def updates_of(optimizer: Optimizer) -> MakeUpdate | None:
    """Returns a function that makes updates of ``optimizer`` in backward; None where gradients have to be kept.

    Raises ValueError for an optimizer that a compiled step does not support.
    """
    if isinstance(optimizer, ActiveOptimizer):
        return _Active(optimizer)
    if type(optimizer) in (Adam, AdamW):
        return _TorchOptim(optimizer, "adam", _new_adam_state, _describe_adam) if _is_plain(optimizer) else None
    if type(optimizer) is SGD:
        return _TorchOptim(optimizer, "sgd", _new_sgd_state, _describe_sgd) if _is_plain(optimizer) else None
    inside = [name for name, _ in inner_optimizers(optimizer)]
    advice = f"pass the optimizer in its attribute {inside[0]!r}, or train" if inside else "train"
    raise ValueError(
        "optimizer: expected an active optimizer (ActiveAdamW, ...), or AdamW, Adam or SGD of torch.optim, got "
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; {advice} it with loss.backward() and "
        "optimizer.step()"
    )


def _is_plain(optimizer: Optimizer) -> bool:
    """Tells whether the step can be made here: one that is differentiable or capturable is left to torch."""
    return not any(group.get("differentiable") or group.get("capturable") for group in optimizer.param_groups)


class _Addresses:
    """Remembers the tensors of each parameter's update and where they lie, until a state is loaded or resized."""

    def __init__(self) -> None:
        self._known: dict[nn.Parameter, tuple[str, list[tuple[weakref.ref[Tensor], int]]]] = {}

    def are_new(self, values: nn.Parameter, tensors: Iterable[Tensor], settings: str = "") -> bool:
        """Tells whether a tensor is another or has moved, or the settings are others; if so, marks the tensors.

        A graph would change a copy of a tensor that is not marked, and lose the change.
        """
        if is_traced(values):
            return False
        tensors, (known_settings, known) = list(tensors), self._known.get(values, ("", []))
        if settings == known_settings and len(tensors) == len(known):
            pairs = zip(tensors, known, strict=True)
            if all(tensor is which() and tensor.data_ptr() == address for tensor, (which, address) in pairs):
                return False
        for tensor in tensors:
            keep_address(tensor)
        self._known[values] = settings, [(weakref.ref(tensor), tensor.data_ptr()) for tensor in tensors]
        return True


def _prepare(update: Update) -> None:
    """Makes what the kernel of an update keeps on the device, which must not lie in the memory of a graph."""
    kernel = update_kernel_of(update)
    if "prepare_update" in kernel.functions:
        kernel.function("prepare_update")(update)


class _Active:
    """Makes updates of an ``ActiveOptimizer``."""

    def __init__(self, optimizer: ActiveOptimizer) -> None:
        self._optimizer = optimizer
        self._rates = Rates()
        self._addresses = _Addresses()

    def __call__(self, values: nn.Parameter, group: dict[str, Any]) -> BackwardUpdate:
        following.check_state(self._optimizer)
        self._optimizer.check_parameter(values)
        made_state = not self._optimizer.state.get(values)
        update = self._optimizer.update_of(values, group)
        update = dataclasses.replace(update, lr=self._rates.rate(group, values.device), prepared={})
        arguments, counts = flatten(update), (update.step, update.num_skipped)
        if self._addresses.are_new(values, [update.lr, *update.tensors()], arguments[-1]):
            _prepare(update)
        return BackwardUpdate(torch.ops.smet.update_sink, arguments, *counts, made_state)

    def forget(self, values: nn.Parameter) -> None:
        del self._optimizer.state[values]


@dataclass(frozen=True)
class _TorchOptim:
    """Makes updates of Adam, AdamW or SGD of ``torch.optim``, on their own state; makes that where there is none."""

    optimizer: Optimizer
    rule: str
    new_state: Callable[[nn.Parameter, dict[str, Any]], dict[str, Tensor]]
    describe: Callable[[dict[str, Any], dict[str, Any]], Any]
    rates: Rates = field(default_factory=Rates)
    options: Options = field(default_factory=Options)
    addresses: _Addresses = field(default_factory=_Addresses)
    counts: dict[nn.Parameter, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, values: nn.Parameter, group: dict[str, Any]) -> BackwardUpdate:
        following.check_state(self.optimizer)
        new_state = {} if self.optimizer.state.get(values) else self.new_state(values, group)
        if new_state:
            captures.refuse_in_capture(values.device, "the optimizer's state")
            self.optimizer.state[values] = new_state
        if new_state or values not in self.counts:
            known = None if new_state else counts_of(self.optimizer).get(values)  # by another compiled step
            zero = torch.zeros((), dtype=torch.int64, device=values.device)
            new = zero + (not new_state), zero
            self.counts[values] = new if known is None else (known.num_updates, known.num_skipped)
        counts = self.counts[values]
        tensors, options = self.describe(self.optimizer.state.get(values, {}), group)
        lr = group["lr"]
        dtype = lr.dtype if isinstance(lr, Tensor) else torch.float64  # it decides how results are rounded
        rate = self.rates.rate(group, torch.device("cpu"), dtype)
        self.addresses.are_new(values, [tensor for tensor in (*tensors, *counts) if tensor is not None])
        numbers = self.options.tensor(group, [float(option) for option in options])
        arguments = (*tensors, *counts, rate, self.rule, numbers)
        return BackwardUpdate(torch.ops.smet.torch_optim_sink, arguments, *counts, bool(new_state))

    def forget(self, values: nn.Parameter) -> None:
        del self.optimizer.state[values], self.counts[values]


def _new_adam_state(values: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    dtype = torch.float32 if group["fused"] else torch.promote_types(torch.float32, torch.get_default_dtype())
    state = {"step": torch.zeros((), dtype=dtype, device=values.device if group["fused"] else None)}
    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
    return state | {name: torch.zeros_like(values, memory_format=torch.preserve_format) for name in names}


def _describe_adam(state: dict[str, Any], group: dict[str, Any]) -> Any:
    known = {**group, "beta1": group["betas"][0], "beta2": group["betas"][1], "fused": bool(group["fused"])}
    known.setdefault("decoupled_weight_decay", False)
    tensors = (state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"), state["step"])
    return tensors, [known[name] for name in ADAM_OPTIONS]


def _new_sgd_state(values: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    if not group["momentum"]:
        return {}
    return {"momentum_buffer": torch.zeros_like(values, memory_format=torch.preserve_format)}


def _describe_sgd(state: dict[str, Any], group: dict[str, Any]) -> Any:
    known = {**group, "fused": bool(group["fused"])}
    return (state.get("momentum_buffer"), None, None, None), [known[name] for name in SGD_OPTIONS]
