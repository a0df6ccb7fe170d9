"""Lists odd values that somebody may pass for an argument."""

import enum
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

nan, inf = float("nan"), float("inf")


class CannotBePrinted:
    def __repr__(self) -> str:
        raise RuntimeError("not to be printed")


class Size(enum.IntEnum):
    TWO = 2


ODD: dict[str, Callable[[], Any]] = {
    repr(value)[:40]: (lambda value=value: value)  # type: ignore[misc]
    for value in (
        *(None, True, False, ..., NotImplemented, object, len, nn.Linear, 1j, Size.TWO),
        *(0, 1, 2, 3, -1, 2**31, 2**63, 2**64, 10**30, -(10**30)),
        *(0.0, 0.5, 1.0, 1.5, 2.0, -0.5, 1e-300, 1e300, nan, inf, -inf),
        *("", "x", "1", "nan", "1e9", "*", "cosine", "random", b"x", b"", "x" * 300),
        *((), (1,), (1, 2), (0.9, 0.99), (0.9, nan), (1, 2, 3), ("a", "b"), [], [1], [2, 2], ["*"], [nan, nan], [None]),
        *({}, {"x": 1}, {"*": nan}, {"*": 0.5}, {1: 0.5}, {"*": "0.5"}, set(), {1}, frozenset({0.5}), range(3)),
        *(Fraction(1, 3), Decimal("0.3"), Path("odd"), torch.float32, torch.float16, torch.device("cpu")),
        *(np.float32(0.3), np.float64(nan), np.float16(inf), np.int64(2), np.int8(-1), np.uint64(2**64 - 1)),
        *(np.bool_(True), np.str_("x"), np.array(0.5), np.array(3), np.array([2, 2]), np.array([0.5]), np.array([])),
    )
} | {
    "10**400": lambda: 10**400,
    "object()": object,
    "CannotBePrinted()": CannotBePrinted,
    "lambda": lambda: lambda *given: None,
    "generator": lambda: (i for i in range(2)),
    "tensor_0.3": lambda: torch.tensor(0.3),
    "tensor_2": lambda: torch.tensor(2),
    "tensor_True": lambda: torch.tensor(True),
    "tensor_nan": lambda: torch.tensor(nan),
    "tensor_1j": lambda: torch.tensor(1j),
    "tensor_[0.3]": lambda: torch.tensor([0.3]),
    "tensor_[2,2]": lambda: torch.tensor([2, 2]),
    "tensor_[]": lambda: torch.empty(0),
    "tensor_meta": lambda: torch.empty((), device="meta"),
    "parameter": lambda: nn.Parameter(torch.tensor(0.3)),
    "linear": lambda: nn.Linear(2, 2),
}
