"""How weight and moments are kept between steps: as numbers of their dtype, or as codes with a scale by group.

Both are read as numbers to compute with, and written where a gradient was finite, rounded with noise or to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.ops import reference as ref
from smet_compile.ops.codes import CodeFormat, Groups, decode, encode


class Numbers(NamedTuple):
    """Rows of a tensor in fp64, fp32, fp16 or bf16."""

    tensor: Tensor

    @property
    def takes_noise(self) -> bool:
        return self.tensor.dtype == torch.bfloat16

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def write(self, before: Tensor, after: Tensor, finite: Tensor, noise: Tensor | None) -> None:
        if noise is not None:
            after, before = ref.round_stochastic(after, noise), self.tensor
        self.tensor.copy_(torch.where(finite, after, before))


class Codes(NamedTuple):
    """Rows of the codes of a moment, which are whole groups, and all of its scales."""

    codes: Tensor
    scales: Tensor
    groups: Groups
    kind: CodeFormat

    @property
    def takes_noise(self) -> bool:
        return True

    def read(self, dtype: torch.dtype) -> Tensor:
        return decode(self.codes, self.groups.spread(self.scales[self.groups.numbers]), self.kind).to(dtype)

    def write(self, before: Tensor, after: Tensor, finite: Tensor, noise: Tensor | None) -> None:
        """Where no block of a group was updated, its codes and its scale stay; where some were, all are coded anew."""
        moment = torch.where(finite, after, before)
        if not self.kind.signed:
            moment = moment.clamp(max=torch.finfo(moment.dtype).max)
        changed = self.groups.largest(finite.to(moment.dtype)) > 0
        scales = torch.where(changed, self.groups.largest(moment.abs()), self.scales[self.groups.numbers])
        codes = encode(moment, self.groups.spread(scales), self.kind, noise)
        self.codes.copy_(torch.where(self.groups.spread(changed), codes, self.codes))
        self.scales[self.groups.numbers] = scales
