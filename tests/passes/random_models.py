"""Makes random models of the call forms, with residuals, shared weights, checkpointed regions and autocast."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smet_compile as smet

SIZE, INNER, EXPERTS = 16, 24, 3
Apply = Callable[[Tensor, Tensor], Tensor]


def flat(apply: Apply) -> Apply:
    """Returns the input as one matrix of tokens."""
    return lambda x, w: apply(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], -1)


def tokens(apply: Apply) -> Apply:
    """Returns the input as (1, T, ...)."""
    return lambda x, w: apply(x.reshape(1, -1, x.shape[-1]), w).view(*x.shape[:-1], -1)


UP: dict[str, Apply] = {
    "linear": lambda x, w: F.linear(x, w),
    "mT": lambda x, w: x @ w.mT,
    "contiguous": lambda x, w: torch.matmul(x, w.t().contiguous()),
    "mm": flat(lambda x, w: torch.mm(x, w.t())),
    "left": tokens(lambda x, w: (w @ x.mT).mT),
    "einsum": tokens(lambda x, w: torch.einsum("btc,rc->btr", x, w)),
    "einsum, weight first": tokens(lambda x, w: torch.einsum("rc,btc->btr", w, x)),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([-1], [1])),
    "twice": lambda x, w: F.linear(x, w) + F.linear(x.sin(), w),
    "halves": lambda x, w: torch.cat([F.linear(x, half) for half in w.chunk(2)], -1),
    "split": lambda x, w: torch.cat([F.linear(x.cos(), part) for part in w.split([5, 19])], -1),
    "bmm": tokens(lambda x, w: torch.bmm(x, w.t().expand(1, SIZE, INNER))),
    "addmm": flat(lambda x, w: torch.addmm(x[:, :1], x, w.t())),
    "column and back": lambda x, w: F.linear(F.linear(x, w).tanh() @ w, w),
}
UNFUSED: dict[str, Apply] = {
    "scaled": lambda x, w: F.linear(x, w * 0.5),
    "normalized": lambda x, w: F.linear(x, F.normalize(w, dim=-1)),
    "strided rows": lambda x, w: torch.cat([F.linear(x, w[::2]), F.linear(x, w[1::2])], -1),
}
DOWN: dict[str, Apply] = {
    "conv1d": lambda x, w: x @ w,
    "addmm": flat(lambda x, w: torch.addmm(x[:, :SIZE], x, w)),
    "linear": lambda x, w: F.linear(x, w.t()),
    "left": tokens(lambda x, w: (w.t() @ x.mT).mT),
    "einsum": tokens(lambda x, w: torch.einsum("btr,rc->btc", x, w)),
}


@dataclass(frozen=True)
class Spec:
    """Describes one layer. Layers with the same weight number share the weight."""

    up: str
    down: str
    up_weight: int
    down_weight: int
    experts: bool
    residual: bool
    checkpointed: bool
    autocast: bool


class RandomModel(nn.Module):
    def __init__(self, specs: list[Spec], dtype: torch.dtype) -> None:
        super().__init__()
        self.specs = specs
        self.bias = nn.Parameter(torch.randn(INNER, dtype=dtype))
        used = {number for spec in specs for number in (spec.up_weight, spec.down_weight)}
        self.dense = nn.ModuleDict({f"w{n}": Holder((INNER, SIZE), dtype) for n in sorted(used)})
        if any(spec.experts for spec in specs):
            self.dense["experts"] = Holder((EXPERTS, INNER, SIZE), dtype)

    def forward(self, x: Tensor) -> Tensor:
        for spec in self.specs:
            out = checkpoint(self.layer, x, spec, use_reentrant=False) if spec.checkpointed else self.layer(x, spec)
            x = (x + out) if spec.residual else out
        return x * 0.5

    def layer(self, x: Tensor, spec: Spec) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if spec.autocast else nullcontext():
            hidden = torch.tanh((UP | UNFUSED)[spec.up](x, self.dense[f"w{spec.up_weight}"].weight) + self.bias)
            if spec.experts:
                hidden = hidden + self.mixture(x)
            return DOWN[spec.down](hidden, self.dense[f"w{spec.down_weight}"].weight).to(x.dtype)

    def mixture(self, x: Tensor) -> Tensor:
        stacked = x.reshape(1, -1, SIZE).expand(EXPERTS, -1, -1)
        return torch.bmm(stacked, self.dense["experts"].weight.mT).mean(0).view(*x.shape[:-1], INNER)


class Holder(nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype) / SIZE**0.5)
        self.num_experts = shape[0]


@dataclass(frozen=True)
class Case:
    specs: list[Spec]
    dtype: torch.dtype
    block: Any
    lead: tuple[int, ...]

    @property
    def all_fused(self) -> bool:
        return all(spec.up in UP for spec in self.specs)

    @property
    def autocast(self) -> bool:
        return any(spec.autocast for spec in self.specs)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return smet.sparsify(RandomModel(self.specs, self.dtype), 0.5, block_shape=self.block, include="*.weight")

    def input(self) -> Tensor:
        return torch.randn(*self.lead, SIZE, dtype=self.dtype, requires_grad=True)


@st.composite
def cases(draw: st.DrawFn, max_layers: int = 3) -> Case:
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    autocast = st.booleans() if dtype == torch.float32 else st.just(False)
    spec = st.builds(
        Spec,
        up=st.sampled_from([*UP, *UNFUSED]),
        down=st.sampled_from([*DOWN]),
        up_weight=st.integers(0, 2),
        down_weight=st.integers(0, 2),
        experts=st.booleans(),
        residual=st.booleans(),
        checkpointed=st.booleans(),
        autocast=autocast,
    )
    specs = draw(st.lists(spec, min_size=1, max_size=max_layers))
    block = draw(st.sampled_from([1, (1, 4), 8, (5, 7)]))
    return Case(specs, dtype, block, draw(st.sampled_from([(5,), (2, 3), (2, 1, 3), (1,)])))
