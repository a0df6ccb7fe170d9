"""Makes the classes of modules with parametrized tensors: one for all modules of a class, whatever their number.

``torch.nn.utils.parametrize`` makes a class for each module. A compiled graph belongs to the classes it was traced
with, so equal blocks would not share one; and a compiler keeps these classes, which keep their modules. Here a class
depends on the class of the module and the names of the tensors alone, and its properties know no module.

torch's own functions work on such modules. They edit the class of the module that they are given, which here would
concern all others: so a tensor that is parametrized for one module is read as before by those where it is not, and a
property stays when the tensor of one module is no longer parametrized.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from smet_compile.ops import direct, loading, reads
from smet_compile.ops.sites import compact_names, parametrizations
from smet_compile.ops.torch_insides import read_once

_NOT_PICKLED = (
    "Serialization of parametrized modules is only supported through state_dict(): save model.state_dict(), "
    "smet_compile.save_checkpoint(...), or the dense copy that smet_compile.export_dense(model) makes"
)
_classes: dict[tuple[type[nn.Module], frozenset[str]], type[nn.Module]] = {}
"""All classes that were made. They stay, as those of ``fully_shard`` do: made again they would be compiled again."""


def register(module: nn.Module, tensor_name: str, parametrization: nn.Module) -> None:
    """Does what ``parametrize.register_parametrization(..., unsafe=True)`` does, for a parameter that has none yet."""
    chain = _Chain([parametrization.train(module.training)], getattr(module, tensor_name), True)
    kind = shared_class(plain_class(module), {*parametrizations(module), tensor_name})
    delattr(module, tensor_name)
    if not parametrizations(module):
        module.parametrizations = nn.ModuleDict()
    parametrizations(module)[tensor_name] = chain
    module.__class__ = kind


class _Chain(parametrize.ParametrizationList):
    """Holds the parametrizations of a tensor, and refuses a further one that cannot take what is read by the others.

    ``weight_norm`` and ``orthogonal`` of ``torch.nn.utils.parametrizations`` are for tensors that are not parametrized
    yet, and do not look whether this one is.
    """

    def append(self, module: nn.Module) -> _Chain:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            read = self().clone()
            try:
                copy.deepcopy(module)(read)  # a forward may change its own buffers
            except Exception as error:
                raise ValueError(
                    f"{getattr(self[0], 'name', 'weight')}: expected a parametrization that takes the weight as it is "
                    f"read, got {type(module).__name__}, which does not ({error}); register it before smet.sparsify, "
                    "which leaves such a weight dense, or on smet.export_dense(model)"
                ) from error
        super().append(module)
        return self


_Chain.__module__ = parametrize.__name__  # tracers of fx do not look into torch's own modules


def make_plain(module: nn.Module, tensor_name: str) -> None:
    """Makes a parametrized tensor of ``module`` a parameter that holds what was read, and the class fit the others."""
    plain = plain_class(module)
    module.__class__ = shared_class(plain, parametrizations(module))  # torch edits the class, which copies may share
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=True)
    module.__class__ = shared_class(plain, parametrizations(module))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that ``module`` had before any of its tensors was parametrized, by torch or here."""
    kind, names = type(module), list(parametrizations(module))
    is_made = bool(names) and all(isinstance(vars(kind).get(name), property) for name in names)
    return kind.__bases__[0] if is_made else kind


def shared_class(plain: type[nn.Module], names: Iterable[str]) -> type[nn.Module]:
    """Returns the class of all modules of the class ``plain`` whose tensors ``names`` are parametrized."""
    key = plain, frozenset(names)
    if not key[1]:
        return plain
    return _classes.get(key) or _classes.setdefault(key, _make(*key))


def _make(plain: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _tensor_property(name) for name in sorted(names)}
    # Compilers and fx take a parametrized module for one of torch's by the name of the module of its class.
    body |= {"__module__": parametrize.__name__, "__getstate__": _refuse_to_pickle}
    body["__deepcopy__"] = _deepcopy_as(getattr(plain, "__deepcopy__", _deepcopy))
    kind: Any = type(plain)
    make = _kind_of_class(kind)
    tells_of_subclasses = hasattr(plain.__init_subclass__, "__func__")  # that of `object` is no Python function
    made: Any = make(f"Parametrized{plain.__name__}", (nn.Module if tells_of_subclasses else plain,), body)
    if tells_of_subclasses:  # it may ask for arguments, or keep a list of the user's own classes
        made.__bases__ = (plain,)
    reads.accept_parameters(made, parametrizations)
    loading.refuse_dense(made, compact_names)
    if "weight" in names:
        direct.install(made)
    return cast("type[nn.Module]", made)


class _KindOfClass(type):
    """Takes edits of a class that ``torch.nn.utils.parametrize`` means for one module."""

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, _tensor_property(name) if _is_made_in(parametrize.__name__, value) else value)

    def __delattr__(cls, name: str) -> None:
        if not _is_made_in(__name__, vars(cls).get(name)):
            super().__delattr__(name)


@functools.cache
def _kind_of_class(kind: type) -> Any:
    """Returns the metaclass of a class whose base has the metaclass ``kind``."""
    if issubclass(_KindOfClass, kind):
        return _KindOfClass
    if issubclass(kind, _KindOfClass):
        return kind
    return type(f"{_KindOfClass.__name__}{kind.__name__}", (_KindOfClass, kind), {})


def _is_made_in(where: str, value: Any) -> bool:
    """Tells whether ``value`` is a property whose functions are those of the Python module ``where``."""
    return isinstance(value, property) and getattr(value.fget, "__module__", None) == where


def _tensor_property(name: str) -> property:
    """Returns a property that reads and assigns a tensor by its parametrizations; where it has none, as it is."""

    @torch.jit.unused
    def read(self: nn.Module) -> Any:
        chain = _chain(self, name)
        if chain is not None:
            return read_once(self, name, chain)
        for held in (self.__dict__, self._parameters, self._buffers):  # Dynamo of torch 2.11 would come back here
            if name in held:
                return held[name]
        return self.__getattr__(name)

    def assign(self: nn.Module, value: Any) -> None:
        chain = _chain(self, name)
        if chain is None:
            self.__dict__[name] = value
        else:
            chain.right_inverse(value)

    def delete(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return property(read, assign, delete)


def _chain(module: nn.Module, name: str) -> Any:
    chains = module._modules.get("parametrizations")
    return None if chains is None else chains._modules.get(name)


_SOME = _tensor_property("weight")
RUN_IN_EAGER = (_SOME.fget, _SOME.fset, _SOME.fdel, read_once)
"""Functions that Dynamo must not compile by themselves after a graph break, as it does not those of ``parametrize``."""


def _refuse_to_pickle(self: nn.Module) -> Any:
    raise RuntimeError(_NOT_PICKLED)


def _deepcopy_as(copy_module: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns a method that copies a module by ``copy_module``, after it has kept what was written into reads."""

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        reads.settle_live()
        return copy_module(self, memo)

    return deepcopy


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copies a module as if its class had no ``__getstate__``."""
    replica = type(self).__new__(type(self))
    memo[id(self)] = replica
    state: Any = copy.deepcopy(object.__getstate__(self), memo)
    attributes, slots = state if isinstance(state, tuple) else (state, {})
    replica.__dict__.update(attributes)
    for name, value in slots.items():
        object.__setattr__(replica, name, value)
    return replica
