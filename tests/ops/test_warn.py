"""A warning of an op is given once, and does not stop a backward."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.ops import torch_insides


@pytest.fixture(autouse=True)
def none_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_insides, "_warned", set())


class Warns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        assert not torch_insides.is_in_backward()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        assert torch_insides.is_in_backward()
        torch_insides.warn_once("in backward")
        return 2 * grad


def test_once() -> None:
    with pytest.warns(UserWarning) as given:
        for message, key in (("a", None), ("a", None), ("b", None), ("c", "key"), ("d", "key")):
            torch_insides.warn_once(message, key)
    assert [str(each.message) for each in given] == ["a", "b", "c"]


def test_an_error_is_raised_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a"):
            torch_insides.warn_once("a")
        torch_insides.warn_once("a")


def test_in_a_backward_it_is_shown_and_not_raised() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="in backward"):
        warnings.simplefilter("error")
        Warns.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]
    assert not torch_insides.is_in_backward()
