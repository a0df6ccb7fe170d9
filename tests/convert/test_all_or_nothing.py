"""sparsify changes a model as a whole or not at all, whatever fails in it, warnings that are errors included."""

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import smet_compile as smet
from smet_compile import api
from smet_compile.convert import compact as compact_module
from smet_compile.ops import CompactWeight, direct, find_sites, saved_weights, shared_class
from tests.support.small_models import ToyExperts
from tests.support.snapshots import assert_same
from tests.support.states import structure


class Mixed(nn.Module):
    """Has a weight of the model itself, several of one module, a stack, and a layer that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.own = nn.Parameter(torch.randn(3, 8, 8))
        self.bias = nn.Parameter(torch.zeros(8))
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=7, batch_first=True)
        self.experts = ToyExperts(3, 8, 5)
        self.experts.register_forward_hook(lambda *_: None)
        self.embedding, self.last = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.einsum("...i,eio->...o", self.embedding(tokens), self.own) + self.bias
        x = x + self.attention(x, x[..., :6], x[..., :7], need_weights=False)[0]
        result: Tensor = self.last(x + self.experts(x[0]))
        return result


TOKENS = torch.arange(10).view(2, 5)
WEIGHTS = {"own", "experts.up_proj", "experts.down_proj", "attention.out_proj.weight", "last.weight"} | {
    f"attention.{name}_proj_weight" for name in "qkv"
}

NUM_LINEAR = 2
"""The number of layers that multiply with their values: attention.out_proj and last."""


def mixed() -> nn.Module:
    """Makes a model that has gradients."""
    torch.manual_seed(0)
    model = Mixed()
    model(TOKENS).square().mean().backward()
    return model


def everything(model: nn.Module) -> list[Any]:
    """Lists all that sparsify changes: classes, modules, parameters and hooks in order, gradients, notes."""
    found: list[Any] = [structure(model), smet.report(model).to_dict()]
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        found += [type(module), list(module._parameters), list(module.__dict__), [list(each.items()) for each in hooks]]
        found += [sorted(name for name, value in vars(type(module)).items() if isinstance(value, property))]
    found += [[None if p.grad is None else p.grad.clone(), p.detach().clone()] for p in model.parameters()]
    return [*found, model(TOKENS).detach()]


def check_unchanged(model: nn.Module, before: list[Any]) -> None:
    assert_same(everything(model), before)
    optimizer = torch.optim.AdamW(model.parameters())  # a dense model with moments: nothing is to hold it up
    for _ in range(2):
        optimizer.step()
    twin = mixed()
    twin.load_state_dict(model.state_dict())
    smet.sparsify(model, density=0.4)
    smet.sparsify(twin, density=0.4)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    assert_same(smet.report(model).to_dict(), smet.report(twin).to_dict())


class Fault(RuntimeError):
    pass


def fails_at(function: Any, call: int, after: bool, error: type[BaseException]) -> Callable[..., Any]:
    """Wraps ``function`` so that one call raises, before or after it is done."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise error
        result = function(*args, **kwargs)
        if calls == call:
            raise error
        return result

    return wrapped


PLACES = [
    (CompactWeight, "right_inverse", len(WEIGHTS)),  # packs the last weight for trial
    (CompactWeight, "_derive", len(WEIGHTS)),
    (shared_class, "register", 1),
    (shared_class, "register", len(WEIGHTS)),
    (shared_class, "_Chain", 3),
    (shared_class, "shared_class", len(WEIGHTS)),
    (saved_weights, "install", 2),
    (saved_weights, "install", len(WEIGHTS) - NUM_LINEAR + 1),
    (direct, "is_installed", NUM_LINEAR),
    (compact_module, "remember_reasons", 1),
    (compact_module, "note_dense_shape", 1),
    (parametrize, "_maybe_set", len(WEIGHTS) + 1),  # the largest weight takes its values
    (api, "install_passes", 1),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "call"), PLACES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_fails_changes_nothing(owner: Any, name: str, call: int, after: bool) -> None:
    for error in (Fault, KeyboardInterrupt):
        model = mixed()
        before = everything(model)
        with pytest.MonkeyPatch.context() as patched, pytest.raises(error):
            patched.setattr(owner, name, fails_at(getattr(owner, name), call, after, error))
            smet.sparsify(model, density=0.4)
        check_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "*a*"}, "more than 1.5 times"),
        ({"density": 0.9, "rules": {"last": 0.25}, "block_shape": 4}, "take more memory than dense ones"),
        ({"density": 0.9, "rules": {"last": 0.25}, "block_shape": 4, "exclude": "*proj"}, "some outputs or inputs"),
    ],
    ids=["dense", "larger", "empty_rows"],
)
def test_a_warning_that_is_an_error(options: dict[str, Any], message: str) -> None:
    model = mixed()
    before = everything(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=message):
        warnings.simplefilter("error")
        smet.sparsify(model, **options)
    check_unchanged(model, before)


def test_weights_that_are_compact_already_stay_so() -> None:
    """A second call fails, in a module that is parametrized by the first, and in a copy that shares its class."""
    model = smet.sparsify(mixed(), density=0.5, include=["attention.k_proj_weight", "last"])
    copied = copy.deepcopy(model)
    before, of_copy = everything(model), everything(copied)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Fault):
        patched.setattr(saved_weights, "install", fails_at(saved_weights.install, 2, True, Fault))
        smet.sparsify(model, density=0.4, exclude=["attention.k_proj_weight", "last"])
    assert_same(everything(model), before)
    assert_same(everything(copied), of_copy)
    smet.sparsify(model, density=0.4, exclude=["attention.k_proj_weight", "last"])
    assert set(find_sites(model)) == WEIGHTS
    assert list(smet.export_dense(model).state_dict()) == list(mixed().state_dict())


class Refuses(nn.Linear):
    """Refuses that a parameter is taken from it."""

    def __delattr__(self, name: str) -> None:
        raise Fault(name)


def test_a_module_that_refuses() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Refuses(8, 8))
    before = [structure(model), copy.deepcopy(model.state_dict())]
    with pytest.raises(Fault, match="weight"):
        smet.sparsify(model, density=0.5)
    assert_same([structure(model), model.state_dict()], before)
    assert type(model[0]) is nn.Linear and not model._forward_hooks
    smet.sparsify(model, density=0.5, exclude="1")
    assert set(find_sites(model)) == {"0.weight"}


def test_an_inference_tensor_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.inference_mode():
        model[1].weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    before = [structure(model), copy.deepcopy(model.state_dict())]
    with pytest.raises(RuntimeError, match=r"(?i)inference"):
        smet.sparsify(model, density=0.5)
    assert_same([structure(model), model.state_dict()], before)


def check_consistent(model: nn.Module, plain: nn.Module, note: str) -> None:
    """Every weight is wholly dense, as it was, or wholly compact; the note names the compact ones; the model trains."""
    sites = find_sites(model)
    assert sites and all(name in note for name in sites), note
    assert f"broke off after {len(sites)} of {len(WEIGHTS)} weights" in note
    twin = smet.sparsify(copy.deepcopy(plain), density=0.4)
    for name in WEIGHTS:
        owner, _, tensor_name = name.rpartition(".")
        expected = getattr((twin if name in sites else plain).get_submodule(owner), tensor_name)
        assert_same(getattr(model.get_submodule(owner), tensor_name), expected, name)
    model.zero_grad()
    model(TOKENS).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert list(smet.export_dense(model).state_dict()) == list(plain.state_dict())
    smet.sparsify(model, density=0.4, exclude=[*sites])
    assert_same(dict(sorted(model.state_dict().items())), dict(sorted(twin.state_dict().items())))


@pytest.mark.parametrize("call", range(2, len(WEIGHTS) + 1, 3))
def test_memory_that_is_gone_midway(call: int) -> None:
    """An interrupt leaves each weight wholly compact or wholly dense, and the exception names the compact ones."""
    model, plain = mixed(), mixed()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(MemoryError) as raised:
        patched.setattr(
            parametrize, "_maybe_set", fails_at(parametrize._maybe_set, len(WEIGHTS) + call, False, MemoryError)
        )
        smet.sparsify(model, density=0.4)
    assert len(find_sites(model)) == call - 1
    check_consistent(model, plain, " ".join(raised.value.__notes__))


def interrupted_at(line: int, call: Callable[[], Any]) -> KeyboardInterrupt | None:
    """Runs ``call`` until that line is reached of the code that changes models, here and in torch."""
    num_lines, watched = 0, ("convert/compact.py", "shared_class.py", "parametrize.py", "saved_weights.py")

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal num_lines
        if not frame.f_code.co_filename.endswith(watched):
            return None
        if event == "line":
            num_lines += 1
            if num_lines == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(before)
    return None


def check_an_interrupt_at(line: int, and_goes_on: bool = True) -> bool:
    """Returns whether the line was reached. ``and_goes_on``: checks that a second sparsify does the rest, too."""
    model = mixed()
    before, plain = everything(model), mixed()
    interrupt = interrupted_at(line, lambda: smet.sparsify(model, density=0.4))
    if interrupt is None:
        return False
    note = " ".join(getattr(interrupt, "__notes__", []))
    if len(find_sites(model)) == len(WEIGHTS):
        return True
    if find_sites(model):
        check_consistent(model, plain, note)
    elif and_goes_on:
        check_unchanged(model, before)
    else:
        assert_same(everything(model), before)
    return True


def test_an_interrupt_at_some_lines() -> None:
    assert all(check_an_interrupt_at(line) for line in range(5, 1000, 142))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_interrupt_at_any_line() -> None:
    line = 1
    while check_an_interrupt_at(line, and_goes_on=line % 10 == 0):
        line += 1
    assert line > 500


def test_moments_from_before_are_only_refused_where_the_weight_is_compact() -> None:
    model = mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Fault):
        patched.setattr(parametrize, "_maybe_set", fails_at(parametrize._maybe_set, len(WEIGHTS) + 1, True, Fault))
        smet.sparsify(model, density=0.4)
    optimizer.step()
    smet.sparsify(model, density=0.4)
    with pytest.raises(ValueError, match="sparsify was called after this optimizer had stepped"):
        optimizer.step()


def test_no_two_weights_are_held_dense_and_packed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest is packed first, and gives its dense memory back before the next is packed."""
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for size in (8, 32, 16)])
    storages = {
        p.numel(): torch.multiprocessing.reductions.StorageWeakRef(p.untyped_storage()) for p in model.parameters()
    }
    alive: list[list[int]] = []
    right_inverse = parametrize.ParametrizationList.right_inverse

    def watched(chain: Any, value: Tensor) -> None:
        alive.append([size for size, storage in storages.items() if not storage.expired()])
        right_inverse(chain, value)

    monkeypatch.setattr(parametrize.ParametrizationList, "right_inverse", watched)
    smet.sparsify(model, density=0.4)
    assert alive == [[64, 1024, 256], [64, 256], [64]]
