"""Makes one weight compact: selects its active blocks and registers the parametrization."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from smet_compile.convert.choose import Choice
from smet_compile.convert.earlier_optimizers import watch
from smet_compile.format import all_block_means, sample_evenly, sample_positions
from smet_compile.ops import CompactWeight, reads
from smet_compile.ops.sites import compact_names, parametrizations

SELECTS = ("random", "magnitude")


@torch.no_grad()
def make_compact(choice: Choice, select: str, rescale: bool, seed: int) -> None:
    """The parameter object stays, now holding the values: an optimizer that holds it holds the values."""
    weight, layout, num_active = choice.weight, choice.layout, choice.num_active
    weight.tensor.grad = None
    made_before = [parametrizations(weight.module)[name][0] for name in compact_names(weight.module)]
    order = made_before[0].parameter_order if made_before else list(weight.module._parameters)
    dense_shape = weight.tensor.shape
    compact = CompactWeight(layout, select_blocks(choice, select, seed), num_active, weight.name)
    parametrize.register_parametrization(weight.module, weight.tensor_name, compact, unsafe=True)
    reads.accept_parameters(weight.module, parametrizations)
    compact.parameter_order = order
    compact.select, compact.rescale = select, rescale
    watch(weight.tensor, dense_shape)
    if rescale:
        weight.tensor.mul_(math.sqrt(layout.num_blocks / num_active))


def select_blocks(choice: Choice, select: str, seed: int) -> Tensor:
    """Returns the mask (num_blocks,) of the blocks that start active."""
    weight, layout = choice.weight, choice.layout
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool, device=weight.tensor.device)
    if weight.tensor.is_meta:
        return mask
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
