"""Makes weights compact: draws their active blocks, and registers the parametrizations, all or none."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from smet_compile.convert.active_blocks import FROM_MASKS, Start, select_blocks
from smet_compile.convert.choose import Choice
from smet_compile.convert.find_weights import Weight
from smet_compile.convert.report import num_active_weights, remember_reasons
from smet_compile.format import slabs
from smet_compile.ops import CompactWeight, direct, following, loading, saved_weights, shared_class
from smet_compile.ops.sites import compact_names, parametrizations
from smet_compile.ops.torch_insides import outside_graphs
from smet_compile.shards import is_sharded, local

_ATTRIBUTE_PREFIX = "_smet_"
"""The names of all attributes that this library adds to modules begin with it."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
_dense_shapes: Any = WeakIdKeyDictionary()
_DENSE_SHAPE = f"{_ATTRIBUTE_PREFIX}dense_shape"


@dataclass(frozen=True)
class Drawn:
    """Holds a weight that is dense yet, and the parametrization that will make it compact."""

    choice: Choice
    compact: CompactWeight

    @property
    def num_dropped_weights(self) -> int:
        """Returns how many single weights lie outside the active blocks."""
        return self.choice.layout.num_weights - num_active_weights(self.compact)


@torch.no_grad()
def draw(choice: Choice, select: str, rescale: bool, seed: int) -> Drawn:
    """Selects the active blocks of a weight, unless a mask gives them, and packs it once for trial. Changes nothing."""
    weight, pattern, part = choice.weight, choice.pattern, choice.part
    layout, num_active, tensor = choice.layout, choice.num_active, local(weight.tensor)
    if part is not None:
        layout, num_active = part.layout, num_active // part.count
    start = Start(weight.name, layout, num_active, select, pattern, seed)
    mask = select_blocks(start, tensor) if choice.mask is None else choice.mask
    if choice.mask is not None and part is not None:
        mask = part.band.cut(mask)
    if not mask.is_meta:
        slabs.check_mask(weight.name, mask, pattern, layout)
    compact = CompactWeight(layout, mask, num_active, weight.name)
    compact.part = part
    compact.select, compact.rescale = select if choice.mask is None else FROM_MASKS, rescale
    compact.pattern = pattern
    compact.right_inverse(weight.tensor)
    return Drawn(choice, compact)


@torch.no_grad()
def make_compact(model: nn.Module, drawn: Sequence[Drawn], reasons: Mapping[str, str]) -> None:
    """Makes all drawn weights of ``model`` compact, and remembers for what ``reasons`` others stay dense.

    First everything is registered while the weights are dense, which can be undone. Then they are packed one by one,
    the largest first: no other one needs more memory than it, and until it is packed nothing is lost. Where a later one
    fails all the same, those before it stay compact, and the others are dense again.
    """
    before = _ModelBefore(model, [each.choice.weight for each in drawn])
    for each in drawn:
        each.compact.parameter_order = _parameter_order(each.choice.weight.module)
    try:
        for each in drawn:
            weight = each.choice.weight
            shared_class.register(weight.module, weight.tensor_name, _Placeholder())
            each.compact.train(weight.module.training)
        for each in drawn:
            if each.choice.weight.tensor_name != "weight" or not direct.is_installed(each.choice.weight.module):
                saved_weights.install(each.choice.weight.module, owner=True)
        saved_weights.install(model)
        remember_reasons(model, dict(reasons))
        for each in sorted(drawn, key=lambda each: each.choice.values_bytes, reverse=True):
            _pack(each)
    except BaseException as error:
        packed = [each.choice.weight for each in drawn if _is_packed(each)]
        before.restore(packed)
        if packed:
            names = ", ".join(weight.name for weight in packed)
            error.add_note(f"sparsify: broke off after {len(packed)} of {len(drawn)} weights: {names} are compact now")
        raise


class _Placeholder(nn.Module):
    """Stands in the chain of parametrizations of a weight until the weight is packed."""

    def forward(self, dense: Tensor) -> Tensor:
        return dense


def _parameter_order(module: nn.Module) -> list[str]:
    """Returns the names of the parameters of ``module`` in the order they had when all of them were dense."""
    for name in compact_names(module):
        compact: CompactWeight = parametrizations(module)[name][0]
        return compact.parameter_order
    return list(module._parameters)


def _is_packed(drawn: Drawn) -> bool:
    chains = parametrizations(drawn.choice.weight.module)
    name = drawn.choice.weight.tensor_name
    return name in chains and chains[name][0] is drawn.compact


def _pack(drawn: Drawn) -> None:
    """Replaces the data of a dense parameter by its values.

    Whatever fails or interrupts, the parameter holds afterwards the whole dense weight or its values.
    """
    weight, compact = drawn.choice.weight, drawn.compact
    tensor, dense, grad = weight.tensor, weight.tensor.detach(), weight.tensor.grad
    chain = parametrizations(weight.module)[weight.tensor_name]
    placeholder = chain[0]
    try:
        note_dense_shape(tensor, dense.shape)
        chain[0] = compact
        chain.right_inverse(dense)
        if is_sharded(tensor):  # its attributes were swapped, too
            note_dense_shape(tensor, dense.shape)
        tensor.grad = None
        if compact.rescale:
            local(tensor).mul_(math.sqrt(drawn.choice.layout.num_blocks / drawn.choice.num_active))
        loading.install(chain)
    except BaseException:
        chain[0] = placeholder
        if tensor.shape != dense.shape:
            _put_back(tensor, dense)
        tensor.grad = grad
        _dense_shapes.pop(tensor, None)
        raise


def _put_back(tensor: Tensor, dense: Tensor) -> None:
    if is_sharded(tensor):  # it has no data to set
        torch.utils.swap_tensors(tensor, nn.Parameter(dense, tensor.requires_grad))
    else:
        tensor.data = dense


class _ModelBefore:
    """Remembers ``model`` as it is before some of its ``weights`` are made compact.

    It does not remember the data of the weights, which would take the memory of a second model: a weight that is packed
    has to stay compact.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Weight]) -> None:
        self._model = model
        self._attributes = {module: _own_attributes(module) for module in model.modules()}
        modules: dict[nn.Module, set[str]] = {model: set()}
        for weight in weights:
            modules.setdefault(weight.module, set()).add(weight.tensor_name)
        self._modules = [_ModuleBefore(module, names) for module, names in modules.items()]

    def restore(self, packed: Iterable[Weight]) -> None:
        """Restores everything but the weights ``packed``, and what these need."""
        kept: dict[nn.Module, set[str]] = {}
        for weight in packed:
            kept.setdefault(weight.module, set()).add(weight.tensor_name)
        for before in self._modules:
            before.restore_weights(kept.get(before.module, set()))
            if before.module not in kept and not (kept and before.module is self._model):
                before.restore_hooks()
        for module, attributes in self._attributes.items() if not kept else ():
            for name in _own_attributes(module):
                del module.__dict__[name]
            module.__dict__.update(attributes)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of ``module`` that this library added."""
    return {name: value for name, value in module.__dict__.items() if name.startswith(_ATTRIBUTE_PREFIX)}


class _ModuleBefore:
    """Remembers a module as it is before its tensors ``names`` are parametrized."""

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        self.module = module
        self._names = names
        self._class, self._plain_class = type(module), shared_class.plain_class(module)
        self._parameters = dict(module._parameters)
        self._hooks: dict[str, dict[Any, Any]] = {name: dict(getattr(module, name)) for name in _HOOKS}

    def restore_weights(self, kept: set[str]) -> None:
        """Makes the tensors plain parameters again, but for those called ``kept``."""
        module, chains = self.module, parametrizations(self.module)
        for name in self._names - kept:
            if name in chains:
                del chains[name]
        module.__class__ = shared_class.shared_class(self._plain_class, chains) if kept else self._class
        if len(chains) == 0:
            module._modules.pop("parametrizations", None)
        module._parameters.clear()
        module._parameters.update((name, p) for name, p in self._parameters.items() if name not in kept)

    def restore_hooks(self) -> None:
        for name, hooks in self._hooks.items():
            current = getattr(self.module, name)
            current.clear()
            current.update(hooks)


def note_dense_shape(values: Tensor, dense_shape: torch.Size) -> None:
    """Notes that ``values`` was a dense parameter of ``dense_shape`` until now."""
    _check_moments_in_every_step()
    if is_sharded(values):  # torch swaps its contents, in model.to(...) too, unless there is a weak reference to it
        values.__dict__[_DENSE_SHAPE] = dense_shape
    else:
        _dense_shapes[values] = dense_shape


@functools.cache
def _check_moments_in_every_step() -> None:
    """Registers one hook for every optimizer, with the first compact weight."""
    register_optimizer_step_pre_hook(check_moments)


@outside_graphs("an optimizer's step is checked in eager mode; compile what calls it without fullgraph=True")
def check_moments(optimizer: Optimizer, *_: Any) -> None:
    """Raises ValueError before a step with moments from before ``sparsify``, or of another topology (``following``).

    The parameter of such an optimizer now has compact values, and moments of the dense shape belong to other weights.
    Some of torch's optimizers would fail half way through a step, the fused ones not at all.
    """
    following.begin_step(optimizer)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        dense_shape = parameter.__dict__.get(_DENSE_SHAPE) if is_sharded(parameter) else _dense_shapes.get(parameter)
        if dense_shape is None or parameter.shape == dense_shape:
            continue
        for key, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == dense_shape:
                raise ValueError(
                    f"{type(optimizer).__name__}: expected {key!r} of shape {tuple(parameter.shape)}, got "
                    f"{tuple(dense_shape)}: sparsify was called after this optimizer had stepped; make it anew"
                )
