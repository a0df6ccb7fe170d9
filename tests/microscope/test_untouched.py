"""After a look the model and its example are what they were, in whatever mode and wrapping it was looked at."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")


class Remembers(nn.Module):
    """Fills a cache at its first forward, and counts its calls."""

    def __init__(self, looks_at_data: bool) -> None:
        super().__init__()
        self.layer, self.looks_at_data = nn.Linear(4, 4), looks_at_data
        self.angles: Tensor | None = None
        self.by_length: dict[int, Tensor] = {}
        self.lengths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.angles is None:
            self.angles = torch.arange(4.0)
        self.lengths.append(len(x))
        scale = self.by_length.setdefault(len(x), torch.ones(4))
        x += 1
        if self.looks_at_data and x.sum() < -1e9:
            return x
        return self.layer(x * self.angles.cos() * scale)


@pytest.mark.parametrize("looks_at_data", [False, True])
def test_a_module_remembers_nothing_of_the_look(looks_at_data: bool) -> None:
    model = smet.sparsify(Remembers(looks_at_data), 0.5)
    x = torch.zeros(3, 4)
    assert bool(smet.inspect(model, x).notes) == looks_at_data
    assert model.angles is None and model.by_length == {} and model.lengths == []
    assert not x.any()
    model(torch.zeros(3, 4)).sum().backward()
    assert type(model.angles) is Tensor and list(model.by_length) == [3]


def test_gradients_hooks_and_modes_are_left_alone() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)), 0.5)
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    model(torch.randn(2, 4)).sum().backward()
    before = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model[1].eval()
    hooks = dict(model[0]._forward_hooks)
    smet.inspect(model, torch.randn(2, 4))
    assert all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in before.items())
    assert [module.training for module in model] == [True, False, True]
    assert seen == ["hook", "hook"] and dict(model[0]._forward_hooks) == hooks
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


@dataclass
class Given:
    """Is no pytree, and the forward writes to it."""

    features: Tensor
    made: Any = None


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, given: Given) -> Given:
        given.made = self.layer(given.features)
        return Given(given.made)


def test_tensors_within_other_objects_are_found_and_left_alone() -> None:
    given = Given(torch.randn(2, 4))
    found = smet.inspect(smet.sparsify(Writes(), 0.5), given)
    assert given.made is None and type(given.features) is Tensor
    assert set(found.graph.edges) == {("input", "layer.weight"), ("layer.weight", "output")}


def test_a_forward_that_returns_no_tensor_is_named() -> None:
    class Silent(Writes):
        def forward(self, given: Tensor) -> None:  # type: ignore[override]
            self.layer(given)

    found = smet.inspect(smet.sparsify(Silent(), 0.5), torch.randn(2, 4))
    assert "the forward returned no tensor" in found.notes[0] and found.path_log10_share is None


def block() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    return smet.sparsify(nn.Sequential(layer, nn.LayerNorm(6), nn.Linear(6, 6)), 0.3)


def figures(found: smet.Inspection) -> list[tuple[str, ...]]:
    return [site.cells()[1:] for site in found.sites]


def test_compiled_wholly_or_in_part_in_inference_mode_and_under_autocast_it_is_the_same() -> None:
    x = torch.randn(2, 6)
    expected = smet.inspect(block(), x)
    in_part, in_place = block(), block()
    in_part[0] = torch.compile(in_part[0])
    in_place.compile()
    for model in (torch.compile(block()), in_part, in_place):
        assert figures(smet.inspect(model, x)) == figures(expected)
    with torch.inference_mode():
        assert smet.inspect(block(), x) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert figures(smet.inspect(block(), x)) == figures(expected)


def test_compiled_code_is_kept() -> None:
    model = block()
    compiled = torch.compile(model, backend="eager")
    before = compiled(torch.ones(2, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        smet.inspect(compiled, torch.ones(2, 6))
        assert torch.equal(compiled(torch.ones(2, 6)), before)


def test_the_topology_is_left_alone() -> None:
    model = block()
    before = copy.deepcopy({name: site.compact.topology for name, site in find_sites(model).items()})
    smet.inspect(model, torch.randn(2, 6))
    assert all(torch.equal(site.compact.topology, before[name]) for name, site in find_sites(model).items())
