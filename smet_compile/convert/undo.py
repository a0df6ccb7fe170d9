"""Takes back a conversion that failed: modules become what they were before weights were registered as compact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from smet_compile.convert.survey import Weight
from smet_compile.ops.sites import parametrizations

_NOTES = "_smet_"
"""How the names of attributes begin that this library gives to modules."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")


class Undo:
    """Remembers ``model`` before some of its ``weights`` are made compact; called, it restores the model.

    What the weights hold is not remembered: a weight that is packed has to stay compact.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Weight]) -> None:
        self._model = model
        self._notes = {module: _notes(module) for module in model.modules()}
        modules: dict[nn.Module, set[str]] = {model: set()}
        for weight in weights:
            modules.setdefault(weight.module, set()).add(weight.tensor_name)
        self._befores = [_Before(module, names) for module, names in modules.items()]

    def __call__(self, packed: Iterable[Weight]) -> None:
        """Restores everything but the weights ``packed``, and what these need."""
        kept: dict[nn.Module, set[str]] = {}
        for weight in packed:
            kept.setdefault(weight.module, set()).add(weight.tensor_name)
        for before in self._befores:
            before.restore_weights(kept.get(before.module, set()))
            if before.module not in kept and not (kept and before.module is self._model):
                before.restore_hooks()
        for module, notes in self._notes.items() if not kept else ():
            for name in _notes(module):
                del module.__dict__[name]
            module.__dict__.update(notes)


def _notes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name.startswith(_NOTES)}


class _Before:
    """A module before the tensors ``names`` of it are parametrized."""

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        self.module = module
        self._names = names
        self._class = type(module)
        self._parameters = dict(module._parameters)
        self._hooks: dict[str, dict[Any, Any]] = {name: dict(getattr(module, name)) for name in _HOOKS}

    def restore_weights(self, kept: set[str]) -> None:
        module, chains = self.module, parametrizations(self.module)
        for name in self._names - kept:
            if name in chains:
                del chains[name]
            if isinstance(vars(type(module)).get(name), property):
                delattr(type(module), name)
        if type(module) is not self._class and len(chains) == 0:
            module.__class__ = self._class
            module._modules.pop("parametrizations", None)
        module._parameters.clear()
        module._parameters.update((name, p) for name, p in self._parameters.items() if name not in kept)

    def restore_hooks(self) -> None:
        for name, hooks in self._hooks.items():
            current = getattr(self.module, name)
            current.clear()
            current.update(hooks)
