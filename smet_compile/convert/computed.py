"""Recognises parameters from which a hook of torch computes the weight that the module reads, in every forward."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def computed_weight(module: nn.Module, tensor_name: str) -> tuple[str, str] | None:
    """Returns the name of the weight that ``module`` computes from its parameter ``tensor_name``, and the reason why
    the parameter cannot be sparse as it is. Returns None for a parameter that is read as it is."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and tensor_name == f"{hook._tensor_name}_orig":
            name = hook._tensor_name
            return name, (
                f"pruned by torch.nn.utils.prune: call prune.remove(module, {name!r}) first, then sparsify(model, "
                'select="nonzero") to keep its zeros, or select="magnitude" with a density'
            )
        if isinstance(hook, WeightNorm) and tensor_name in (f"{hook.name}_g", f"{hook.name}_v"):
            call = f"torch.nn.utils.remove_weight_norm(module, {hook.name!r})"
            return hook.name, f"computed by torch.nn.utils.weight_norm: call {call} first"
        if isinstance(hook, SpectralNorm) and tensor_name == f"{hook.name}_orig":
            call = f"torch.nn.utils.remove_spectral_norm(module, {hook.name!r})"
            return hook.name, f"computed by torch.nn.utils.spectral_norm: call {call} first"
    return None
