"""Finds every parameter of two or more dimensions, and says whether it is sparse by default or why it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from smet_compile.convert.routers import attribute, find_routers, is_expert_stack
from smet_compile.convert.shared_memory import tied_names
from smet_compile.ops.sites import CONVOLUTIONS, compact_names, is_depthwise, parametrizations

ALREADY_COMPACT = "is already compact"
_NOT_INITIALISED = "not initialised yet: run a forward first"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Weight:
    """Describes a parameter of two or more dimensions.

    Args:
        name: its qualified name.
        module, tensor_name: the module that owns it, and its name there.
        tensor: the parameter (of a compact weight its values; of a lazy module a parameter without a shape yet).
        dense_reason: why it is left dense unless it is included by name; None for a weight that is sparse by default.
        never_reason: why it cannot be made compact at all; None where it can.
    """

    name: str
    module: nn.Module
    tensor_name: str
    tensor: Tensor
    dense_reason: str | None = None
    never_reason: str | None = None

    @property
    def reason(self) -> str | None:
        return self.never_reason or self.dense_reason

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def name_of_computed(self) -> str:
        """Returns the name of the weight that a hook computes from this parameter; its own name where none does."""
        computed = _computed_weight(self.module, self.tensor_name)
        return self.name if computed is None else f"{self.module_name}.{computed[0]}".removeprefix(".")

    @property
    def flatten(self) -> bool:
        """Returns whether the weight is read as one matrix (out, in * kernel), as that of a convolution is."""
        return isinstance(self.module, CONVOLUTIONS)


def find_weights(model: nn.Module, with_convolutions: bool = False) -> dict[str, Weight]:
    """Returns every parameter of two or more dimensions by its qualified name, compact ones included.

    Args:
        with_convolutions: whether convolutions are sparse by default, but for the first one and depthwise ones.
    """
    tied = tied_names(model)
    heads, adapters = _output_embeddings(model), _adapters(model)
    routers = find_routers(model)
    first = next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None)
    found = {}
    for prefix, module in _modules(model):
        for tensor_name, tensor in _matrices(module):
            name = f"{prefix}.{tensor_name}" if prefix else tensor_name
            never_reason = _never_reason(module, tensor_name, tensor, tied.get(name, []))
            dense_reason = _module_reason(module, tensor, heads, adapters, routers)
            if dense_reason is None and with_convolutions and isinstance(module, CONVOLUTIONS):
                dense_reason = _convolution_reason(module, module is first)
            elif dense_reason is None:
                dense_reason = _kind_reason(module, tensor_name, tensor)
            found[name] = Weight(name, module, tensor_name, tensor, dense_reason, never_reason)
    return found


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules with their names, but for the insides of parametrizations."""
    inside: set[int] = set()
    for module in model.modules():
        for chain in parametrizations(module).values():
            inside.update(id(m) for m in chain.modules())
    yield from ((name, module) for name, module in model.named_modules() if id(module) not in inside)


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if nn.parameter.is_lazy(parameter):
            if name != "bias":
                yield name, parameter
        elif parameter.dim() >= 2 and parameter.numel() > 0:
            yield name, parameter
    for name in compact_names(module):
        yield name, parametrizations(module)[name].original


def _output_embeddings(model: nn.Module) -> set[int]:
    """Returns the identities of the modules that ``get_output_embeddings()`` of any module names."""
    heads: set[int] = set()
    for module in model.modules():
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except Exception:  # it has no such method, or the method fails
            continue
        if isinstance(head, nn.Module):
            heads.update(id(m) for m in head.modules())
    return heads


def _adapters(model: nn.Module) -> set[int]:
    """Returns the identities of low-rank adapters: those that layers of PEFT name, and those called ``lora_*``."""
    found: set[int] = set()
    for module in model.modules():
        listed = attribute(module, "adapter_layer_names")
        names = set(listed) if isinstance(listed, tuple | list) else set()
        for name, part in (*module._modules.items(), *module._parameters.items()):
            if part is not None and (name in names or name.startswith("lora_")):
                found.update(id(inner) for inner in (part.modules() if isinstance(part, nn.Module) else [part]))
    return found


def _is_linear(module: nn.Module, tensor_name: str, tensor: Tensor) -> bool:
    hugging_face_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if isinstance(module, nn.Linear) or hugging_face_conv1d:
        return tensor_name == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return tensor_name in _ATTENTION_PROJECTIONS
    return is_expert_stack(module, tensor)


def _module_reason(
    module: nn.Module, tensor: Tensor, heads: set[int], adapters: set[int], routers: set[int]
) -> str | None:
    """Returns why the part that a module plays in the model keeps its parameters dense; None where it does not."""
    if id(module) in heads:
        return "output embeddings"
    if id(module) in adapters or id(tensor) in adapters:
        return "an adapter"
    if id(module) in routers:
        return "routes tokens to experts"
    return None


def _kind_reason(module: nn.Module, tensor_name: str, tensor: Tensor) -> str | None:
    """Returns why a parameter is no weight of a linear layer; None where it is one."""
    if nn.parameter.is_lazy(tensor):
        return _NOT_INITIALISED
    if _is_linear(module, tensor_name, tensor):
        return None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
    if isinstance(module, CONVOLUTIONS):
        return "a convolution"
    return "not the weight of a linear layer"


def _convolution_reason(module: nn.Module, is_first: bool) -> str | None:
    """Returns why a convolution stays dense where convolutions are sparse; None where it does not."""
    if is_depthwise(module):
        return "a depthwise convolution, whose filters have few weights"
    return "the first convolution, which has few weights and reads the input" if is_first else None


def _never_reason(module: nn.Module, tensor_name: str, tensor: Tensor, other_names: list[str]) -> str | None:
    """Returns why a parameter cannot be made compact; None where it can."""
    if tensor_name in compact_names(module):
        return ALREADY_COMPACT
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, whose weights are read inside compiled code"
    if nn.parameter.is_lazy(tensor):
        return _NOT_INITIALISED
    if other_names:
        return f"tied to {', '.join(other_names)}"
    computed = _computed_weight(module, tensor_name)
    if computed is not None:
        return computed[1]
    if parametrize.is_parametrized(module, tensor_name):
        return "has another parametrization"
    if isinstance(module, nn.RNNBase):
        return "a recurrent layer, which reads its weights past any parametrization"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and tensor_name == "weight":
        if module.max_norm is not None:
            return "an embedding with max_norm, which rewrites its rows in every forward: build it without max_norm"
        if module.sparse:
            return "an embedding with sparse=True, whose gradient is a sparse tensor: build it with sparse=False"
    if tensor.dtype not in _DTYPES:
        return f"holds {tensor.dtype}, which is not trained"
    return None


def _computed_weight(module: nn.Module, tensor_name: str) -> tuple[str, str] | None:
    """Returns the name of the weight that a hook computes from a parameter in every forward, and how to end that.

    Returns None for a parameter that the module reads as it is.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and tensor_name == f"{hook._tensor_name}_orig":
            name = hook._tensor_name
            return name, (
                f"pruned by torch.nn.utils.prune: call prune.remove(module, {name!r}) first, then sparsify(model, "
                'select="nonzero") to keep its zeros, or select="magnitude" with a density; masks="prune" does both'
            )
        if isinstance(hook, WeightNorm) and tensor_name in (f"{hook.name}_g", f"{hook.name}_v"):
            call = f"torch.nn.utils.remove_weight_norm(module, {hook.name!r})"
            return hook.name, f"computed by torch.nn.utils.weight_norm: call {call} first"
        if isinstance(hook, SpectralNorm) and tensor_name == f"{hook.name}_orig":
            call = f"torch.nn.utils.remove_spectral_norm(module, {hook.name!r})"
            return hook.name, f"computed by torch.nn.utils.spectral_norm: call {call} first"
    return None
