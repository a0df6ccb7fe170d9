"""Updates within the backward pass: what each optimizer hands to the sink that consumes a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from smet_compile.ops.torch_optim import ADAM_OPTIONS, SGD_OPTIONS
from smet_compile.optim.active_adamw import ActiveAdamW


class Update(NamedTuple):
    """One parameter's update, made ready outside the compiled step.

    Args:
        sink: the op that opens the sink. arguments: what it takes after the leaf and the values.
        counts: number of updates and of skipped blocks, int64 scalars.
    """

    sink: Any
    arguments: tuple[Any, ...]
    counts: tuple[Tensor, Tensor]


MakeUpdate = Callable[[nn.Parameter, dict[str, Any]], Update]


def updates_of(optimizer: Optimizer) -> MakeUpdate | None:
    """How ``optimizer`` updates a parameter in backward; None where it cannot, and gradients have to be kept.

    Raises ValueError for an optimizer that a compiled step does not know.
    """
    if isinstance(optimizer, ActiveAdamW):
        return _ActiveAdamW(optimizer)
    if type(optimizer) in (Adam, AdamW):
        return _TorchOptim(optimizer, _adam) if _is_plain(optimizer) else None
    if type(optimizer) is SGD:
        return _TorchOptim(optimizer, _sgd) if _is_plain(optimizer) else None
    raise ValueError(
        "optimizer: expected ActiveAdamW, or AdamW, Adam or SGD of torch.optim, got "
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; train it with loss.backward() and "
        "optimizer.step()"
    )


def _is_plain(optimizer: Optimizer) -> bool:
    """A step that is differentiated, or captured with its step count on the GPU, is left to torch."""
    return not any(group.get("differentiable") or group.get("capturable") for group in optimizer.param_groups)


class _Rates:
    """One tensor per parameter group, so that a scheduler's change of the rate is no change of the graph.

    Of shape (1,): Dynamo traces the value of a 0-d float64 tensor too, and then everything once more without.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._of: dict[int, Tensor] = {}

    def rate(self, group: dict[str, Any], like: Tensor) -> Tensor:
        device = self._device or like.device
        key = id(group["params"])
        if key not in self._of:
            self._of[key] = torch.zeros(1, dtype=torch.float64, device=device)
        return self._of[key].copy_(group["lr"]) if isinstance(group["lr"], Tensor) else self._of[key].fill_(group["lr"])


@dataclass
class _ActiveAdamW:
    optimizer: ActiveAdamW

    def __post_init__(self) -> None:
        self._rates = _Rates(None)

    def __call__(self, values: nn.Parameter, group: dict[str, Any]) -> Update:
        self.optimizer.check_parameter(values)
        rate = self._rates.rate(group, values)
        exp_avg, exp_avg_sq, num_skipped, step, _, *rest = self.optimizer.update_arguments(values, group)
        arguments = (exp_avg, exp_avg_sq, num_skipped, step, rate, *rest)
        return Update(torch.ops.smet.active_adamw_sink, arguments, (step, num_skipped))


class _TorchOptim:
    """Adam, AdamW or SGD of ``torch.optim``: their state as they keep it, made where there is none yet."""

    def __init__(self, optimizer: Optimizer, describe: Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self._describe = describe
        self._rates = _Rates(torch.device("cpu"))
        self._counts: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    def __call__(self, values: nn.Parameter, group: dict[str, Any]) -> Update:
        state = self.optimizer.state[values]
        if values not in self._counts:
            trained_before = torch.tensor(int(len(state) > 0))
            self._counts[values] = trained_before, torch.zeros((), dtype=torch.int64, device=values.device)
        counts = self._counts[values]
        tensors, rule, options = self._describe(values, state, group)
        step = state.get("step", counts[0].new_zeros(()))
        arguments = (*tensors, step, *counts, self._rates.rate(group, values), rule, [float(x) for x in options])
        return Update(torch.ops.smet.torch_optim_sink, arguments, counts)


def _adam(values: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Any:
    if not state:
        on_device = {"device": values.device} if group["fused"] else {}
        state["step"] = torch.zeros((), dtype=torch.float32, **on_device)
        names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
        state.update({name: torch.zeros_like(values, memory_format=torch.preserve_format) for name in names})
    decoupled = group.get("decoupled_weight_decay", False)
    known = {**group, "beta1": group["betas"][0], "beta2": group["betas"][1], "decoupled": decoupled}
    known["fused"] = bool(group["fused"])
    tensors = (state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))
    return tensors, "adam", [known[name] for name in ADAM_OPTIONS]


def _sgd(values: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Any:
    if group["momentum"] and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(values, memory_format=torch.preserve_format)
    known = {**group, "fused": bool(group["fused"])}
    return (state.get("momentum_buffer"), None, None), "sgd", [known[name] for name in SGD_OPTIONS]
