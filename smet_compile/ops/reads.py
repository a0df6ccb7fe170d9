"""Writes changes in place of ``module.weight`` back to the values of the compact weight.

``module.weight`` is unpacked anew at every read, so a change in place (``nn.init``, weight clipping, a merged adapter)
would change only a copy. In eager mode a read is therefore a ``WeightRead``. When it is freed, or at the next use of
the weight or optimizer step, its version tells whether it was written; if so, its active part is copied to the values.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from smet_compile.ops.torch_insides import NO_TORCH_FUNCTION, is_in_backward, warn_once
from smet_compile.shards import is_sharded

_READ, _ALIAS, _ALIAS_VERSION = "_smet_read", "alias", "alias_version"
_IS_DETACHED, _HEARS = "is_detached", "hears"
_TENSOR: Any = Tensor
_STACKLEVEL = 5  # the line that drops the last reference to the read, or uses the weight next


class _CompactWeight(Protocol):
    """Describes what this module needs of a ``CompactWeight``."""

    name: str
    write_error: BaseException | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the dense weight."""

    def right_inverse(self, dense: Tensor) -> Tensor:
        """Returns the active part of a dense weight."""

    def replace(self, values: Tensor, dense: Tensor) -> None:
        """Makes ``dense`` the weight."""


@dataclass(eq=False)
class _Source:
    """Records what a read was made from. The read and its aliases share it.

    Args:
        values_version: the version of the values that the read agrees with.
        node: name of the autograd node that made the read; None where gradients are not recorded.
    """

    compact: _CompactWeight
    values: Tensor
    values_version: int
    node: str | None


_live: dict[int, weakref.ref[Tensor]] = {}
"""The reads that are alive, by id."""


class WeightRead(Tensor):
    """Represents the dense weight that ``module.weight`` returns: an ordinary tensor, whose changes in place are kept.

    ``requires_grad_`` freezes the weight, or has it trained again, as that of a parameter does: it acts on the values,
    and so on later reads, while a graph that has this read stays as it is. ``detach()`` and ``.data`` return aliases
    of the same kind, which may become leaves of their own, ``numpy()`` an array that cannot be written to.
    """

    __torch_function__ = NO_TORCH_FUNCTION

    def detach(self) -> Tensor:
        return _as_read(super().detach(), self.__dict__["source"], is_detached=True)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if self.__dict__.get(_IS_DETACHED):
            super().requires_grad_(requires_grad)
        else:
            self.__dict__["source"].values.requires_grad_(requires_grad)
        return self

    @property
    def requires_grad(self) -> bool:
        is_required: bool = _TENSOR.requires_grad.__get__(self)
        return is_required

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    @property
    def grad(self) -> Tensor | None:
        gradient: Tensor | None = _TENSOR.grad.__get__(self)
        return gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if not self.__dict__.get(_IS_DETACHED) and not self.retains_grad:
            name = self.__dict__["source"].compact.name
            module, dot, tensor = name.rpartition(".")
            raise ValueError(
                f"{name}: expected the gradient of a parameter to be set, got that of a weight that was read, which is "
                f"made anew at every read; set that of the values, {module}{dot}parametrizations.{tensor}.original.grad"
            )
        _TENSOR.grad.__set__(self, gradient)

    @property
    def data(self) -> Tensor:
        return _as_read(_plain_data(self), self.__dict__["source"], is_detached=True)

    @data.setter
    def data(self, replacement: Tensor) -> None:
        source: _Source = self.__dict__["source"]
        if isinstance(replacement, WeightRead) and replacement.__dict__["source"].compact is source.compact:
            replacement.__dict__["version"] = replacement._version  # what was written into it is kept as a whole
        source.compact.replace(source.values, replacement)
        source.values_version = source.values._version
        Tensor.data.__set__(self, replacement)  # type: ignore[attr-defined]
        self.__dict__["version"] = self._version

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        handle = super().register_hook(hook)
        if self.grad_fn is not None and _HEARS not in self.__dict__:
            self.__dict__[_HEARS] = _warn_if_unheard(self, self.grad_fn, self.__dict__["source"].compact.name)
        return handle

    def numpy(self, *, force: bool = False) -> Any:
        array = Tensor.numpy(_plain(self), force=force)
        array.flags.writeable = False
        return array

    def __del__(self, live: dict[int, weakref.ref[Tensor]] = _live) -> None:
        """Keeps what was written, unless the interpreter is ending and the names of this module are gone."""
        settle_or_note, is_written = globals().get("_settle_or_note"), globals().get("is_written")
        if live.pop(id(self), None) is not None and settle_or_note and is_written and is_written(self):
            settle_or_note(self)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, wanted: bool) -> None:
        """Becomes an ordinary parameter, for ``nn.Parameter(read)``: changes of it are no longer written back."""
        _live.pop(id(self), None)
        self.__dict__.clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _plain(self).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))


def _warn_if_unheard(read: Tensor, node: Any, name: str) -> Any:
    """Warns when the graph of a read is gone and its hooks were never called, as where nothing used the read."""
    heard: list[Any] = []
    Tensor.register_hook(read, lambda gradient: heard.append(None))

    def check() -> None:
        if not heard:
            module, dot, tensor = name.rpartition(".")
            warn_once(
                f"{name}: a hook was registered on the weight as it was read then, which no backward went through: a "
                "compact weight is made anew at every read; register the hook on its values, "
                f"{module}{dot}parametrizations.{tensor}.original, or on the weight that the forward uses"
            )

    finalizer = weakref.finalize(node, check)
    finalizer.atexit = False
    return finalizer


def _plain_data(read: Tensor) -> Tensor:
    data: Tensor = Tensor.data.__get__(read)  # type: ignore[attr-defined]
    return data


def _plain(read: Tensor) -> Tensor:
    """Returns a plain tensor that shares the memory, whose changes are not written back."""
    return Tensor.detach(read).requires_grad_(read.requires_grad)


def watch(compact: _CompactWeight, values: Tensor, dense: Tensor) -> Tensor:
    """Makes ``dense``, which was just unpacked from ``values``, a read whose changes are kept."""
    if type(dense) is not Tensor or dense.is_meta or dense.is_inference() or values.is_inference():
        return dense
    _settle_before_steps()
    node = None if dense.grad_fn is None else dense.grad_fn.name()
    return _as_read(dense, _Source(compact, values, values._version, node))


def _as_read(dense: Tensor, source: _Source, is_detached: bool = False) -> Tensor:
    dense.__class__ = WeightRead
    dense.__dict__.update({"source": source, "version": dense._version, _IS_DETACHED: is_detached})
    _live[id(dense)] = weakref.ref(dense)
    return dense


def follow(here: Tensor, cut: Tensor) -> Tensor:
    """Returns ``cut``, a DTensor made of the read ``here``, so that its changes in place are kept too.

    Such a change raises the version of the DTensor alone, which an alias of it has as well.
    """
    if isinstance(here, WeightRead):
        alias = cut.detach()
        here.__dict__.update({_ALIAS: alias, _ALIAS_VERSION: alias._version})
        cut.__dict__[_READ] = here
    return cut


def is_written(read: Tensor) -> bool:
    """Tells whether a read, or the DTensor that follows it, was changed in place since it was last settled."""
    notes = read.__dict__
    alias = notes.get(_ALIAS)
    return notes["version"] != read._version or (alias is not None and alias._version != notes[_ALIAS_VERSION])


def settle_live(*_: Any) -> None:
    """Keeps what was written into reads that are still alive. An error is raised at the next use of the weight."""
    for reference in list(_live.values()):
        read = reference()
        if read is not None and is_written(read):
            _settle_or_note(read)


def settle_before_use(*compacts: _CompactWeight) -> None:
    """Keeps what was written into reads. Raises the error of a change of one of ``compacts`` that cannot be kept."""
    settle_live()
    for compact in compacts:
        if compact.write_error is not None:
            error, compact.write_error = compact.write_error, None
            raise error


def settle_in_graph(values: Tensor) -> None:
    """Does so where a compiled forward is about to read ``values``, or a copy of them in another dtype.

    Raises ValueError where the changed weight may have been read already: a graph converts values to another dtype
    before they come here. The change is kept all the same, so that the next call reads it.
    """
    if is_in_backward():  # as in eager mode, a change after the forward is kept at the next use
        return
    reads = [read for reference in list(_live.values()) if (read := reference()) is not None and is_written(read)]
    sources: list[_Source] = [read.__dict__["source"] for read in reads]
    settle_before_use(*(source.compact for source in sources))
    for source in sources:
        if source.values.dtype is not values.dtype:
            raise ValueError(
                f"{source.compact.name}: expected a weight that does not change while a compiled function runs in "
                f"{values.dtype}, got a change in place of a weight that was read, and is still held, before it; the "
                "change is kept, so call the function again, and let go of the weight (del) before the next call"
            )


def any_live() -> bool:
    """Tells whether there are reads that may have been changed."""
    return bool(_live)


@functools.cache
def _settle_before_steps() -> None:
    """Makes every optimizer call ``settle_live`` before it changes the values."""
    register_optimizer_step_pre_hook(settle_live)


def _settle_or_note(read: Tensor) -> None:
    try:
        settle(read)
    except BaseException as error:  # raised from a finalizer, it would only be printed
        read.__dict__["source"].compact.write_error = error


@torch.no_grad()
def settle(read: Tensor) -> None:
    """Copies the active part of a read that was changed in place to the values.

    Warns if it is not zero outside the active blocks, since those numbers are lost. Raises ValueError where the change
    cannot be kept: the values had changed since the read, autograd recorded the change, or the shape changed.
    """
    source: _Source = read.__dict__["source"]
    read.__dict__["version"] = read._version
    if _ALIAS in read.__dict__:
        read.__dict__[_ALIAS_VERSION] = read.__dict__[_ALIAS]._version
    compact, values = source.compact, source.values
    if tuple(read.shape) != compact.shape:
        raise _not_kept(compact, f"got the shape {tuple(read.shape)} in place, expected {compact.shape}; assign it")
    if source.node is not None and read.grad_fn is not None and read.grad_fn.name() != source.node:
        raise _not_kept(compact, "was changed in place while gradients are recorded; change it under torch.no_grad()")
    content = _plain(read).detach()
    new = compact.right_inverse(content)
    if torch.equal(new, values):
        return
    if source.values_version != values._version:
        raise _not_kept(compact, "was changed in place after its values had moved on; read it again and change that")
    num_lost = int(content.count_nonzero()) - int(new.count_nonzero())
    values.copy_(new)
    source.values_version = values._version
    if num_lost:
        warnings.warn(
            f"{compact.name}: {num_lost:,} of the numbers written into the weight lie where no block is active, and "
            "are dropped; initialise before sparsify, or export_dense first where they matter",
            stacklevel=_STACKLEVEL,
        )


def _not_kept(compact: _CompactWeight, problem: str) -> ValueError:
    return ValueError(f"{compact.name}: the weight that was read {problem}")


def accept_parameters(own: type[nn.Module], chains: Callable[[nn.Module], Any]) -> None:
    """Makes ``module.weight = nn.Parameter(...)`` assign as a tensor does, for compact weights of modules of a class.

    ``nn.Module`` would raise a KeyError, since it has no such parameter.

    Args:
        own: the class, which was made for modules with parametrizations.
        chains: returns the parametrizations of a module by tensor name.
    """
    assign_tensor = own.__setattr__

    def assign(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in (found := chains(self)):
            chain = found[name]
            if is_sharded(chain.original) and is_sharded(value) and chain[0].assign(chain.original, value):
                return
            if is_sharded(chain.original):
                raise ValueError(
                    f"{getattr(chain[0], 'name', name)}: expected a whole weight to assign to, got a shard; "
                    "assign before fully_shard (under tensor parallelism a DTensor cut alike), or load a checkpoint"
                )
            value = value.detach() if isinstance(value, nn.Parameter) else value
        assign_tensor(self, name, value)

    own.__setattr__ = assign  # type: ignore[method-assign]
