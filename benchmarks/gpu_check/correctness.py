"""Checks what the kernels compute on the card, at real shapes: products against dense fp32, AdamW against plain torch.

New memory is filled with NaN, so what a kernel leaves out shows. Each product is made twice, and its bits compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import smet_compile as smet
from benchmarks import chosen
from benchmarks.gpu_check import large_stack
from benchmarks.gpu_check.cases import (
    SIDES,
    TINY_TOKENS,
    TOKENS,
    Case,
    Layer,
    computes,
    error_of,
    forced,
    kernels_of,
    largest_error,
    same_bits,
)
from benchmarks.gpu_check.optimizer import aged
from benchmarks.gpu_check.records import Check
from benchmarks.layer import PRODUCTS
from benchmarks.sections.optimizer import Kind

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (2736, 1024), (5461, 2048))
TINY_SHAPES, TINY_BY_NAME = ((48, 40),), Case(96, 70, 32, TINY_TOKENS)
EXPERTS = 8
STATES = (
    ("fp32", torch.float32, None),
    ("bf16, fp32 moments", torch.bfloat16, torch.float32),
    ("bf16, bf16 moments", torch.bfloat16, torch.bfloat16),
    ("bf16, 8-bit moments", torch.bfloat16, "int8"),
    ("fp32, 8-bit moments", torch.float32, "int8"),
)
_ONE_PLACE = 2**-21
"""Torch's square root in fp32 on a CPU is off by one in the last place now and then. On a GPU bits have to be equal."""


def run(check: Check) -> None:
    with new_memory_is_nan():
        check.record("new memory", passed=bool(torch.empty(3, device=check.device).isnan().all()))
        for case in cases(check):
            for kernel in kernels_of(case, check.device):
                with check.attempt("product", case=_name(case, kernel)):
                    _check_products(check, case, kernel)
        for kind in kinds(check):
            with check.attempt("update", case=kind.name):
                _check_update(check, kind)
        with check.attempt("stack"):
            large_stack.run(check)


def cases(check: Check) -> list[Case]:
    """Returns the layers that are checked, experts of a mixture last."""
    tokens = check.size(TOKENS, TINY_TOKENS)
    sides = check.size(SIDES, (16, 1))
    found = [Case(*shape, side, tokens) for shape in check.size(SHAPES, TINY_SHAPES) for side in sides]
    found += check.size([], [TINY_BY_NAME])
    expert, count = check.size(((2736, 1024), EXPERTS), ((48, 32), 3))
    sides = check.size((128, 64), (16,))
    return found + [Case(*expert, side, tokens, count, grouped=True) for side in sides]


def kinds(check: Check) -> list[Kind]:
    """Returns the states of the optimizer that are checked, each with tiles and with single weights."""
    if check.dry:
        blocks = [(16, 1)[number % 2 :][:1] for number in range(len(STATES))]
    else:
        blocks = [(64, 1)] * len(STATES)
    return [
        Kind(f"{'single weights' if block == 1 else f'{block} tiles'}, {name}", block, dtype, moments, 0, False)
        for (name, dtype, moments), of_state in zip(STATES, blocks, strict=True)
        for block in of_state
    ]


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _name(case: Case, kernel: str) -> str:
    return f"{case}, by {kernel}" if kernel else str(case)


def _check_products(check: Check, case: Case, kernel: str) -> None:
    layer = Layer(case, check.device)
    expected = layer.references()
    for part in (part for part in PRODUCTS if computes(kernel, part, case.block)):
        first, second = layer.product(part, kernel), layer.product(part, kernel)
        error = error_of(first, expected[part])
        passed = error <= largest_error(check) and same_bits(first, second)
        check.record(
            "product",
            case=_name(case, kernel),
            part=part,
            kernel=layer.kernel(part, kernel),
            error=error,
            same_bits=same_bits(first, second),
            passed=passed,
        )


def _check_update(check: Check, kind: Kind) -> None:
    """Steps two optimizers through some generations of blocks: one by the chosen kernel, one by plain torch."""
    side = check.size(1024, 32)
    names, states = [], []
    for kernel in ("", "torch"):
        with forced(kernel):
            torch.manual_seed(0)
            optimizer = aged(check, kind, side, num_matrices=2)
            optimizer.step()
            names.append(chosen.of_update(optimizer))
            states.append(_tensors_of(optimizer))
    actual, expected = states
    largest = _ONE_PLACE if check.dry and kind.dtype == torch.float32 else 0.0
    different = [name for name in expected if not _agree(actual[name], expected[name], largest)]
    kernels = {"kernel": names[0], "beside": names[1]}
    check.record("update", case=kind.name, **kernels, different=different, passed=not different)


def _tensors_of(optimizer: smet.ActiveAdamW) -> dict[str, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {f"values {number}": p.detach() for number, p in enumerate(parameters)}
    for number, p in enumerate(parameters):
        found |= {f"{name} {number}": x for name, x in optimizer.state[p].items() if isinstance(x, Tensor)}
    return found


def _agree(first: Tensor, second: Tensor, largest: float) -> bool:
    """Tells whether two tensors are of the same bits, or differ by at most ``largest`` of their size."""
    if first.shape != second.shape:
        return False
    return torch.allclose(first, second, rtol=largest, atol=0) if largest else torch.equal(first, second)
