"""Says why gradients have to be kept until the optimizer's step, where an update in backward would miss something.

A hook on a parameter sees or changes its gradient, and so does a hook that runs before the optimizer's step. Neither
would find a gradient that was used and freed in backward.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from smet_compile.ops.scaled_steps import scales_steps

_PACKAGE = __name__.partition(".")[0]


def why_all_are_kept(optimizer: Optimizer) -> str | None:
    """Says why ``optimizer`` needs all gradients at its step; None where it does not.

    A hook that torch runs before the steps of all optimizers is no reason: it may look on, as a profiler does.
    """
    if scales_steps(optimizer):
        return "correct_gradients scales the finished steps of the optimizer"
    foreign = [hook for hook in optimizer._optimizer_step_pre_hooks.values() if not _is_ours(hook)]
    if foreign:
        return f"the hook {_name(foreign[0])} runs before the optimizer's step, and may read or change gradients"
    return None


def why_kept(values: Tensor) -> str | None:
    """Says why the gradient of one parameter is kept; None where it need not be."""
    hooks = hooks_of(values)
    if hooks:
        return f"the hook {_name(hooks[0])} on the parameter may read or change its gradient"
    if values.grad is not None:
        return "it has a gradient already"
    return None


def hooks_of(values: Tensor) -> list[Any]:
    """Returns the hooks that torch runs with the gradient of a parameter."""
    both: tuple[Any, ...] = values._backward_hooks, getattr(values, "_post_accumulate_grad_hooks", None)
    return [hook for hooks in both for hook in (hooks or {}).values()]


def _is_ours(hook: Any) -> bool:
    """Tells whether a hook is one of this library's, which know of updates in backward."""
    return str(getattr(_function_of(hook), "__module__", "")).partition(".")[0] == _PACKAGE


def _name(hook: Any) -> str:
    function = _function_of(hook)
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _function_of(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook
