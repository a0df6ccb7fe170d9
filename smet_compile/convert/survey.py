"""Surveys a model: every parameter of two or more dimensions, and whether it is sparse by default or why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from smet_compile.convert.routers import attribute, find_routers, is_expert_stack
from smet_compile.ops.sites import compact_names, parametrizations

ALREADY_COMPACT = "is already compact"
_NOT_INITIALISED = "not initialised yet: run a forward first"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MHA_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Weight:
    """A parameter of two or more dimensions.

    Args:
        name: qualified name. module, tensor_name: where it lives.
        tensor: the parameter (of a compact weight: its values; of a lazy module: without a shape yet).
        dense_reason: why it is left dense unless it is included by name; None for a site by default.
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
    def flatten(self) -> bool:
        """Convolutions read as (out, in * kernel), whatever their number of dimensions."""
        return isinstance(self.module, _ConvNd)


def survey(model: nn.Module) -> dict[str, Weight]:
    """Every parameter of two or more dimensions by qualified name, compact ones included."""
    names = _owners(model)
    heads, adapters = _output_embeddings(model), _adapters(model)
    routers = find_routers(model)
    found = {}
    for prefix, module in _modules(model):
        for tensor_name, tensor in _matrices(module):
            name = f"{prefix}.{tensor_name}" if prefix else tensor_name
            never = _never(name, module, tensor_name, tensor, names)
            dense = _left_dense(module, tensor_name, tensor, heads, adapters, routers)
            found[name] = Weight(name, module, tensor_name, tensor, dense, never)
    return found


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, but for the insides of parametrizations."""
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


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter is registered, by identity: several mean it is tied."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return owners


def _output_embeddings(model: nn.Module) -> set[int]:
    """Modules that ``get_output_embeddings()`` names, asked of the model and all inside it; never guessed."""
    heads: set[int] = set()
    for module in model.modules():
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except Exception:  # none, or a model that cannot say
            continue
        if isinstance(head, nn.Module):
            heads.update(id(m) for m in head.modules())
    return heads


def _adapters(model: nn.Module) -> set[int]:
    """Returns the identities of low-rank adapters: what PEFT's layers name as theirs, and what is called ``lora_*``."""
    found: set[int] = set()
    for module in model.modules():
        named = attribute(module, "adapter_layer_names")
        names = set(named) if isinstance(named, tuple | list) else set()
        for name, part in (*module._modules.items(), *module._parameters.items()):
            if part is not None and (name in names or name.startswith("lora_")):
                found.update(id(inner) for inner in (part.modules() if isinstance(part, nn.Module) else [part]))
    return found


def _is_linear(module: nn.Module, tensor_name: str, tensor: Tensor) -> bool:
    hugging_face_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if isinstance(module, nn.Linear) or hugging_face_conv1d:
        return tensor_name == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return tensor_name in _MHA_PROJECTIONS
    return is_expert_stack(module, tensor)


def _left_dense(
    module: nn.Module, tensor_name: str, tensor: Tensor, heads: set[int], adapters: set[int], routers: set[int]
) -> str | None:
    if id(module) in heads:
        return "output embeddings"
    if id(module) in adapters or id(tensor) in adapters:
        return "an adapter"
    if id(module) in routers:
        return "routes tokens to experts"
    if nn.parameter.is_lazy(tensor):
        return _NOT_INITIALISED
    if _is_linear(module, tensor_name, tensor):
        return None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
    if isinstance(module, _ConvNd):
        return "a convolution"
    return "not the weight of a linear layer"


def _never(name: str, module: nn.Module, tensor_name: str, tensor: Tensor, owners: dict[int, list[str]]) -> str | None:
    if tensor_name in compact_names(module):
        return ALREADY_COMPACT
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, whose weights are read inside compiled code"
    if nn.parameter.is_lazy(tensor):
        return _NOT_INITIALISED
    others = [other for other in owners.get(id(tensor), []) if other != name]
    if others:
        return f"tied to {', '.join(others)}"
    if parametrize.is_parametrized(module, tensor_name):
        return "has another parametrization"
    if isinstance(module, nn.RNNBase):
        return "a recurrent layer, which reads its weights past any parametrization"
    if tensor.dtype not in _DTYPES:
        return f"holds {tensor.dtype}, which is not trained"
    return None
