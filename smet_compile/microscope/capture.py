"""Captures the tensor ops of one forward: with fake tensors, or with real ones where the model looks at its data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smet_compile.microscope.example import replaced, tensors_in
from smet_compile.microscope.recorder import Call, Recorder, Ref
from smet_compile.microscope.undisturbed import kept_buffers, undisturbed


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


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """The ops of ``model(*args, **kwargs)``, in the mode the model is in; nothing changes.

    Where the forward needs data (reads a number out of a tensor, say), it is run for real: then the ops are those
    that this example took. A model on the meta device cannot; its ``Capture`` is incomplete.
    """
    try:
        with _quiet():
            return _faked(model, (args, kwargs))
    except Exception as error:  # whatever a forward meets where there are no data: the real one says if it is wrong
        reason = _reason(error)
    if any(tensor.is_meta for tensor in model.parameters()):
        return Capture(
            not_captured=f"the forward cannot run without data ({reason}), and on the meta device there are none"
        )
    held = {name: tensor.detach() for name, tensor in _held(model)}
    with kept_buffers(model):
        captured = _recorded(model, held, replaced((args, kwargs), lambda tensor: tensor.detach().clone()))
    captured.not_captured += f"the forward cannot run without data ({reason}): what feeds what is that of this example"
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


def _faked(model: nn.Module, example: Any) -> Capture:
    """With stand-ins without data. Those of meta tensors say that they are on the CPU, as what forwards make is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            device = "cpu" if tensor.is_meta else tensor.device
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    held = {name: fake(tensor) for name, tensor in _held(model)}
    return _recorded(model, held, replaced(example, fake), mode)


def _recorded(model: nn.Module, held: dict[str, Tensor], example: Any, mode: Any = None) -> Capture:
    recorder = Recorder()
    found = Capture(recorder.calls, held={name: recorder.ref(tensor) for name, tensor in held.items()})
    found.inputs = [recorder.ref(tensor) for tensor in tensors_in(example)]
    with undisturbed(model), mode or nullcontext(), recorder:
        result = torch.func.functional_call(model, held, *example)
    returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]  # not what lies in a cache
    found.outputs = [recorder.ref(tensor) for tensor in returned or tensors_in(result)]
    if not found.outputs:
        found.not_captured = "the forward returned no tensor, so what feeds what is not known"
    return found
