"""Makes compact layers of the shapes that are checked and measured, and their products as calls.

Shape suffixes: S stacked matrices, T tokens, R outputs, C inputs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check.records import Check
from benchmarks.layer import DENSITY, FORWARD, INPUT_GRADIENT, PRODUCTS, WEIGHT_GRADIENT
from smet_compile.format import Layout, Topology
from smet_compile.ops import choose, plain

DTYPE = torch.bfloat16
SIDES = (128, 64, 32, 1)
NARROWEST_GRADIENT_BY_NAME = 64
VARIABLE = "SMET_COMPILE_KERNEL"
BY_NAME = "triton_tma"
"""The kernel of products that is used only where the variable names it."""
TOKENS, TINY_TOKENS = 4096, 24
_LARGEST_ERROR, _LARGEST_ERROR_INTERPRETED = 2e-3, 4e-3
"""Relative root mean square of the difference in bf16; twice that in the interpreter, which does not round."""


class Case(NamedTuple):
    """Describes a layer.

    Args:
        matrices: of a stack. grouped: their tokens come sorted by matrix, with offsets.
    """

    rows: int
    cols: int
    block: int
    tokens: int
    matrices: int = 1
    grouped: bool = False
    density: float = DENSITY

    def __str__(self) -> str:
        kind = "single weights" if self.block == 1 else f"{self.block} tiles"
        stack = f"{self.matrices} {'experts' if self.grouped else 'matrices'} of " if self.matrices > 1 else ""
        return f"{kind}, {stack}{self.cols}→{self.rows}, {self.tokens} tokens"

    @property
    def layout(self) -> Layout:
        stack = (self.matrices,) if self.matrices > 1 else ()
        return Layout.of((*stack, self.rows, self.cols), (self.block, self.block))


class Layer:
    """Holds a compact weight with random blocks, its inputs, and the gradients of its outputs, all at random."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        layout = case.layout
        torch.manual_seed(0)
        mask = torch.rand(layout.num_blocks, device=device) < case.density
        self.topology = Topology.from_mask(mask, layout)
        self.values = self._values(layout, device)
        stack = (case.matrices,) if case.matrices > 1 and not case.grouped else ()
        self.input = torch.randn(*stack, case.tokens, case.cols, device=device).to(DTYPE)
        self.grad = torch.randn(*stack, case.tokens, case.rows, device=device).to(DTYPE)
        self.bias = None if stack else torch.randn(case.rows, device=device).to(DTYPE)
        self.ends = _uneven_ends(case) if case.grouped else None
        self.offsets = None if self.ends is None else torch.tensor(self.ends, dtype=torch.int32, device=device)

    def _values(self, layout: Layout, device: torch.device) -> Tensor:
        """Draws the weights. Entries that hang over an edge are zero."""
        values = torch.randn(layout.values_shape(self.topology.num_active), dtype=DTYPE, device=device)
        if layout.rows % layout.block_shape[0] or layout.cols % layout.block_shape[1]:
            return plain.pack(plain.unpack(values, self.topology), self.topology)
        return values

    def kernel(self, part: str, kernel: str = "") -> str:
        """Returns the name of the kernel that computes a product where ``kernel`` is forced."""
        op = "sampled_matmul" if part == WEIGHT_GRADIENT else "masked_matmul"
        with forced(kernel):
            return choose.kernel_of(op, choose.case_of(self.values, self.topology, self.case.grouped))

    def product(self, part: str, kernel: str = "") -> Tensor:
        """Computes one of ``PRODUCTS`` by ``kernel``, or the one that is chosen. A forward product adds the bias."""
        with forced(kernel):
            return self._product(part)

    def _product(self, part: str) -> Tensor:
        values, topology, offsets = self.values, self.topology, self.offsets
        if part == WEIGHT_GRADIENT:
            sampled = choose.compute("sampled_matmul", self.grad, topology, offsets is not None)
            return sampled(self.grad, self.input, topology, offsets)
        masked = choose.compute("masked_matmul", values, topology, offsets is not None)
        if part == FORWARD:
            return masked(self.input, values, topology, True, self.bias, offsets)
        return masked(self.grad, values, topology, False, None, offsets)

    def references(self) -> dict[str, Tensor]:
        """Computes all products with dense fp32 matrices."""
        dense = plain.unpack(self.values, self.topology).float().view(-1, self.case.rows, self.case.cols)
        found = [self._reference(number, dense[number]) for number in range(len(dense))]
        join = torch.cat if self.ends is not None else torch.stack if len(dense) > 1 else lambda parts: parts[0]
        outs, grads, weights = (list(each) for each in zip(*found, strict=True))
        weight = torch.stack(weights).view(self.case.layout.shape)
        return {
            FORWARD: join(outs),
            INPUT_GRADIENT: join(grads),
            WEIGHT_GRADIENT: plain.pack(weight, self.topology),
        }

    def _reference(self, number: int, weight_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        input_TC, grad_TR = self._tokens_of(self.input, number).float(), self._tokens_of(self.grad, number).float()
        out_TR = input_TC @ weight_RC.T + (0 if self.bias is None else self.bias.float())
        return out_TR, grad_TR @ weight_RC, grad_TR.T @ input_TC

    def _tokens_of(self, tokens: Tensor, number: int) -> Tensor:
        if self.ends is not None:
            return tokens[([0, *self.ends])[number] : self.ends[number]]
        return tokens[number] if tokens.dim() == 3 else tokens


def _uneven_ends(case: Case) -> list[int]:
    """Returns where the tokens of each matrix end: the second has none, the last has those that are left."""
    share = case.tokens // case.matrices
    ends = [share * (number + 1) + number % 3 for number in range(case.matrices)]
    ends[1], ends[-1] = ends[0], case.tokens
    return ends


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Names a kernel in the environment; an empty name is none."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def computes(kernel: str, part: str, block: int) -> bool:
    """Tells whether a kernel computes a product of tiles: ``BY_NAME`` makes no weight gradient of tiles below 64."""
    return kernel != BY_NAME or part != WEIGHT_GRADIENT or block >= NARROWEST_GRADIENT_BY_NAME


def kernels_of(case: Case, device: torch.device) -> list[str]:
    """Returns the names to force one after another: none, and that of the kernel that is used only by name."""
    with forced(BY_NAME):
        found = choose.kernel_of("masked_matmul", choose.Case(device, DTYPE, case.layout, 1, case.grouped))
    return ["", BY_NAME] if found == BY_NAME else [""]


def calls_of(case: Case, device: torch.device) -> list[Callable[[], Tensor]]:
    """Returns the three products of a layer as calls, by each kernel in turn."""
    layer = Layer(case, device)
    return [
        functools.partial(layer.product, part, kernel)
        for kernel in kernels_of(case, device)
        for part in PRODUCTS
        if computes(kernel, part, case.block)
    ]


def largest_error(check: Check) -> float:
    """Returns how large ``error_of`` may be."""
    return _LARGEST_ERROR_INTERPRETED if check.dry else _LARGEST_ERROR


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of the difference by that of what is expected; NaN where something is missing."""
    difference = torch.linalg.vector_norm(actual.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float())) if difference else 0.0


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
