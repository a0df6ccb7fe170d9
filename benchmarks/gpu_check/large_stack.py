"""Checks a stack of more than 2^31 active weights: its first and last matrix are compared with dense fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import DTYPE, error_of, largest_error, same_bits
from benchmarks.gpu_check.records import Check
from benchmarks.layer import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from smet_compile.format import Layout, Topology
from smet_compile.ops import choose, plain

SHAPE, BLOCK = (136, 4096, 4096), 128
TINY_SHAPE, TINY_BLOCK = (3, 32, 32), 16
DENSITY = 0.97
TOKENS = 64


class Stack:
    """Holds the stack, its inputs, and its first and last matrix for themselves."""

    def __init__(self, check: Check) -> None:
        block = check.size(BLOCK, TINY_BLOCK)
        self.layout = Layout.of(check.size(SHAPE, TINY_SHAPE), (block, block))
        torch.manual_seed(0)
        mask = torch.rand(self.layout.num_blocks, device=check.device) < DENSITY
        self.topology = Topology.from_mask(mask, self.layout)
        shape = self.layout.values_shape(self.topology.num_active)
        self.values = torch.randn(shape, dtype=DTYPE, device=check.device)
        self.tokens = torch.randn(self.layout.num_matrices, TOKENS, self.layout.rows, device=check.device)
        self.tokens = self.tokens.to(DTYPE)
        per_matrix = mask.view(self.layout.num_matrices, -1)
        one = Layout.of(self.layout.matrix, self.layout.block_shape)
        self.topologies = {number: Topology.from_mask(per_matrix[number], one) for number in self.ends}
        lengths = [topology.num_active for topology in self.topologies.values()]
        self.rows = dict(zip(self.ends, (slice(0, lengths[0]), slice(shape[0] - lengths[1], shape[0])), strict=True))

    @property
    def ends(self) -> tuple[int, int]:
        return 0, self.layout.num_matrices - 1

    def dense(self, number: int) -> Tensor:
        return plain.unpack(self.values[self.rows[number]], self.topologies[number])


def run(check: Check) -> None:
    stack = Stack(check)
    with check.attempt("stack", part="unpack and pack"):
        _check_moves(check, stack)
    for part, transposed in ((FORWARD, True), (INPUT_GRADIENT, False)):
        with check.attempt("stack", part=part):
            multiply = choose.compute("masked_matmul", stack.values, stack.topology)
            out = multiply(stack.tokens, stack.values, stack.topology, transposed)
            _check_masked(check, stack, out, part, transposed)
    with check.attempt("stack", part=WEIGHT_GRADIENT):
        _check_sampled(check, stack)


def _check_moves(check: Check, stack: Stack) -> None:
    topology = stack.topology
    dense = choose.compute("unpack", stack.values, topology)(stack.values, topology)
    unpacked = all(same_bits(dense[number], stack.dense(number)) for number in stack.ends)
    packed = same_bits(choose.compute("pack", dense, topology)(dense, topology), stack.values)
    num_weights = stack.values.numel()
    check.record("stack", part="unpack and pack", weights=num_weights, passed=unpacked and packed)


def _check_masked(check: Check, stack: Stack, out: Tensor, part: str, transposed: bool) -> None:
    errors = []
    for number in stack.ends:
        weight = stack.dense(number).float()
        expected = stack.tokens[number].float() @ (weight.T if transposed else weight)
        errors.append(error_of(out[number], expected))
    _record(check, part, errors)


def _check_sampled(check: Check, stack: Stack) -> None:
    grad = stack.tokens.flip(0)
    sampled = choose.compute("sampled_matmul", grad, stack.topology)(grad, stack.tokens, stack.topology)
    errors = []
    for number in stack.ends:
        product = grad[number].float().T @ stack.tokens[number].float()
        errors.append(error_of(sampled[stack.rows[number]], plain.pack(product, stack.topologies[number])))
    _record(check, WEIGHT_GRADIENT, errors)


def _record(check: Check, part: str, errors: list[float]) -> None:
    passed = all(error <= largest_error(check) for error in errors)
    check.record("stack", part=part, errors=errors, passed=passed)
