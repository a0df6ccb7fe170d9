"""Makes random small networks as lists of steps: torch runs them, and an oracle counts them by brute force."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.format import pack_bits
from smet_compile.ops import find_sites

WIDTH = 6
BINARY = ("add", "gate", "swap_and_add")
UNARY = ("relu", "sigmoid", "norm", "halves", "heads", "dense")


@dataclass(frozen=True)
class Step:
    """Does ``kind`` with the values ``sources``, numbers of earlier ones; 0 is the input, each step makes one more."""

    kind: str
    sources: tuple[int, ...]


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    steps = []
    for number in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(("linear", "linear", "biased", *BINARY, *UNARY)))
        count = 2 if kind in BINARY else 1
        earlier = st.integers(max(0, number - 3), number)
        steps.append(Step(kind, tuple(draw(earlier) for _ in range(count))))
    return steps


class Network(nn.Module):
    """Maps (batch, tokens, WIDTH) to that shape, step after step."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        for number, step in enumerate(steps):
            if step.kind in ("linear", "biased", "dense"):
                self.layers[f"{step.kind}{number}"] = nn.Linear(WIDTH, WIDTH, bias=step.kind == "biased")

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, step in enumerate(self.steps):
            name = f"{step.kind}{number}"
            made = self.layers[name] if name in self.layers else TORCH[step.kind]
            values.append(made(*(values[i] for i in step.sources)))
        return values[-1]


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _heads(x: Tensor) -> Tensor:
    """Moves features to heads and back, as attention does."""
    split = x.view(*x.shape[:-1], 2, WIDTH // 2).transpose(1, 2)
    return split.contiguous().transpose(1, 2).reshape(x.shape)


def _halves(x: Tensor) -> Tensor:
    """Exchanges halves as rotary embeddings do."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


TORCH: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "gate": lambda a, b: a * b,
    "swap_and_add": lambda a, b: a + b.flip(-1),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "norm": _norm,
    "halves": _halves,
    "heads": _heads,
}


@dataclass
class Counted:
    """Holds, for each unit, the number of paths to it and whether it can be other than zero, by brute force."""

    paths: Tensor
    nonzero: Tensor


@dataclass
class Oracle:
    """Writes path numbers as a polynomial of the 0/1 weights, whose derivatives say what lies on a path."""

    masks: dict[str, Tensor]
    came: dict[str, Tensor]
    went: dict[str, Tensor]
    total: Tensor

    @classmethod
    def of(cls, steps: list[Step], masks: dict[str, Tensor]) -> "Oracle":
        masks = {name: mask.double().requires_grad_() for name, mask in masks.items()}
        oracle = cls(masks, {}, {}, torch.zeros(()))
        values = [Counted(torch.ones(WIDTH, dtype=torch.float64), torch.ones(WIDTH, dtype=torch.bool))]
        for number, step in enumerate(steps):
            values.append(oracle._count(f"{step.kind}{number}", step.kind, [values[i] for i in step.sources]))
        oracle.total = values[-1].paths.sum()
        return oracle

    def _count(self, name: str, kind: str, given: list[Counted]) -> Counted:
        x, y = given[0], given[-1]
        if kind in ("linear", "biased", "dense"):
            mask = self.masks[name]
            self.came[name] = x.paths
            self.went[name] = mask @ x.paths
            self.went[name].retain_grad()
            nonzero = (mask.detach() @ x.nonzero.double() > 0) | (kind == "biased")
            return Counted(self.went[name], nonzero)
        if kind == "gate":
            return Counted(x.paths * y.nonzero + y.paths * x.nonzero, x.nonzero & y.nonzero)
        if kind in ("add", "swap_and_add"):
            other = Counted(y.paths.flip(0), y.nonzero.flip(0)) if kind == "swap_and_add" else y
            return Counted(x.paths + other.paths, x.nonzero | other.nonzero)
        if kind == "sigmoid":
            return Counted(x.paths, torch.ones_like(x.nonzero))
        if kind == "halves":
            return Counted(x.paths.roll(WIDTH // 2), x.nonzero.roll(WIDTH // 2))
        return x

    def derivatives(self) -> None:
        """Fills ``.grad`` of masks and rows."""
        if self.total.requires_grad:
            self.total.backward()


def sparse(steps: list[Step], density: float, block_shape: Any, seed: int) -> nn.Module | None:
    """Returns the network with its linear layers sparse but those called dense; None where it has no others."""
    torch.manual_seed(seed)
    network = Network(steps)
    names = [name for name in network.layers if not name.startswith("dense")]
    if not names:
        return None
    include = [f"layers.{name}.weight" for name in names]
    return scattered(smet.sparsify(network, density, block_shape=block_shape, include=include, seed=seed), seed)


def scattered(model: nn.Module, seed: int) -> nn.Module:
    """Spreads the active blocks of ``model`` anywhere, so that some rows and columns have none."""
    generator = torch.Generator().manual_seed(seed)
    for site in find_sites(model).values():
        mask = torch.zeros(site.layout.num_blocks, dtype=torch.bool)
        mask[torch.randperm(mask.numel(), generator=generator)[: site.num_active]] = True
        site.compact.topology = pack_bits(mask)
    return model


def masks_of(network: nn.Module) -> dict[str, Tensor]:
    """Returns which weights of every linear layer, by its name, are inside of active blocks, as 0 and 1."""
    assert isinstance(network, Network)
    masks = {name: torch.ones(WIDTH, WIDTH) for name in network.layers}
    for name, site in find_sites(network).items():
        layout, (bm, bn) = site.layout, site.layout.block_shape
        blocks = site.mask().view(layout.block_rows, layout.block_cols)
        wide = blocks.repeat_interleave(bm, 0).repeat_interleave(bn, 1)
        masks[name.split(".")[1]] = wide[:WIDTH, :WIDTH].float()
    return masks
