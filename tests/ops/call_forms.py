"""Provides one linear map, written in the ways that models write it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Apply = Callable[[Tensor, Tensor], Tensor]

FORMS: dict[str, Apply] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul_t": lambda x, w: x @ w.t(),
    "matmul_mT": lambda x, w: torch.matmul(x, w.mT),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(-1, -2).contiguous()),
    "einsum": lambda x, w: torch.einsum("...c,rc->...r", x, w),
    "left": lambda x, w: (w @ x.mT).mT,
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([-1], [1])),
    "twice": lambda x, w: F.linear(x, w) + torch.tanh(F.linear(x.flip(0), w)),
    "in_halves": lambda x, w: torch.cat([F.linear(x, half) for half in w.tensor_split(2, dim=0)], -1),
    "scaled": lambda x, w: F.linear(x, w * 0.5 + w.square()),
}


class FormLinear(nn.Linear):
    """Is a linear layer that reads its weight once a call and applies it in the given form."""

    def __init__(self, num_inputs: int, num_outputs: int, form: str, bias: bool) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        out = FORMS[self.form](x, self.weight)
        return out if self.bias is None else out + self.bias


class ReadTwice(nn.Linear):
    """Reads (unpacks) the weight anew for each of two uses."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(torch.cos(x), self.weight)
