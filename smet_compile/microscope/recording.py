"""Records the tensor ops of one forward: with fake tensors, or with real ones where the model looks at its data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map, tree_map_only

from smet_compile.tracing import leave_no_trace, run_op_by_op


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor of the forward: its number, shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """Holds one op. Tensors in ``args``, ``kwargs``, ``outputs`` are ``Ref``.

    Args:
        written: the arguments it wrote to. aliases: other tensors that share memory with those.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Ref]
    written: list[Ref]
    aliases: list[Ref]


@dataclass
class Recording:
    """Holds what one forward did.

    Args:
        calls: its ops, in order. inputs, outputs: tensors it was given and returned.
        state: parameters and buffers, by name.
        warning: why the ops are missing, or are only those of this very example; else empty.
    """

    calls: list[Call] = field(default_factory=list)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)
    state: dict[str, Ref] = field(default_factory=dict)
    warning: str = ""

    @property
    def is_complete(self) -> bool:
        return bool(self.outputs)


def record_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Records ``model(*args, **kwargs)``, in the mode the model is in; nothing changes.

    Where it calls an operator that runs functions (``torch.cond``, say), the ``Recording`` is incomplete, and says so.
    Where the forward needs data (reads a number out of a tensor, say), it is run for real: then the ops are those
    that this example took. A model on the meta device has no data, so its ``Recording`` is incomplete.
    """
    try:
        with _silent_fake_tensors():
            return _record_without_data(model, (args, kwargs))
    except NotFollowedError as error:
        return Recording(warning=str(error))
    except Exception as error:  # any error may come of missing data; if the forward is wrong, the real run says so
        reason = _reason(error)
    if any(tensor.is_meta for tensor in model.parameters()):
        return Recording(
            warning=f"the forward cannot run without data ({reason}), and on the meta device there are none"
        )
    state = {name: tensor.detach() for name, tensor in _state(model)}
    try:
        recording = _record(model, state, replace_tensors((args, kwargs), lambda tensor: tensor.detach().clone()))
    except NotFollowedError as error:
        return Recording(warning=str(error))
    real = f"the forward cannot run without data ({reason}): what feeds what is that of this example"
    recording.warning = "; ".join(filter(None, (recording.warning, real)))
    return recording


def _reason(error: BaseException) -> str:
    """Returns the op that needed data, where the error or one that it wraps says so; else the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if hasattr(cause, "func"):
            return str(cause.func)
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _silent_fake_tensors() -> Iterator[None]:
    """Keeps torch from logging what it could not do without data: the inspection says it in words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _record_without_data(model: nn.Module, example: Any) -> Recording:
    """Records on fake tensors. Those of meta tensors are where buffers have data, else on the CPU.

    Tensors that a forward makes are there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with_data = next((tensor.device for _, tensor in _state(model) if not tensor.is_meta), torch.device("cpu"))

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            device = with_data if tensor.is_meta else tensor.device
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    state = {name: fake(tensor) for name, tensor in _state(model)}
    return _record(model, state, replace_tensors(example, fake), mode)


def _record(model: nn.Module, state: dict[str, Tensor], example: Any, fake_mode: Any = None) -> Recording:
    recorder = Recorder()
    recording = Recording(recorder.calls, state={name: recorder.ref(tensor) for name, tensor in state.items()})
    recording.inputs = [recorder.ref(tensor) for tensor in tensors_in(example)]
    untouched = leave_no_trace(model, restore_buffers=fake_mode is None)
    with untouched, run_op_by_op(), fake_mode or nullcontext(), recorder:
        result = torch.func.functional_call(model, state, *example)
    returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]  # not those inside of a cache
    recording.outputs = [recorder.ref(tensor) for tensor in returned or tensors_in(result)]
    if not recording.outputs:
        recording.warning = "the forward returned no tensor, so what feeds what is not known"
    return recording


class NotFollowedError(Exception):
    """Names an operator whose functions are not looked into."""

    def __init__(self, operator: Any) -> None:
        super().__init__(
            f"the forward calls torch.{operator.name()}, which runs functions that the inspection does not follow, so "
            "what feeds what is not known"
        )


class Recorder(TorchDispatchMode):
    """Writes every op that runs under it into ``calls``, in order."""

    supports_higher_order_operators = True  # they are refused here, in words

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._refs: dict[int, tuple[Tensor, Ref]] = {}  # keeps each tensor, so that no other gets its id
        self._by_storage: dict[int, list[Ref]] = {}

    def ref(self, tensor: Tensor) -> Ref:
        """Returns what stands for ``tensor``, the same each time."""
        if id(tensor) not in self._refs:
            ref = Ref(len(self._refs), tuple(tensor.shape), tensor.dtype)
            self._refs[id(tensor)] = tensor, ref
            if tensor.layout == torch.strided:
                self._by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(ref)
        return self._refs[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise NotFollowedError(func)
        kwargs = kwargs or {}
        arg_refs, kwarg_refs = (tree_map_only(Tensor, self.ref, tree) for tree in (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [self.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = list(_written(func, args, kwargs)) if func._schema.is_mutable else []
        written = [self.ref(tensor) for tensor in tensors]
        self.calls.append(Call(func, arg_refs, kwarg_refs, outputs, written, self._aliases(tensors, written)))
        return result

    def _aliases(self, tensors: list[Tensor], written: list[Ref]) -> list[Ref]:
        storages = dict.fromkeys(t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided)
        return [ref for storage in storages for ref in self._by_storage.get(storage, []) if ref not in written]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yields the arguments that the op's schema calls written to; ``out=`` and lists of tensors as well."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in pytrees and in attributes of other objects: dataclasses, batches, graphs, caches."""
    seen: set[int] = set()
    for leaf in tree_leaves(tree):
        yield from _tensors_within(leaf, seen)


def _tensors_within(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    if isinstance(thing, Tensor | nn.Module | type) or id(thing) in seen:
        return
    seen.add(id(thing))
    parts = list(thing.values()) if isinstance(thing, Mapping) else list(getattr(thing, "__dict__", {}).values())
    parts += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    for part in (*parts, *(thing if isinstance(thing, list | tuple | set) else ())):
        yield from _tensors_within(part, seen)


def replace_tensors(tree: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of ``tree`` with other tensors that shares nothing a forward could write to (a cache, say)."""
    memo = {id(tensor): made for tensor in tensors_in(tree) for made in (make(tensor),)}
    return tree_map(lambda leaf: memo[id(leaf)] if isinstance(leaf, Tensor) else _copied(leaf, dict(memo)), tree)


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    if isinstance(leaf, nn.Module | type) or not hasattr(leaf, "__dict__"):
        return leaf
    try:
        return copy.deepcopy(leaf, memo)
    except Exception:  # an object that cannot be copied (a lock, an open file) is given as it is
        return leaf
