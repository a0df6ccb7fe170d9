"""Gives each layer an order of its own for inputs and outputs, so that tiles of different layers cover different units.

Layers that read one stream otherwise share its groups of neighbouring units, as wide as a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Reorder(torch.autograd.Function):
    """Takes the last dimension of a tensor in another order. Its gradient is the inverse order, without sums."""

    @staticmethod
    def forward(tensor: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return tensor.index_select(-1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, inverse = inputs
        ctx.save_for_backward(inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(-1, inverse), None, None


def permute_units(layers: list[nn.Linear], seed: int) -> None:
    """Makes each layer of weight W compute P W Q x, with random permutations P of its outputs and Q of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        device = layer.weight.device
        ins, outs = (torch.randperm(n, generator=generator).to(device) for n in (layer.in_features, layer.out_features))
        layer.register_forward_pre_hook(_reordering_inputs(ins))
        layer.register_forward_hook(_reordering_outputs(outs))


def _reordering_inputs(order: Tensor) -> Any:
    inverse = order.argsort()
    return lambda layer, args: (_Reorder.apply(args[0], order, inverse),)


def _reordering_outputs(order: Tensor) -> Any:
    inverse = order.argsort()
    return lambda layer, args, output: _Reorder.apply(output, order, inverse)
