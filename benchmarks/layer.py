"""One linear layer, dense and compact: its three products and its update, each a call that can be measured.

Shape suffixes: T tokens, R outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import smet_compile as smet
from benchmarks.ratios import Clock, Pairs, Work, in_turns
from benchmarks.settings import Settings
from smet_compile.ops import Site, find_sites
from smet_compile.ops.choose import Case, kernel_of

DENSITY = 0.25
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE = "forward", "input gradient", "weight gradient", "update"
PRODUCTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
_OPS = ("masked_matmul", "sampled_matmul")
Block = int | tuple[int, int]


@dataclass(frozen=True)
class Size:
    """A layer's input and output features, and the tokens it is given."""

    tokens: int
    cols: int
    rows: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.cols}→{self.rows}"

    @property
    def flops(self) -> int:
        """Of one dense product."""
        return 2 * self.tokens * self.cols * self.rows


class Layers:
    """A dense layer and a compact one of the same size, on the same inputs and output gradients."""

    def __init__(self, size: Size, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.input_TC = torch.randn(size.tokens, size.cols, dtype=dtype, device=device)
        self.grad_output_TR = torch.randn(size.tokens, size.rows, dtype=dtype, device=device)
        self._dense, self._compact = (
            nn.Linear(size.cols, size.rows, bias=False, dtype=dtype, device=device) for _ in range(2)
        )
        smet.sparsify(self._compact, DENSITY, block_shape=block)
        self.site = next(iter(find_sites(self._compact).values()))
        self._state_dtype = dtype if dtype == torch.bfloat16 else None

    @property
    def kernels(self) -> str:
        return kernels_of([self.site])

    def dense(self, part: str) -> Work:
        """``part`` of a step of the dense layer."""
        weight_RC = self._dense.weight.detach()
        if part == UPDATE:
            optimizer = torch.optim.AdamW(self._dense.parameters(), fused=True)
            self._dense.weight.grad = torch.randn_like(weight_RC)
            return optimizer.step
        return {
            FORWARD: lambda: self.input_TC @ weight_RC.T,
            INPUT_GRADIENT: lambda: self.grad_output_TR @ weight_RC,
            WEIGHT_GRADIENT: lambda: self.grad_output_TR.T @ self.input_TC,
        }[part]

    def compact(self, part: str) -> Work:
        """``part`` of a step of the compact layer."""
        compact, values = self.site.compact, self.site.values.detach()
        if part == UPDATE:
            optimizer = smet.ActiveAdamW(self._compact, state_dtype=self._state_dtype)
            self.site.values.grad = torch.randn_like(values)
            return optimizer.step
        ops, where = torch.ops.smet, (compact.topology, compact.index, *compact.op_layout())
        return {
            FORWARD: lambda: ops.masked_matmul(self.input_TC, values, *where, True),
            INPUT_GRADIENT: lambda: ops.masked_matmul(self.grad_output_TR, values, *where, False),
            WEIGHT_GRADIENT: lambda: ops.sampled_matmul(self.grad_output_TR, self.input_TC, *where, len(values)),
        }[part]


def measure(layers: Layers, parts: tuple[str, ...], settings: Settings, clock: Clock) -> dict[str, Pairs]:
    """Each part of a step, dense and compact in turns."""
    return {part: in_turns(layers.dense(part), layers.compact(part), settings.repeats, clock) for part in parts}


def kernels_of(sites: list[Site]) -> str:
    """Names of the kernels that multiply with these weights."""
    cases = [Case(site.values.device, site.values.dtype, site.layout, site.num_active) for site in sites]
    return ", ".join(dict.fromkeys(kernel_of(op, case) for case in cases for op in _OPS))
