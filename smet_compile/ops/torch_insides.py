"""Contains all that depends on private names of torch, so that a new version of torch is adapted to in one file.

A torch that lacks a private name breaks the feature that needs it, not the import. Importing this imports no compiler.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_BELOW = ("CPU", "CUDA")
"""Dispatch keys at which only the op's own implementation is left to call."""
PackAndUnpack = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def register_autograd(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None,
    implementation: Callable[..., Any],
) -> None:
    """Does what ``torch.library.register_autograd`` does, with a short cut where no gradient is recorded.

    torch's version goes through the dispatcher twice, which takes longer than the op itself on a small weight. Where
    nothing traces or wraps the call, ``implementation`` is called directly.
    """
    try:
        from torch._library.autograd import Info, make_autograd_impl

        generated = make_autograd_impl(
            getattr(torch.ops.smet, name.removeprefix("smet::")).default, Info(backward, setup_context)
        )
        ends_here: dict[int, bool] = {}
        after, not_counting = torch._C._after_autograd_keyset, torch._C.DispatchKey.ADInplaceOrView
    except (ImportError, AttributeError):
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        return

    def call(keyset: Any, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in args)):
            raw = keyset.raw_repr()
            direct = ends_here.get(raw)
            if direct is None:
                key = (keyset & after).remove(not_counting).highestPriorityTypeId()
                direct = ends_here[raw] = key.name in _BELOW
            if direct:
                return implementation(*args)
        return generated(keyset, *args)

    library.impl(name, call, "Autograd", with_keyset=True)


def is_exporting() -> bool:
    """Tells whether ``torch.export`` or ``torch.onnx`` is tracing.

    Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for true in every compiled function.
    """
    if torch.compiler.is_compiling():
        return bool(getattr(torch.compiler, "_is_exporting_flag", False))
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


_ORDINARY_KEYS = {
    *("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA"),
    "ADInplaceOrView",
}
_are_ordinary: dict[int, bool] = {}


def is_ordinary(tensor: Tensor) -> bool:
    """Tells whether ``tensor`` is plain memory of a CPU or a CUDA GPU, which a kernel can read at its address.

    False for subclasses, fake and meta tensors, sparse ones, lazy negations, those inside of ``torch.func``.
    """
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    try:
        keys = torch._C._dispatch_keys(tensor)
        raw = keys.raw_repr()
    except AttributeError:
        return False
    known = _are_ordinary.get(raw)
    if known is None:
        names = repr(keys).partition("(")[2].rstrip(")").split(", ")
        known = _are_ordinary[raw] = _ORDINARY_KEYS.issuperset(names)
    return known


def reshape_new(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor that nobody else holds in another shape, which autograd does not take for a view."""
    reshaped: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return reshaped


def a_mode_sees_ops() -> bool:
    """Tells whether a ``TorchDispatchMode`` is in force."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_traced_or_transformed() -> bool:
    """Tells whether somebody has to see the calls of torch functions as they are written.

    That is so under ``torch.jit.trace``, a ``torch.func`` transform, forward-mode AD, a ``TorchFunctionMode`` other
    than that of a default device, and while parametrizations are cached.
    """
    try:
        return bool(
            torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
            or torch.autograd.forward_ad._current_level >= 0
            or torch.nn.utils.parametrize._cache_enabled
            or (torch._C._len_torch_function_stack() and _a_mode_sees_functions())
        )
    except AttributeError:
        return True


def read_once(module: torch.nn.Module, name: str, read: Callable[[], Any]) -> Any:
    """Returns ``read()``; within ``torch.nn.utils.parametrize.cached()`` what it returned at the first read there."""
    if not torch.nn.utils.parametrize._cache_enabled:
        return read()
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    cache: Any = torch.nn.utils.parametrize._cache
    key = id(module), name
    if cache.get(key) is None:
        cache[key] = read()
    return cache[key]


def _a_mode_sees_functions() -> bool:
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, torch.utils._device.DeviceContext) for mode in modes)


def saved_tensor_hooks_in_force() -> PackAndUnpack | None:
    """Returns the innermost saved-tensor hooks of this thread; None where there are none."""
    autograd: Any = torch._C._autograd
    hooks: PackAndUnpack | None = autograd._top_saved_tensors_default_hooks(False)
    return hooks


def saved_tensor_hooks_are_enabled() -> bool:
    """Tells whether autograd accepts saved-tensor hooks now."""
    autograd: Any = torch._C._autograd
    return bool(autograd._saved_tensors_hooks_is_enabled())


def is_in_backward() -> bool:
    """Tells whether autograd runs a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def after_backward(callback: Callable[[], None]) -> None:
    """Calls ``callback`` now, or at the end of the backward that autograd runs in this thread."""
    if not is_in_backward():
        callback()
        return
    variable: Any = torch.autograd.Variable
    variable._execution_engine.queue_callback(callback)


def run_first_in_backward(tensor: Tensor) -> None:
    """Makes autograd run the node that made ``tensor`` before all others that are ready.

    Autograd runs the node that was made last first. A sink is made before all layers, so its node would run after all
    of them, and every layer's gradient would wait for it in memory.
    """
    if tensor.grad_fn is not None:
        tensor.grad_fn._set_sequence_nr(2**62)  # type: ignore[attr-defined]


def traced_readers(tensor: Tensor) -> set[str]:
    """Returns the names of the ops that read ``tensor`` in the graph that AOTAutograd traces, if it does."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    if mode is None:
        return set()
    inner = getattr(tensor, "elem", tensor)
    traced: Any = torch._from_functional_tensor(inner) if torch._is_functional_tensor(inner) else inner
    slot: Any = get_proxy_slot(traced, mode.tracer)
    return {str(user.target) for user in slot.proxy.node.users}


def replace_data(parameter: Tensor, data: Tensor) -> None:
    """Gives a parameter data of another shape, which backward then expects of its gradient.

    ``parameter.data = data`` alone keeps the node that accumulates the gradient as long as an old graph is alive, and
    that node expects the old shape. torch makes a new node only for another dtype, so there is one in between. The
    version is raised, for those who compare it.
    """
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data
    if not parameter.is_inference():
        torch.autograd.graph.increment_version(parameter)


def keep_address(tensor: Tensor) -> None:
    """Tells the compiler that a tensor stays where it is, so that a CUDA graph uses it in place and not a copy.

    A graph would change the copy alone. Where a tensor has moved after all, inductor records a new graph.
    """
    from torch._dynamo import mark_static_address

    mark_static_address(tensor, guard=False)


def multiplies_bf16_in_tiles() -> bool:
    """Tells whether the processor has AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def multiplies_on_cpu(dtype: torch.dtype) -> bool:
    """Tells whether the CPU multiplies matrices of a 16-bit dtype by instructions for it, which torch then calls.

    Otherwise torch's product of such matrices takes several times as long as one of fp32, up to fifty.
    """
    of_library = torch.ops.mkldnn
    asks = {torch.bfloat16: of_library._is_mkldnn_bf16_supported, torch.float16: of_library._is_mkldnn_fp16_supported}
    return bool(asks[dtype]())


def save_without_check(tensors: Iterable[Tensor]) -> None:
    """Lets tensors that a traced graph saves for backward change in place before its backward runs.

    AOTAutograd reads this mark of tensors that an ``autograd.Function`` keeps on its context by itself.
    """
    if "torch.fx.experimental.proxy_tensor" not in sys.modules:  # nothing is traced yet, and it is slow to import
        return
    from torch.fx.experimental.proxy_tensor import _get_proxies

    for proxy in (proxy for tensor in tensors for proxy in _get_proxies(tensor)):
        proxy.node.meta["saved_tensor_with_no_vc_check"] = True


def address_of_storage(tensor: Tensor) -> int:
    """Returns a number that no other living storage has."""
    return tensor.untyped_storage()._cdata


NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl
"""As ``__torch_function__`` of a subclass of Tensor, it makes results of torch functions plain tensors."""


@contextmanager
def without_compiled_autograd() -> Iterator[None]:
    """Runs backward by autograd itself, also where torch's compiled autograd is on."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is None or not compiled.compiled_autograd_enabled:
        yield
        return
    with compiled._disable():
        yield


class RefusedInGraph(ValueError, AssertionError):
    """Refuses what a compiled function asks for. Dynamo wraps every other ValueError in an error of its own."""


_BRANCHES = {"map": "map", "map_impl": "map", "cond": "cond", "while_loop": "while_loop", "scan": "scan"}
_BRANCHES["associative_scan"] = "associative_scan"
"""The name of each operator that runs a function never, once or often: by the name that Dynamo gives it."""


def refuse_branches(name: str, message: str) -> bool:
    """Raises ValueError where Dynamo traces the body of a branch or a loop to compile it; call it while Dynamo traces.

    In eager mode these operators trace the body too, and run it op by op.

    Args:
        name: that of a weight, for the error. message: what the error says, with {} for the operator.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    traced = InstructionTranslator.current_tx().output
    tracer: Any = None if _runs_eagerly(traced.compiler_fn) else traced.current_tracer
    while tracer is not None:
        operator = _BRANCHES.get(str(getattr(tracer, "source_target", None)))
        if operator is not None:
            raise RefusedInGraph(f"{name}: {message.format(f'torch.{operator}')}")
        tracer = tracer.parent
    return True


def _runs_eagerly(backend: Any) -> bool:
    while (inner := getattr(backend, "_torchdynamo_orig_backend", getattr(backend, "compiler_fn", None))) is not None:
        backend = inner
    name = str(getattr(backend, "__qualname__", "")).partition(".")[0]
    is_torch = getattr(backend, "__module__", None) == "torch._dynamo.backends.debugging"
    return is_torch and name in ("eager", "make_eager_backend_with_torch_function_modes")


refuse_branches._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, and does not trace it


Function = TypeVar("Function", bound=Callable[..., Any])
_not_prepared: list[Callable[[], Any]] = []


def outside_graphs(advice: str) -> Callable[[Function], Function]:
    """Marks a function as one that a compiled function calls in eager mode, between two graphs.

    Args:
        advice: what the error says where no graph may end (``fullgraph=True``).
    """

    def mark(function: Function) -> Function:
        untraced: list[Callable[..., Any]] = []

        def disable() -> None:
            if not untraced:
                untraced.append(torch.compiler.disable(function, reason=advice))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not untraced:
                disable()
            return untraced[0](*args, **kwargs)

        _not_prepared.append(disable)
        return call  # type: ignore[return-value]

    return mark


def prepare() -> None:
    """Imports the compiler for functions marked by ``outside_graphs``, so that their first call may be traced."""
    while _not_prepared:
        _not_prepared.pop()()


_warned: set[str] = set()


def warn_once(message: str, key: str | None = None) -> None:
    """Gives a ``UserWarning`` once in a process for ``key``, the message itself by default.

    Call it before anything is computed or changed. Where warnings are errors it raises, except in a backward: there
    other weights may have been updated already, so the warning is shown instead.
    """
    if (key or message) in _warned:
        return
    _warned.add(key or message)
    try:
        warnings.warn(message, stacklevel=3)
    except UserWarning as error:
        if not is_in_backward():
            raise
        warnings.showwarning(error, UserWarning, __file__, 0)


def fp32_precision() -> str:
    """Returns ``torch.backends.cuda.matmul.fp32_precision``, eight times as fast."""
    precision: str = torch._C._get_fp32_precision_getter("cuda", "matmul")
    return precision
