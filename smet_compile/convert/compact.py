"""Makes weights compact: draws their active blocks, and registers the parametrizations, all or none."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smet_compile.convert.choose import Choice
from smet_compile.convert.earlier_optimizers import forget, watch
from smet_compile.convert.nonzero import nonzero_blocks
from smet_compile.convert.report import remember_reasons
from smet_compile.convert.undo import Undo
from smet_compile.format import all_block_means, sample_evenly, sample_positions
from smet_compile.ops import CompactWeight, reads, saved_weights
from smet_compile.ops.sites import compact_names, parametrizations

SELECTS = ("random", "magnitude", "nonzero")


@dataclass(frozen=True)
class Drawn:
    """A weight that is dense yet, and the parametrization that will make it compact."""

    choice: Choice
    compact: CompactWeight


@torch.no_grad()
def draw(choice: Choice, select: str, rescale: bool, seed: int) -> Drawn:
    """Selects the active blocks of a weight, and packs it once for trial. Changes nothing."""
    mask = select_blocks(choice, select, seed)
    compact = CompactWeight(choice.layout, mask, choice.num_active, choice.weight.name)
    compact.select, compact.rescale = select, rescale
    compact.right_inverse(choice.weight.tensor)
    return Drawn(choice, compact)


@torch.no_grad()
def make_compact(model: nn.Module, drawn: Sequence[Drawn], reasons: Mapping[str, str]) -> None:
    """Makes all drawn weights of ``model`` compact, and remembers for what ``reasons`` others stay dense.

    First everything is registered while the weights are dense, which can be undone. Then they are packed one by one,
    the largest first: no other one needs more memory than it, and until it is packed nothing is lost. Where a later one
    fails all the same, those before it stay compact, and the others are dense again.
    """
    undo = Undo(model, [each.choice.weight for each in drawn])
    for each in drawn:
        each.compact.parameter_order = _parameter_order(each.choice.weight.module)
    try:
        for each in drawn:
            weight = each.choice.weight
            parametrize.register_parametrization(weight.module, weight.tensor_name, _Dense(), unsafe=True)
            reads.accept_parameters(weight.module, parametrizations)
            each.compact.train(weight.module.training)
        for each in drawn:
            saved_weights.install(each.choice.weight.module, owner=True)
        saved_weights.install(model)
        remember_reasons(model, dict(reasons))
        for each in sorted(drawn, key=_num_bytes, reverse=True):
            _pack(each)
    except BaseException as error:
        packed = [each.choice.weight for each in drawn if _is_packed(each)]
        undo(packed)
        if packed:
            names = ", ".join(weight.name for weight in packed)
            error.add_note(f"sparsify: broke off after {len(packed)} of {len(drawn)} weights: {names} are compact now")
        raise


class _Dense(nn.Module):
    """Keeps the place of the parametrization of a weight that is not packed yet."""

    def forward(self, dense: Tensor) -> Tensor:
        return dense


def _parameter_order(module: nn.Module) -> list[str]:
    """Names of the parameters of ``module`` in the order they had when all of them were dense."""
    for name in compact_names(module):
        compact: CompactWeight = parametrizations(module)[name][0]
        return compact.parameter_order
    return list(module._parameters)


def _num_bytes(drawn: Drawn) -> int:
    return math.prod(drawn.choice.layout.values_shape(drawn.choice.num_active)) * drawn.choice.weight.tensor.itemsize


def _is_packed(drawn: Drawn) -> bool:
    chains = parametrizations(drawn.choice.weight.module)
    name = drawn.choice.weight.tensor_name
    return name in chains and chains[name][0] is drawn.compact


def _pack(drawn: Drawn) -> None:
    """Whatever fails or interrupts, the parameter holds the whole dense weight or its values."""
    weight, compact = drawn.choice.weight, drawn.compact
    tensor, dense, grad = weight.tensor, weight.tensor.detach(), weight.tensor.grad
    chain = parametrizations(weight.module)[weight.tensor_name]
    place = chain[0]
    try:
        watch(tensor, dense.shape)
        chain[0] = compact
        chain.right_inverse(dense)
        tensor.grad = None
        if compact.rescale:
            tensor.mul_(math.sqrt(drawn.choice.layout.num_blocks / drawn.choice.num_active))
    except BaseException:
        chain[0] = place
        if tensor.shape != dense.shape:
            tensor.data = dense
        tensor.grad = grad
        forget(tensor)
        raise


def select_blocks(choice: Choice, select: str, seed: int) -> Tensor:
    """Returns the mask (num_blocks,) of the blocks that start active."""
    weight, layout = choice.weight, choice.layout
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool, device=weight.tensor.device)
    if weight.tensor.is_meta:
        return mask
    if select == "nonzero":
        return nonzero_blocks(weight.tensor, layout)
    if select == "magnitude":
        positions = all_block_means(weight.tensor, layout).topk(choice.num_active, sorted=False).indices
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {weight.name}".encode()))
        if layout.tiles:
            positions = sample_evenly(mask, mask, layout, choice.num_active, generator)
        else:
            positions = sample_positions(mask, choice.num_active, generator)
    mask[positions] = True
    return mask
