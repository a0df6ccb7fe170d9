"""Each check takes every form of a number, returns plain Python, and refuses all else with a full sentence."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from smet_compile.format import arguments

nan, inf = float("nan"), float("inf")

WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
NOT_WHOLE = [True, np.bool_(True), torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), nan, inf, "3", b"3"]
NOT_WHOLE += [None, [3], np.array([3]), torch.tensor([3]), 3j, Fraction(3), torch.empty((), dtype=int, device="meta")]  # type: ignore[call-overload]
REAL = [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
NOT_REAL = [True, np.bool_(True), torch.tensor(True), nan, inf, -inf, np.float64(nan), "0.5", None, [0.5], 0.5j]
NOT_REAL += [np.array([0.5]), torch.tensor([0.5]), torch.tensor(0.5j), 10**400, Fraction(10**400), object()]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_whole_number_is_an_int(value: Any) -> None:
    found = arguments.whole_number("every", value, at_least=1)
    assert type(found) is int and found == 3


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^every: expected a whole number of at least 1, got .*; pass an int$"):
        arguments.whole_number("every", value, at_least=1)


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_a_number_is_a_float(value: Any) -> None:
    found = arguments.number("lr", value, at_least=0)
    assert type(found) is float and found == 0.5


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda value: type(value).__name__)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^lr: expected a finite number of at least 0, got .*; pass a float$"):
        arguments.number("lr", value, at_least=0)


RANGES: list[tuple[Callable[[], Any], str]] = [
    (lambda: arguments.whole_number("n", 0, at_least=1), "a whole number of at least 1, got 0; pass an int"),
    (lambda: arguments.whole_number("n", 9, at_most=8), "a whole number of at most 8, got 9"),
    (lambda: arguments.whole_number("n", 2**63, at_least=1), r"in \[1, 9223372036854775807\], got 9223372036854775808"),
    (lambda: arguments.number("x", 0, above=0, at_most=1), r"a number in \(0, 1\], got 0"),
    (lambda: arguments.number("x", 1, at_least=0, below=1), r"a number in \[0, 1\), got 1"),
    (lambda: arguments.number("x", 0, above=0), "a finite number above 0, got 0"),
    (lambda: arguments.number("x", 1, below=1), "a number below 1, got 1"),
    (lambda: arguments.flag("x", 1), "expected True or False, got 1; pass a bool"),
    (lambda: arguments.one_of("x", ["a"], ("a", "b")), r"expected one of a, b, got \['a'\]; pass one of these names"),
    (lambda: arguments.module("x", nn.Linear), "expected a model"),
    (lambda: arguments.optimizer("x", None), "expected an optimizer .*, got None; pass what holds"),
    (lambda: arguments.function("x", 3, "(a) → b"), r"expected a function \(a\) → b, got 3"),  # type: ignore[type-var]
    (lambda: arguments.path("x", b"x"), "expected the path of a file, got b'x'"),
    (lambda: arguments.path("x", "a/" + "b" * 256), "expected names of at most 255 bytes"),
    (lambda: arguments.path("x", "a\0b"), "expected the path of a file"),
    (lambda: arguments.path("x", ""), "expected the path of a file, got ''"),
    (lambda: arguments.path("x", 1), "expected the path of a file, got 1"),
]


@pytest.mark.parametrize("number", range(len(RANGES)))
def test_the_message_names_the_range(number: int) -> None:
    call, expected = RANGES[number]
    with pytest.raises(ValueError, match=expected):
        call()


def test_what_else_is_taken() -> None:
    assert arguments.flag("x", np.bool_(True)) is True and arguments.path("x", Path("a")) == "a"
    assert arguments.number("x", 3, at_least=3, at_most=3) == 3.0
    assert arguments.seed_number("x", np.uint64(2**64 - 1)) == 2**64 - 1
    torch.Generator().manual_seed(arguments.seed_number("x", -(2**63)))
    torch.Generator().manual_seed(arguments.seed_number("x", 2**64 - 1))


class CannotBePrinted:
    def __repr__(self) -> str:
        raise RuntimeError


def test_a_message_is_short_and_always_there() -> None:
    assert arguments.described(CannotBePrinted()) == "an object of class CannotBePrinted"
    assert len(arguments.described("x" * 1000)) == 60
    assert arguments.described(10**400) == "an int of 1329 bits"
    assert arguments.described(torch.ones(2)) == "a tensor of shape (2,) and torch.float32"
    assert arguments.described(nn.Linear(2, 2)) == "a module of class Linear"
