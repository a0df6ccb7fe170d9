"""Computes with a dense model that has `weight * mask` in place of each site, so plain autograd is the reference."""

import torch
from torch import Tensor, nn

from smet_compile.ops import find_sites
from tests.support.blocks import Grid


def dense_weight(model: nn.Module, name: str) -> Tensor:
    """Reads a parameter by its qualified name, compact or not."""
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute).detach()


def grids_of(sparse: nn.Module) -> dict[str, Grid]:
    layouts = {name: site.layout for name, site in find_sites(sparse).items()}
    return {
        name: Grid(tuple(x.shape), tuple(x.block_shape), flatten=x.num_matrices == 1 and len(x.shape) > 2)
        for name, x in layouts.items()
    }


def masks_of(sparse: nn.Module) -> dict[str, Tensor]:
    return {name: site.compact.mask().clone() for name, site in find_sites(sparse).items()}


def fill_masked(plain: nn.Module, sparse: nn.Module) -> nn.Module:
    """Gives the dense model the sparse model's weights, times the masks. Its buffers stay."""
    grids, masks = grids_of(sparse), masks_of(sparse)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            weight = dense_weight(sparse, name)
            parameter.copy_(weight * grids[name].spread(masks[name]) if name in grids else weight)
    return plain


def parameter_of(sparse: nn.Module, name: str) -> nn.Parameter:
    sites = find_sites(sparse)
    return sites[name].values if name in sites else sparse.get_parameter(name)


def masked_gradients(plain: nn.Module, sparse: nn.Module) -> dict[str, Tensor | None]:
    """Returns the dense model's gradients by name; of a site's gradient only the active blocks."""
    grids, masks = grids_of(sparse), masks_of(sparse)
    grads: dict[str, Tensor | None] = {}
    for name, parameter in plain.named_parameters():
        grad = parameter.grad
        grads[name] = grids[name].gather(grad, masks[name]) if name in grids and grad is not None else grad
    return grads
