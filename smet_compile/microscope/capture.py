"""Records the tensor ops of one forward: with fake tensors, or with real ones where the model looks at its data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Ref:
    """A tensor of the forward by number, with its shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One op. Tensors in ``args``, ``kwargs`` and ``outputs`` are ``Ref``; ``aliases``: other tensors it wrote to."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Ref]
    aliases: list[Ref]


@dataclass
class Capture:
    """What one forward did.

    Args:
        calls: its ops, in order. inputs, outputs: tensors it was given and returned. held: parameters and buffers,
            by name. not_captured: why the ops are missing or only those of this very example, in words; else empty.
    """

    calls: list[Call] = field(default_factory=list)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)
    held: dict[str, Ref] = field(default_factory=dict)
    not_captured: str = ""

    @property
    def complete(self) -> bool:
        return bool(self.outputs)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._refs: dict[int, tuple[Tensor, Ref]] = {}  # holds the tensor, so that its id stays its own
        self._by_storage: dict[int, list[Ref]] = {}

    def ref(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self._refs:
            ref = Ref(len(self._refs), tuple(tensor.shape), tensor.dtype)
            self._refs[id(tensor)] = tensor, ref
            if tensor.layout == torch.strided:
                self._by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(ref)
        return self._refs[id(tensor)][1]

    def refs(self, tree: Any) -> Any:
        return tree_map_only(Tensor, self.ref, tree)

    def _written_with(self, func: Any, args: tuple[Any, ...]) -> list[Ref]:
        written = [arg for arg, said in zip(args, func._schema.arguments, strict=False) if _is_written(arg, said)]
        return [
            ref
            for tensor in written
            for ref in self._by_storage.get(tensor.untyped_storage()._cdata, [])
            if ref != self.ref(tensor)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, named = self.refs(args), self.refs(kwargs)
        result = func(*args, **kwargs)
        outputs = [self.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        aliases = self._written_with(func, args) if func._schema.is_mutable else []
        self.calls.append(Call(func, given, named, outputs, aliases))
        return result


def _is_written(arg: Any, said: Any) -> bool:
    return isinstance(arg, Tensor) and said.alias_info is not None and said.alias_info.is_write


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """The ops of ``model(*args, **kwargs)``, in the mode the model is in; nothing changes.

    Where the forward needs data (reads a number out of a tensor, say), it is run for real: then the ops are those
    that this example took. A model on the meta device cannot; its ``Capture`` is incomplete.
    """
    try:
        with _quiet():
            return _recorded(model, *_fakes(model, args, kwargs))
    except Exception as error:  # whatever a forward meets where there are no data: the real one says if it is wrong
        reason = _reason(error)
    if any(tensor.is_meta for tensor in model.parameters()):
        return Capture(not_captured=f"the forward needs data ({reason}), and on the meta device there are none")
    with _undisturbed(model):
        real = {name: tensor.detach() for name, tensor in _held(model)}
        captured = _recorded(model, real, args, kwargs)
    captured.not_captured = f"the forward needs data ({reason}): what feeds what is that of this example"
    return captured


def _reason(error: BaseException) -> str:
    """Which op needed data, where the error says so; a model may have wrapped it."""
    cause: BaseException | None = error
    while cause is not None:
        if hasattr(cause, "func"):
            return str(cause.func)
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what it could not do without data; we say it in words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fakes(model: nn.Module, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Any, Any, Any]:
    """Stand-ins without data. Those of meta tensors say that they are on the CPU, as what forwards make is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            device = "cpu" if tensor.is_meta else tensor.device
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    held = {name: fake(tensor) for name, tensor in _held(model)}
    return held, *(tree_map_only(Tensor, fake, tree) for tree in (args, kwargs)), mode


def _recorded(model: nn.Module, held: dict[str, Tensor], args: Any, kwargs: Any, mode: Any = None) -> Capture:
    recorder = _Recorder()
    found = Capture(recorder.calls, held={name: recorder.ref(tensor) for name, tensor in held.items()})
    found.inputs = [recorder.ref(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    def call() -> Any:
        with torch.no_grad(), _no_fast_path(), recorder:
            return torch.func.functional_call(model, held, args, kwargs)

    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        found.outputs = [recorder.ref(leaf) for leaf in tree_leaves(_within(mode, call)) if isinstance(leaf, Tensor)]
    return found


def _within(mode: Any, call: Callable[[], Any]) -> Any:
    if mode is None:
        return call()
    with mode:
        return call()


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoderLayer in eval mode is one op that hides what feeds what."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers (those of a BatchNorm, say) are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
