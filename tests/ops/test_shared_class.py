"""Modules of one class share the class that compact weights need; what torch does to one leaves the others right."""

import abc
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import smet_compile as smet
from smet_compile.ops import find_sites

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Two(nn.Module):
    """Has two weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).tanh() @ self.second * self.scale


def linear() -> nn.Module:
    return smet.sparsify(nn.Linear(8, 8), density=0.5)


def two(**options: Any) -> nn.Module:
    return smet.sparsify(Two(), density=0.5, **{"include": "*", **options})


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, kdim=4, vdim=6)


def compiled(module: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), Two, attention], ids=["linear", "two", "attention"])
def test_one_class_for_equal_modules_whatever_order_their_weights_became_compact_in(
    make: Callable[[], nn.Module],
) -> None:
    first = smet.sparsify(make(), density=0.5, include="*")
    second, names = make(), sorted(find_sites(first), reverse=True)
    for name in names:
        smet.sparsify(second, density=0.5, include=name)
    assert type(first) is type(second) is type(copy.deepcopy(first))
    assert isinstance(first, type(make())) and type(first).__name__ == f"Parametrized{type(make()).__name__}"
    assert parametrize.type_before_parametrizations(first) is type(make())
    assert sorted(find_sites(second), reverse=True) == names


def test_modules_with_other_compact_weights_have_other_classes() -> None:
    kinds = {type(two()), type(two(include="first")), type(two(include="second")), type(linear()), nn.Linear}
    assert len(kinds) == 5


@pytest.mark.parametrize("leave", [True, False])
def test_torch_removes_the_parametrization_of_one_module(leave: bool) -> None:
    one, other, unequal = linear(), linear(), two()
    expected = [module(X) for module in (one, other, unequal)]
    values = one.get_parameter("parametrizations.weight.original")
    parametrize.remove_parametrizations(one, "weight", leave_parametrized=leave)
    assert type(one) is nn.Linear and one.weight is values and set(dict(one.named_parameters())) == {"weight", "bias"}
    for module, result in list(zip((one, other, unequal), expected, strict=True))[0 if leave else 1 :]:
        torch.testing.assert_close(module(X), result)
        torch.testing.assert_close(compiled(module)(X), result)
    parametrize.remove_parametrizations(other, "weight")
    torch.testing.assert_close(other(X), expected[1])
    smet.sparsify(other, density=0.5)
    assert type(other) is type(linear()) and list(find_sites(other)) == ["weight"]


def test_torch_removes_one_of_two_parametrizations() -> None:
    one, other = two(), two()
    expected = one(X), other(X)
    run = compiled(one)
    run(X)
    parametrize.remove_parametrizations(one, "first")
    assert type(one.first) is nn.Parameter and list(find_sites(one)) == ["second"]
    for module, result in zip((one, other), expected, strict=True):
        torch.testing.assert_close(module(X), result)
        module.zero_grad()
        module(X).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    one.first = nn.Parameter(torch.ones(8, 8))
    assert torch.equal(one.first, torch.ones(8, 8)) and not torch.equal(other.first, torch.ones(8, 8))
    torch.testing.assert_close(run(X), one(X))
    del one.first
    assert not hasattr(one, "first") and hasattr(other, "first")
    one.first = torch.zeros(8, 8)
    assert not one(X).any() and not run(X).any()
    del one.first
    with pytest.raises(AttributeError, match="first"):
        del one.first
    one.register_buffer("first", torch.ones(8, 8))
    assert "first" in one.state_dict() and torch.equal(one.first, torch.ones(8, 8))
    del one.first
    one.first = nn.Parameter(torch.randn(8, 8))
    smet.sparsify(one, density=0.5, include="first")
    assert type(one) is type(other) and sorted(find_sites(one)) == ["first", "second"]


@pytest.mark.parametrize("make", [linear, two])
def test_torch_parametrizes_another_tensor_of_one_module(make: Callable[[], nn.Module]) -> None:
    one, other = make(), make()
    name = "bias" if make is linear else "scale"
    expected = other(X)
    parametrize.register_parametrization(one, name, Twice())
    assert torch.equal(getattr(one, name), 2 * one.parametrizations[name].original)
    assert type(getattr(other, name)) is nn.Parameter
    for module in (one, other):
        torch.testing.assert_close(compiled(module)(X), module(X))
    torch.testing.assert_close(other(X), expected)
    copied = copy.deepcopy(one)
    torch.testing.assert_close(copied(X), one(X))
    dense = smet.export_dense(one)
    torch.testing.assert_close(dense(X), one(X))
    assert not find_sites(dense) and parametrize.is_parametrized(dense, name) and find_sites(one)
    parametrize.remove_parametrizations(one, name)
    torch.testing.assert_close(copied(X), one(X))
    for site in find_sites(one).values():
        parametrize.remove_parametrizations(one, site.tensor_name)
    torch.testing.assert_close(copied(X), one(X))
    torch.testing.assert_close(other(X), expected)
    assert type(one) in (nn.Linear, Two) and type(smet.export_dense(other)) is type(one)


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal"])
def test_a_parametrization_that_makes_the_weight_of_others_is_refused(name: str) -> None:
    one = linear()
    expected, keys = one(X), list(one.state_dict())
    with pytest.raises(ValueError, match="weight: expected a parametrization that takes the weight as it is"):
        getattr(nn.utils.parametrizations, name)(one)
    assert torch.equal(one(X), expected) and list(one.state_dict()) == keys
    torch.testing.assert_close(smet.export_dense(one)(X), expected)


def test_a_further_parametrization_is_tried_on_a_copy() -> None:
    torch.manual_seed(0)
    one, dense = linear(), nn.Linear(8, 8)
    dense.load_state_dict(smet.export_dense(one).state_dict())
    for module in (one, dense):
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(module)
    torch.testing.assert_close(one(X), dense(X))
    assert torch.equal(one.parametrizations.weight[1]._u, dense.parametrizations.weight[0]._u)
    assert find_sites(one) and torch.equal(copy.deepcopy(one).eval()(X), one.eval()(X))


def test_a_tensor_that_was_parametrized_before() -> None:
    """The class that torch made for the module is left, and comes back where sparsify fails."""
    one = nn.Linear(8, 8)
    parametrize.register_parametrization(one, "bias", Twice())
    of_torch, expected = type(one), one.bias.detach()
    twin = copy.deepcopy(one)
    smet.sparsify(one, density=0.5)
    assert type(one) is not of_torch and isinstance(one, nn.Linear) and torch.equal(one.bias, expected)
    dense = smet.export_dense(one)
    assert torch.equal(dense.bias, expected) and torch.equal(dense.weight, one.weight)
    assert parametrize.type_before_parametrizations(dense) is nn.Linear
    assert type(twin) is of_torch and torch.equal(twin.bias, expected)
    for name in ("bias", "weight"):
        parametrize.remove_parametrizations(one, name)
    assert type(one) is nn.Linear and torch.equal(one.bias, expected) and torch.equal(twin.bias, expected)


def test_a_further_parametrization_of_the_compact_weight() -> None:
    one, other = linear(), linear()
    before = one.weight.detach().clone()
    parametrize.register_parametrization(one, "weight", Twice())
    assert torch.equal(one.weight, 2 * before) and type(one) is type(other)
    nn.utils.parametrizations.spectral_norm(one, "weight")
    assert torch.linalg.matrix_norm(one.weight, 2) < 1.5
    dense = smet.export_dense(other)
    nn.utils.parametrizations.weight_norm(dense, "weight")
    torch.testing.assert_close(dense(X), other(X))


def test_weight_norm_of_the_bias_by_hooks() -> None:
    one, other = linear(), linear()
    expected = one(X), other(X)
    nn.utils.weight_norm(one, "bias", dim=None)
    torch.testing.assert_close((one(X), other(X)), expected)
    assert set(dict(one.named_parameters())) == {"bias_g", "bias_v", "parametrizations.weight.original"}


def test_a_copy_shares_nothing_but_the_class() -> None:
    one = two()
    one.itself = [one]
    copied = copy.deepcopy(one)
    assert copied.itself == [copied] and type(copied) is type(one)
    expected = one(X)
    torch.testing.assert_close(copied(X), expected)
    with torch.no_grad():
        copied.first = torch.zeros(8, 8)
    torch.testing.assert_close(one(X), expected)
    assert not copied(X).any()


class Slots(nn.Linear):
    __slots__ = ("kept",)


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return "copied"


def test_copies_of_odd_classes() -> None:
    model = Slots(8, 8)
    model.kept = [1]
    copied = copy.deepcopy(smet.sparsify(model, density=0.5))
    assert copied.kept == [1] and copied.kept is not model.kept
    assert copy.deepcopy(smet.sparsify(OwnCopy(8, 8), density=0.5)) == "copied"


def test_it_is_not_pickled_and_the_error_says_what_to_save() -> None:
    model = nn.Sequential(linear())
    for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"state_dict\(\): .*export_dense"):
            save(model)
    loaded = pickle.loads(pickle.dumps(smet.export_dense(model)))
    torch.testing.assert_close(loaded(X), model(X))


class Abstract(nn.Linear, abc.ABC):
    """Has a metaclass."""


def test_a_class_with_a_metaclass() -> None:
    model = smet.sparsify(Abstract(8, 8), density=0.5)
    assert isinstance(model, Abstract) and type(model) is type(smet.sparsify(Abstract(8, 8), density=0.5))
    torch.testing.assert_close(compiled(model)(X), model(X))
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is Abstract


def test_edits_of_the_class_that_have_nothing_to_do_with_parametrizations() -> None:
    class Mine(nn.Linear):
        pass

    kind: Any = type(smet.sparsify(Mine(8, 8), density=0.5))
    kind.size, kind.area = 3, property(lambda self: 64)
    assert (kind.size, smet.sparsify(Mine(8, 8), density=0.5).area) == (3, 64)
    del kind.size, kind.area
    assert not hasattr(kind, "size") and not hasattr(kind, "area")
    with pytest.raises(AttributeError):
        del kind.nothing


def test_within_cached_a_weight_is_read_once_for_each_module() -> None:
    one = linear()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.weight = torch.zeros(8, 8)
    with parametrize.cached():
        assert one.weight is one.weight and one.weight.any() and not other.weight.any()
        with pytest.raises(RuntimeError, match="while caching"):
            torch.jit.trace(one, X)
    assert one.weight is not one.weight


def test_tracers() -> None:
    model = nn.Sequential(linear(), nn.Tanh())
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))
    symbolic = fx.symbolic_trace(model)
    assert [node.op for node in symbolic.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    torch.testing.assert_close(symbolic(X), model(X))


class Told(nn.Linear):
    """Is told of its subclasses, and wants an argument of each."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        Told.known.append(cls)


class OneKind(Told, kind="one"):
    kind: str


def test_a_class_that_is_told_of_its_subclasses_hears_of_none() -> None:
    module: Any = OneKind(8, 8)
    smet.sparsify(module, density=0.5)
    assert Told.known == [OneKind] and module.kind == "one" and isinstance(module, OneKind)
    assert type(module).__mro__[1:] == OneKind.__mro__ and find_sites(module)
    dense = smet.export_dense(module)
    assert type(dense) is OneKind and torch.equal(dense.weight, copy.deepcopy(module).weight)
    module(X).sum().backward()
    assert find_sites(module)["weight"].values.grad is not None
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, dense.weight)
