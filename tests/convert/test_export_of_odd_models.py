"""export_dense copies wrapped models, and models that keep tensors with a graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import same_bits
from tests.support.states import Unchanged
from tests.support.training import train


@dataclass
class Cache:
    state: Tensor


@dataclass(slots=True)
class SlottedCache:
    state: Tensor


class Keeps(nn.Module):
    """Is a layer that keeps what ``keep`` makes of its output."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.keep, self.kept = keep, None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.kept = self.keep(y)
        return y


def leaf_of(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if isinstance(kept, dict):
        return leaf_of(next(iter(kept.values())))
    if isinstance(kept, list | tuple):
        return leaf_of(kept[0])
    return leaf_of(kept.state)


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "loss": lambda y: y.square().mean(),
    "view": lambda y: y[:, :3],
    "list": lambda y: [y.sum(), y.mean()],
    "dict_of_tuples": lambda y: {"a": (y.sum(), 3)},
    "object": lambda y: Cache(y.sum()),
    "object_with_slots": lambda y: [SlottedCache(y.sum())],
    "detached": lambda y: y.detach(),
}


@pytest.mark.parametrize("kind", list(KEPT))
@pytest.mark.usefixtures("unpacked")
def test_what_a_module_keeps_is_copied_without_its_graph(kind: str) -> None:
    model = smet.sparsify(nn.Sequential(Keeps(KEPT[kind]), nn.Tanh(), nn.Linear(20, 7)), density=0.4)
    x = torch.randn(5, 12)
    model(x).sum().backward()
    kept = model[0].kept
    with Unchanged(model):
        dense = smet.export_dense(model)
    assert model[0].kept is kept
    copied = leaf_of(dense[0].kept)
    assert copied.grad_fn is None and same_bits(copied, leaf_of(kept).detach())
    assert same_bits(dense(x).detach(), model(x).detach())
    train(model, smet.ActiveAdamW(model), steps=2)


def test_a_buffer_with_a_graph() -> None:
    model = smet.sparsify(two_layers(), density=0.4)
    model[0].register_buffer("state", torch.zeros(3))
    model[0].state = model[0].weight.sum() * torch.ones(3)
    assert not model[0].state.is_leaf
    dense = smet.export_dense(model)
    assert same_bits(dense[0].state, model[0].state.detach()) and dense[0].state.grad_fn is None


def compiled_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(torch.compile(child, backend="eager") for child in model))


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled_children": compiled_inside,
    "compiled_twice": lambda model: torch.compile(compiled_inside(model), backend="eager"),
    "compiled_in_place": in_place,
    "data_parallel": nn.DataParallel,
    "data_parallel_inside": lambda model: nn.Sequential(nn.DataParallel(model[0]), *list(model)[1:]),
}


@pytest.mark.parametrize("first", ["wrapped", "sparsified"])
@pytest.mark.parametrize("kind", list(WRAPPED))
@pytest.mark.usefixtures("unpacked")
def test_a_wrapped_model_is_exported_as_the_plain_one(kind: str, first: str) -> None:
    plain = two_layers()
    x = torch.randn(5, 12)
    if first == "wrapped":
        model = smet.sparsify(WRAPPED[kind](plain), density=0.4)
    else:
        model = WRAPPED[kind](smet.sparsify(plain, density=0.4))
    expected = model(x).detach()
    dense = smet.export_dense(model)
    assert type(dense) is nn.Sequential and dense._compiled_call_impl is None
    assert list(dense.state_dict()) == list(two_layers().state_dict())
    assert [type(module) for module in dense] == [type(module) for module in two_layers()]
    two_layers().load_state_dict(dense.state_dict())
    assert same_bits(dense(x).detach(), expected)
    assert len(find_sites(model)) == 2
    train(plain, smet.ActiveAdamW(plain), steps=2)


def test_hooks_of_the_user_are_kept() -> None:
    called = []
    model = smet.sparsify(two_layers(), density=0.4)
    model[0].register_forward_hook(lambda *_: called.append(1))
    smet.export_dense(model)(torch.randn(2, 12))
    assert called == [1]


def test_a_script_function_is_shared() -> None:
    @torch.jit.script
    def double(x: Tensor) -> Tensor:
        return 2 * x

    model = two_layers()
    model.activation = double
    assert smet.export_dense(smet.sparsify(model, density=0.4)).activation is double


def test_a_module_that_refers_to_the_model() -> None:
    model = two_layers()
    model[0].__dict__["parent"] = model
    dense = smet.export_dense(smet.sparsify(model, density=0.4))
    assert dense[0].parent is dense


def test_a_model_never_made_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match="export_dense: expected a model with compact weights, got one with none"):
        smet.export_dense(two_layers())
    with pytest.raises(ValueError, match=r"export_dense: expected a model \(torch.nn.Module\), got None"):
        smet.export_dense(None)  # type: ignore[arg-type]
