"""The one place that knows the kernels and chooses one for each op: by device, dtype, block shape and density.

``SMET_COMPILE_KERNEL`` names a kernel to use wherever it can be used: ``reference`` (the law), ``torch`` (plain
torch), ``cpu_tiles``, ``cpu_expand`` and ``cpu_adamw`` (C++), ``triton_tiles``, ``triton_expand`` and
``triton_adamw``, or one that was registered; or ``cpu`` or ``triton`` for any whose name begins so. Elsewhere the
first in the order of registration is taken that can compute the case and is profitable. A warning names each kind of
case that the named kernel has a function for and cannot compute, and what computes it instead.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.format.arguments import described
from smet_compile.ops.torch_insides import multiplies_bf16_in_tiles, warn_once
from smet_compile.ops.updates import Update

_VARIABLE = "SMET_COMPILE_KERNEL"
OPS = ("masked_matmul", "sampled_matmul", "unpack", "pack", "update_all")
"""The ops that a kernel may compute. ``sampled_update`` joins two of them in one kernel."""


class Case(NamedTuple):
    """Holds what a kernel of products or moves is chosen by.

    Args:
        grouped: tokens come sorted by matrix, with offsets.
    """

    device: torch.device
    dtype: torch.dtype
    layout: Layout
    num_active: int
    grouped: bool = False

    @property
    def density(self) -> float:
        return self.num_active / self.layout.num_blocks

    @property
    def kind(self) -> str:
        """Says what decides whether a kernel can compute it."""
        layout = self.layout
        blocks = "tiles" if layout.tiles else "single weights" if layout.single_weights else "runs"
        sorted_tokens = ", with tokens sorted by matrix," if self.grouped else ""
        return f"{self.dtype} {blocks}{sorted_tokens} on {self.device.type}"


class UpdateCase(NamedTuple):
    """Holds what a kernel of optimizer steps is chosen by; ``is_traced``: the tensors only stand for tensors."""

    update: Update
    is_traced: bool = False

    @property
    def kind(self) -> str:
        update = self.update
        slots = {str(slot.dtype) for slot in update.slots}
        state = f"{' and '.join(sorted(slots))} state" if slots else "no state"
        where = f"by the rule {update.rule.name} on {update.values.device.type}"
        return f"{update.values.dtype} parameters with {state} {where}"


def _takes_everything(op: str, case: Any) -> str | None:
    return None


def _always(case: Any) -> bool:
    return True


class Kernel(NamedTuple):
    """One way to compute some of the ops.

    Args:
        name: as ``SMET_COMPILE_KERNEL`` and ``explain`` know it.
        functions: op → the function, or "module:function" of one that is imported when it is first chosen. It takes
            what the functions of ``ops.plain`` of that name take.
        refusal: (op, case) → why it cannot compute a case; None where it can. The case is a ``Case``, or an
            ``UpdateCase`` for ``update_all``.
        is_profitable: (case) → whether it is faster there than the kernels after it.
    """

    name: str
    functions: dict[str, Callable[..., Any] | str]
    refusal: Callable[[str, Any], str | None] = _takes_everything
    is_profitable: Callable[[Any], bool] = _always

    def function(self, op: str) -> Callable[..., Any]:
        found = self.functions[op]
        if isinstance(found, str):
            module, name = found.split(":")
            found = self.functions[op] = getattr(importlib.import_module(module), name)
        return found


class _Registry:
    """Counts the changes of the list of kernels; whoever keeps a choice compares the count."""

    version = 0


_registry = _Registry()
_kernels: list[Kernel] = []


def register_kernel(kernel: Kernel, before: str | None = None) -> None:
    """Adds a kernel to those that are chosen from.

    Args:
        before: the name of a kernel that it goes before; None: before all.

    Raises:
        ValueError: a name that is taken, or that ``before`` does not find; an op that is not one of ``OPS``.
    """
    if not isinstance(kernel, Kernel):
        raise ValueError(f"kernel: expected a Kernel, got {described(kernel)}; make one of a name and functions")
    if not isinstance(kernel.name, str) or not kernel.name:
        raise ValueError(f"kernel: expected a name, got {described(kernel.name)}; pass a str")
    if any(kernel.name == other.name for other in _kernels):
        raise ValueError(f"kernel {kernel.name!r}: expected a name of its own, got one that is registered; rename it")
    unknown = kernel.functions.keys() - set(OPS)
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
    """Returns what ``SMET_COMPILE_KERNEL`` may be."""
    return (*(kernel.name for kernel in _kernels), "cpu", "triton")


def _environment() -> object:
    """Returns what the environment holds, to be compared alone: every op asks, and ``os.environ`` is slow to answer."""
    return _raw_environment.get(_raw_variable)


_raw_environment: Any = getattr(os.environ, "_data", os.environ)
_raw_variable: Any = os.environ.encodekey(_VARIABLE) if hasattr(os.environ, "_data") else _VARIABLE


def forced_kernel() -> str | None:
    """Returns the kernel that the environment names; None where it names none.

    Raises:
        ValueError: there is no kernel of that name.
    """
    name = os.environ.get(_VARIABLE) or None
    if name is not None and name not in names():
        raise ValueError(
            f"{_VARIABLE}: expected one of {', '.join(names())}, got {name!r}; unset it to have one chosen"
        )
    return name


def kernel_of(op: str, case: Case) -> str:
    """Returns the name of the kernel that computes ``op``: unpack, pack, masked_matmul or sampled_matmul."""
    return _chosen(op, case, forced_kernel())[0].name


def compute(op: str, tensor: Tensor, topology: Topology, grouped: bool = False) -> Callable[..., Any]:
    """Returns the function that computes ``op`` on ``tensor``; the topology keeps the choice."""
    key = (op, tensor.dtype, grouped, _environment(), _registry.version)
    return topology.constant(key, lambda: _reported(op, case_of(tensor, topology, grouped)).function(op))


def case_of(tensor: Tensor, topology: Topology, grouped: bool = False) -> Case:
    """Returns the case of an op on ``tensor``."""
    return Case(tensor.device, tensor.dtype, topology.layout, topology.num_active, grouped)


def update_kernel_of(update: Update, is_traced: bool = False) -> Kernel:
    """Returns the kernel that makes an optimizer step; warns where another one was named for it."""
    case = UpdateCase(update, is_traced)
    kernel, message = _choose("update_all", case, forced_kernel())
    if message is not None and not is_traced:
        warn_once(message)
    return kernel


def update_all(updates: list[Update]) -> None:
    """Makes every update by the kernel that suits it, one call of a kernel for all of its updates.

    The choice is kept with an update while its gradient is as those of before: of its dtype, plain, where it lies.
    """
    token = (_registry.version, _environment())
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
        found = by_kernel.get(kernel.name)
        if found is None:
            found = by_kernel[kernel.name] = (kernel, [])
        found[1].append(update)
    for kernel, its_updates in by_kernel.values():
        kernel.function("update_all")(its_updates)


def fused_update(left: Tensor, offsets: Tensor | None, update: Update) -> Callable[..., None] | None:
    """Returns the function that computes a gradient's blocks and updates by them as they are summed up.

    Returns None where that takes two kernels. ``left`` is the product's.
    """
    assert update.topology is not None
    product = _reported("sampled_matmul", case_of(left, update.topology, offsets is not None)).name
    if (product, update_kernel_of(update).name) != ("triton_tiles", "triton_adamw"):
        return None
    function: Callable[..., None] = importlib.import_module(f"{TRITON}.sampled_update").sampled_update
    return function


def _reported(op: str, case: Case) -> Kernel:
    """Returns the kernel that computes ``op``; warns where another one was named for it."""
    kernel, message = _chosen(op, case, forced_kernel())
    if message is not None:
        warn_once(message)
    return kernel


@functools.lru_cache(maxsize=4096)
def _chosen(op: str, case: Case, name: str | None) -> tuple[Kernel, str | None]:
    return _choose(op, case, name)


def _choose(op: str, case: Any, name: str | None) -> tuple[Kernel, str | None]:
    """Returns the kernel for a case, and a warning where it is none of those that ``name`` stands for."""
    candidates = [kernel for kernel in _kernels if op in kernel.functions]
    named = [kernel for kernel in candidates if name is not None and kernel.name.startswith(name)]
    able_named = [kernel for kernel in named if kernel.refusal(op, case) is None]
    able = able_named or [kernel for kernel in candidates if kernel.refusal(op, case) is None]
    kernel = next((kernel for kernel in able if kernel.is_profitable(case)), able[0])
    if able_named or not named:
        return kernel, None
    reasons = " and ".join(f"{each.name} {each.refusal(op, case)}" for each in named)
    what = "the optimizer step" if op == "update_all" else op
    return kernel, (
        f"{_VARIABLE}={name}: {kernel.name} computes {what} of {case.kind}, since {reasons}; name a kernel that can, "
        "or unset the variable"
    )


# The kernels of this library, the first choice first. Each is imported when it is first asked for.

NATIVE, TRITON, _PLAIN = "smet_compile.ops.kernels.native", "smet_compile.ops.kernels.triton", "smet_compile.ops"
_ONLY_CPU, _ONLY_TILES = "runs on the CPU only", "multiplies tiles only"
_ONLY_GPU = "needs Triton and a CUDA GPU of compute capability 8.0 or newer"
_NARROWEST_TILE = 16
_AMX_OVER_AVX512 = 4
"""How much faster a processor with AMX multiplies dense bf16 matrices than these kernels multiply tiles."""
_LANES = 16


def _functions(module: str, *ops: str) -> dict[str, Callable[..., Any] | str]:
    return {op: f"{module}:{op}" for op in ops}


def _refusal_of(module: str) -> Callable[[str, Any], str | None]:
    """Asks the function ``refusal`` of a module that needs a compiler, imported only then."""

    def refusal(op: str, case: Any) -> str | None:
        device = case.update.values.device if isinstance(case, UpdateCase) else case.device
        if device.type != "cpu":
            return _ONLY_CPU
        found: str | None = importlib.import_module(module).refusal(case)
        return found

    return refusal


def _refusal_of_triton(only_tiles: bool = False, grouped: bool = True) -> Callable[[str, Any], str | None]:
    def refusal(op: str, case: Any) -> str | None:
        from smet_compile.ops.kernels.triton.supports import runs_on, supports

        if only_tiles and not case.layout.tiles:
            return _ONLY_TILES
        if case.grouped and not grouped:
            return "does not take tokens sorted by matrix"
        if not runs_on(case.device):
            return _ONLY_GPU
        known = supports(op, case.device, case.dtype, case.layout, case.grouped)
        return None if known else f"does not compute {case.kind}"

    return refusal


def _refusal_of_triton_updates(op: str, case: UpdateCase) -> str | None:
    from smet_compile.ops.kernels.triton.supports import runs_on

    if not runs_on(case.update.values.device):
        return _ONLY_GPU
    found: str | None = importlib.import_module(f"{TRITON}.adamw").refusal(case)
    return found


def _triton_tiles_are_profitable(case: Case) -> bool:
    return min(case.layout.block_shape) >= _NARROWEST_TILE


def _cpu_tiles_are_profitable(case: Case) -> bool:
    """Tells where skipping blocks is faster than multiplying all of them at the processor's speed for dense ones."""
    filled = min(side / (-(-side // _LANES) * _LANES) for side in case.layout.block_shape)
    slower = _AMX_OVER_AVX512 if case.dtype == torch.bfloat16 and multiplies_bf16_in_tiles() else 1
    return case.density * slower < filled


_PRODUCTS, _MOVES = ("masked_matmul", "sampled_matmul"), ("unpack", "pack")
for _kernel in reversed(
    [
        Kernel(
            "triton_tiles",
            {
                **_functions(f"{TRITON}.matmul_tiles", "masked_matmul"),
                **_functions(f"{TRITON}.sampled_tiles", "sampled_matmul"),
            },
            _refusal_of_triton(only_tiles=True),
            _triton_tiles_are_profitable,
        ),
        Kernel(
            "triton_expand",
            {**_functions(f"{TRITON}.matmul_expanded", *_PRODUCTS), **_functions(f"{TRITON}.expand", *_MOVES)},
            _refusal_of_triton(grouped=False),
        ),
        Kernel("triton_adamw", _functions(f"{TRITON}.adamw", "update_all"), _refusal_of_triton_updates),
        Kernel(
            "cpu_tiles",
            _functions(f"{NATIVE}.tiles", *_PRODUCTS),
            _refusal_of(f"{NATIVE}.tiles"),
            _cpu_tiles_are_profitable,
        ),
        Kernel("cpu_expand", _functions(f"{NATIVE}.expand", *_PRODUCTS, *_MOVES), _refusal_of(f"{NATIVE}.expand")),
        Kernel("cpu_adamw", _functions(f"{NATIVE}.adamw", "update_all"), _refusal_of(f"{NATIVE}.adamw")),
        Kernel(
            "torch",
            _functions(f"{_PLAIN}.plain", *OPS),
        ),
        Kernel(
            "reference",
            {
                **_functions(f"{_PLAIN}.law", *_PRODUCTS, *_MOVES),
                **_functions(f"{_PLAIN}.law_of_updates", "update_all"),
            },
        ),
    ]
):
    register_kernel(_kernel)
