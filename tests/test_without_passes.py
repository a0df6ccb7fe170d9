"""A compiled graph that the passes do not see is right, and a warning says once why it is slow."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import torch_insides
from smet_compile.passes import disabled
from smet_compile.passes.pipeline import JointPasses

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets earlier warnings, and puts the setting of Inductor back."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_insides, "_warned", set())
    before = inductor.joint_custom_pre_pass
    yield
    inductor.joint_custom_pre_pass = before


def make() -> nn.Module:
    return smet.sparsify(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)), density=0.5, block_shape=8)


def train(model: nn.Module, call: Callable[[Tensor], Tensor], times: int = 2) -> dict[str, Tensor | None]:
    for _ in range(times):
        model.zero_grad()
        call(torch.linspace(-1, 1, 48).view(3, 16)).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def warned(train_it: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_it()
    return [str(w.message) for w in caught if "smet_compile" in str(w.message)]


def check_right(model: nn.Module, compiled: Any) -> None:
    eager = copy.deepcopy(model)
    want = train(eager, eager)
    for name, grad in train(model, compiled).items():
        torch.testing.assert_close(grad, want[name], msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_another_backend_works_and_warns_once(backend: str) -> None:
    model = make()
    compiled = torch.compile(model, backend=backend)
    (message,) = warned(lambda: check_right(model, compiled))
    assert "a compiled graph runs without the passes: it was compiled by a backend other than" in message
    assert not warned(lambda: train(model, compiled))


def nothing(graph: Any) -> None:
    """Stands for a pass of a user, without uuid."""


def test_a_pass_set_before_is_chained() -> None:
    inductor.joint_custom_pre_pass = nothing
    make()
    assert isinstance(inductor.joint_custom_pre_pass, JointPasses)
    assert inductor.joint_custom_pre_pass.before == (nothing,)
    make()
    assert inductor.joint_custom_pre_pass.before == (nothing,)


def test_a_pass_set_later_displaces_ours_and_warns() -> None:
    model = make()
    inductor.joint_custom_pre_pass = nothing
    compiled = torch.compile(model)
    (message,) = warned(lambda: check_right(model, compiled))
    assert "joint_custom_pre_pass was set to another pass after sparsify" in message


def test_a_pass_given_by_options_displaces_ours_and_warns() -> None:
    model = make()
    compiled = torch.compile(model, options={"joint_custom_pre_pass": nothing})
    (message,) = warned(lambda: check_right(model, compiled))
    assert "with options= that set another joint_custom_pre_pass" in message


def test_no_warning_where_the_passes_ran_or_were_switched_off() -> None:
    model = make()
    compiled = torch.compile(model)
    assert not warned(lambda: check_right(model, compiled))
    torch._dynamo.reset()
    with disabled():
        compiled = torch.compile(model)
        train(model, compiled)
    assert not warned(lambda: check_right(model, compiled))
