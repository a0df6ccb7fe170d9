"""Makes one linear layer, dense and compact, with its three products and its update as calls to be measured.

Shape suffixes: T tokens, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

import smet_compile as smet
from benchmarks import chosen
from benchmarks.ratios import Clock, Pairs, Work, in_turns
from benchmarks.settings import Settings
from smet_compile.ops import find_sites

DENSITY = 0.25
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE = "forward", "input gradient", "weight gradient", "update"
PRODUCTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
Block = int | tuple[int, int]
SINGLE, RUNS = (1, 1), (1, 16)


def name_of(block: Block) -> str:
    """Returns a block shape in words: "64 tiles", "single weights", "runs of 16"."""
    if isinstance(block, int):
        return f"{block} tiles"
    return "single weights" if block == SINGLE else f"runs of {block[1]}"


@dataclass(frozen=True)
class Size:
    """Holds a layer's input and output features, and the number of tokens."""

    tokens: int
    cols: int
    rows: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.cols}→{self.rows}"

    @property
    def flops(self) -> int:
        """Counts the operations of one dense product."""
        return 2 * self.tokens * self.cols * self.rows


class Dense:
    """Is a dense layer with its inputs and the gradients of its outputs."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.input_TC = torch.randn(size.tokens, size.cols, dtype=dtype, device=device)
        self.grad_output_TR = torch.randn(size.tokens, size.rows, dtype=dtype, device=device)
        self.weight_RC = torch.randn(size.rows, size.cols, dtype=dtype, device=device)

    def part(self, name: str) -> Work:
        """Returns one part of a step, as a call."""
        if name == UPDATE:
            parameter = nn.Parameter(self.weight_RC)
            parameter.grad = torch.randn_like(parameter)
            return torch.optim.AdamW([parameter], fused=True).step
        return {
            FORWARD: lambda: self.input_TC @ self.weight_RC.T,
            INPUT_GRADIENT: lambda: self.grad_output_TR @ self.weight_RC,
            WEIGHT_GRADIENT: lambda: self.grad_output_TR.T @ self.input_TC,
        }[name]


class Compact:
    """Is a compact layer of a dense one's size, with the same inputs and gradients."""

    def __init__(self, dense: Dense, block: Block, density: float) -> None:
        self._dense = dense
        rows, cols = dense.weight_RC.shape
        self._layer = nn.Linear(cols, rows, bias=False, dtype=dense.weight_RC.dtype, device=dense.weight_RC.device)
        smet.sparsify(self._layer, density, block_shape=block)
        self._site = next(iter(find_sites(self._layer).values()))

    @property
    def kernels(self) -> str:
        return chosen.of_products([self._site])

    @property
    def density(self) -> float:
        return self._site.density

    def part(self, name: str) -> Work:
        """Returns one part of a step, as a call."""
        compact, values = self._site.compact, self._site.values.detach()
        if name == UPDATE:
            moment_dtype = torch.bfloat16 if values.dtype == torch.bfloat16 else None
            self._site.values.grad = torch.randn_like(values)
            return smet.ActiveAdamW(self._layer, moment_dtype=moment_dtype).step
        input_TC, grad_output_TR = self._dense.input_TC, self._dense.grad_output_TR
        ops, where = torch.ops.smet, (compact.topology, compact.lists, compact.layout.text)
        return {
            FORWARD: lambda: ops.masked_matmul(input_TC, values, *where, True),
            INPUT_GRADIENT: lambda: ops.masked_matmul(grad_output_TR, values, *where, False),
            WEIGHT_GRADIENT: lambda: ops.sampled_matmul(grad_output_TR, input_TC, *where, len(values)),
        }[name]


@dataclass(frozen=True)
class Measured:
    """Holds the times of a compact layer beside the dense one, for each part of a step."""

    kernels: str
    density: float
    parts: dict[str, Pairs]

    @property
    def products(self) -> Pairs:
        return Pairs.of_sum(self.parts[name] for name in PRODUCTS)


def measure(
    size: Size,
    blocks: Iterable[Block],
    dtype: torch.dtype,
    settings: Settings,
    parts: tuple[str, ...] = PRODUCTS,
    density: float = DENSITY,
) -> list[Measured]:
    """Measures layers of each kind of block in turns with the dense one, part by part of a step."""
    dense = Dense(size, dtype, settings.device)
    layers, clock = [Compact(dense, block, density) for block in blocks], Clock(settings.device)
    by_part = [
        in_turns(dense.part(name), [layer.part(name) for layer in layers], settings.repeats, clock) for name in parts
    ]
    by_layer = zip(*by_part, strict=True)
    return [
        Measured(layer.kernels, layer.density, dict(zip(parts, pairs, strict=True)))
        for layer, pairs in zip(layers, by_layer, strict=True)
    ]
