"""Keeps the list of kernels and chooses one for each op, by device, dtype, block shape and density.

By default the first kernel of the list is taken that can compute the case and is profitable there.

``SMET_COMPILE_KERNEL`` forces one wherever it can be used: ``reference`` (``ops.law``), ``torch`` (``ops.plain``),
``cpu_tiles``, ``cpu_single``, ``cpu_expand``, ``cpu_rows``, ``cpu_adamw`` and ``cpu_scale`` (C++), ``triton_tiles``,
``triton_expand``, ``triton_adamw`` and, by its own name alone, ``triton_tma``; or one that was registered. ``cpu`` and
``triton`` stand for any whose name begins so. Where a forced kernel has the op but cannot compute the case, the default
is taken, and a warning names the case and the kernel used. ``triton_fused`` joins a weight gradient and its update in
one kernel where both are Triton's, and forces nothing else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from smet_compile.format import Topology
from smet_compile.format.arguments import described
from smet_compile.ops.default_kernels import DEFAULT_KERNELS, TRITON
from smet_compile.ops.environment import Variable
from smet_compile.ops.kernel import OPS, Case, Kernel, UpdateCase
from smet_compile.ops.torch_insides import warn_once
from smet_compile.ops.updates import Update

_VARIABLE = Variable("SMET_COMPILE_KERNEL")
_FAMILIES = ("cpu", "triton")
_FUSED = "triton_fused"


class _Registry:
    """Counts the changes of the list of kernels, so that a choice that was kept can be recognised as out of date."""

    version = 0


_registry = _Registry()
_kernels = list(DEFAULT_KERNELS)


def register_kernel(kernel: Kernel, before: str | None = None) -> None:
    """Adds a kernel to the list.

    Args:
        before: the name of the kernel to put it in front of; None to put it in front of all.

    Raises:
        ValueError: a name that is taken, an unknown ``before``, or an op that is not one of ``OPS``.
    """
    if not isinstance(kernel, Kernel):
        raise ValueError(f"kernel: expected a Kernel, got {described(kernel)}; make one of a name and functions")
    if not isinstance(kernel.name, str) or not kernel.name:
        raise ValueError(f"kernel: expected a name, got {described(kernel.name)}; pass a str")
    if any(kernel.name == other.name for other in _kernels):
        raise ValueError(f"kernel {kernel.name!r}: expected a name of its own, got one that is registered; rename it")
    unknown = kernel.functions.keys() - {*OPS, "prepare_update"}
    if unknown or not kernel.functions:
        raise ValueError(f"kernel {kernel.name!r}: expected functions for {', '.join(OPS)}, got {sorted(unknown)}")
    names = [other.name for other in _kernels]
    if before is not None and before not in names:
        raise ValueError(
            f"before: expected one of {', '.join(names)}, got {described(before)}; name a registered kernel"
        )
    _kernels.insert(0 if before is None else names.index(before), kernel)
    _chosen.cache_clear()
    _registry.version += 1


def unregister_kernel(name: str) -> None:
    """Takes back ``register_kernel``; a ValueError where there is no kernel of that name."""
    if not any(name == kernel.name for kernel in _kernels):
        known = ", ".join(kernel.name for kernel in _kernels)
        raise ValueError(f"name: expected one of {known}, got {described(name)}; name a registered kernel")
    _kernels[:] = [kernel for kernel in _kernels if kernel.name != name]
    _chosen.cache_clear()
    _registry.version += 1


def names() -> tuple[str, ...]:
    """Returns the values that ``SMET_COMPILE_KERNEL`` may have."""
    return (*(kernel.name for kernel in _kernels), *_FAMILIES, _FUSED)


def forced_kernel() -> str | None:
    """Returns the name in ``SMET_COMPILE_KERNEL``, None where it is not set. Raises ValueError for an unknown name."""
    name = _VARIABLE.text()
    if name is not None and name not in names():
        raise ValueError(
            f"{_VARIABLE.name}: expected one of {', '.join(names())}, got {name!r}; unset it to have one chosen"
        )
    return name


def kernel_of(op: str, case: Case) -> str:
    """Returns the name of the kernel that computes ``op``: unpack, pack, masked_matmul or sampled_matmul."""
    return _chosen(op, case, forced_kernel())[0].name


def compute(op: str, tensor: Tensor, topology: Topology, grouped: bool = False) -> Callable[..., Any]:
    """Returns the function that computes ``op`` on ``tensor``, and caches it in the topology."""
    key = (op, tensor.dtype, grouped, _VARIABLE.raw(), _registry.version)
    return topology.constant(key, lambda: _choose_and_warn(op, case_of(tensor, topology, grouped)).function(op))


def case_of(tensor: Tensor, topology: Topology, grouped: bool = False) -> Case:
    """Returns the case of an op on ``tensor``."""
    return Case(tensor.device, tensor.dtype, topology.layout, topology.num_active, grouped)


def update_kernel_of(update: Update, is_traced: bool = False) -> Kernel:
    """Returns the kernel that makes an optimizer step; warns where the forced kernel cannot."""
    case = UpdateCase(update, is_traced)
    kernel, message = _choose("update_all", case, forced_kernel())
    if message is not None and not is_traced:
        warn_once(message)
    return kernel


def update_all(updates: list[Update]) -> None:
    """Makes every update, with one call of each kernel for all updates that it was chosen for.

    An update caches the choice, which holds while its gradient is a plain tensor of the values' dtype and device.
    """
    token = (_registry.version, _VARIABLE.raw())
    by_kernel: dict[str, tuple[Kernel, list[Update]]] = {}
    for update in updates:
        grad, values = update.grad, update.values
        is_usual = type(grad) is Tensor and grad.dtype == values.dtype and grad.device == values.device
        known = update.prepared.get("kernel") if is_usual else None
        if known is not None and known[0] == token:
            kernel = known[1]
        else:
            kernel = update_kernel_of(update)
            if is_usual:
                update.prepared["kernel"] = (token, kernel)
        batch = by_kernel.get(kernel.name)
        if batch is None:
            batch = by_kernel[kernel.name] = (kernel, [])
        batch[1].append(update)
    for kernel, its_updates in by_kernel.values():
        kernel.function("update_all")(its_updates)


def fused_update(left: Tensor, offsets: Tensor | None, update: Update) -> Callable[..., None] | None:
    """Returns the function that computes a gradient and makes the update in one kernel; None where it takes two.

    Two are the default: no measurement shows yet that one wins. ``left`` is the left factor of the gradient.
    """
    assert update.topology is not None
    if forced_kernel() != _FUSED:
        return None
    case = case_of(left, update.topology, offsets is not None)
    product = _choose_and_warn("sampled_matmul", case).name
    if product == "triton_expand":  # the request is for one kernel, whichever product alone would be faster
        product = _chosen("sampled_matmul", case, "triton_tiles")[0].name
    if (product, update_kernel_of(update).name) != ("triton_tiles", "triton_adamw"):
        return None
    function: Callable[..., None] = importlib.import_module(f"{TRITON}.sampled_update").sampled_update
    return function


def _choose_and_warn(op: str, case: Case) -> Kernel:
    """Returns the kernel that computes ``op``; warns where the forced kernel cannot."""
    kernel, message = _chosen(op, case, forced_kernel())
    if message is not None:
        warn_once(message)
    return kernel


@functools.lru_cache(maxsize=4096)
def _chosen(op: str, case: Case, name: str | None) -> tuple[Kernel, str | None]:
    return _choose(op, case, name)


def _is_meant(kernel: str, name: str | None) -> bool:
    """Returns whether the environment's ``name`` stands for the kernel: its own, or that of its family."""
    return kernel == name or (name in _FAMILIES and kernel.startswith(f"{name}_"))


def _choose(op: str, case: Any, name: str | None) -> tuple[Kernel, str | None]:
    """Returns the kernel for a case, and a warning where ``name`` forces kernels that cannot compute it."""
    candidates = [kernel for kernel in _kernels if op in kernel.functions]
    named = [kernel for kernel in candidates if _is_meant(kernel.name, name)]
    able_named = [kernel for kernel in named if kernel.refusal(op, case) is None]
    able = able_named or [kernel for kernel in candidates if kernel.refusal(op, case) is None]
    kernel = next((kernel for kernel in able if kernel.is_profitable(case)), able[0])
    if able_named or not named:
        return kernel, None
    reasons = " and ".join(f"{refusing.name} {refusing.refusal(op, case)}" for refusing in named)
    task = "the optimizer step" if op == "update_all" else op
    return kernel, (
        f"{_VARIABLE.name}={name}: {kernel.name} computes {task} of {case.kind}, since {reasons}; name a kernel that "
        "can, or unset the variable"
    )
