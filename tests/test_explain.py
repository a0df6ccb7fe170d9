"""explain says per site what is fused and why the rest is not, and disturbs nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.tracing import Captured
from tests.support.living_modules import living_modules_of, num_living

FUSED = ["fused", "fused", "fused"]
UPDATE = "update"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Linear(32, 24)
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.5)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.second(hidden).square().mean()


class Scaled(Net):
    """Reads its second weight in a way that is no matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) @ (2 * self.second.weight).T).square().mean()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 24)


def make(kind: type[Net] = Net) -> Any:
    return smet.sparsify(kind(), density=0.5, block_shape=8)


def parts_of(explanation: smet.Explanation) -> dict[str, list[str]]:
    return {site.name: list(site.parts.values()) for site in explanation.sites}


def test_a_plain_model(x: Tensor) -> None:
    explanation = smet.explain(make(), x)
    found = parts_of(explanation)
    assert found["first.weight"][:3] == ["fused", "none", "fused"]
    assert found["second.weight"][:3] == FUSED
    assert not explanation.not_fused and not explanation.graph_breaks
    assert "compile_train_step fuses it" in str(explanation)


def test_a_train_step_fuses_updates(x: Tensor) -> None:
    model = make()
    step = smet.compile_train_step(model, smet.ActiveAdamW(model), lambda model, batch: model(batch))
    explanation = smet.explain(step, x, strict=True)
    assert all(parts[3] == "fused" for parts in parts_of(explanation).values())
    assert all(site.values.requires_grad for site in step.sites)


def test_reasons_are_named_and_strict_raises(x: Tensor) -> None:
    model = make(Scaled)
    explanation = smet.explain(model, x)
    assert list(explanation.not_fused) == ["second.weight"]
    assert any(
        "read by mul, which is not a matrix product" in reason for reason in explanation.not_fused["second.weight"]
    )
    assert "second.weight: forward: read by mul" in str(explanation)
    with pytest.raises(ValueError, match=r"second\.weight: weight gradient: the gradient comes from mul"):
        smet.explain(model, x, strict=True)


def test_a_weight_that_the_example_does_not_use(x: Tensor) -> None:
    model = nn.ModuleDict({"used": nn.Linear(24, 32), "unused": nn.Linear(24, 32)})
    smet.sparsify(model, density=0.5)
    model.forward = lambda x: model["used"](x).sum()  # type: ignore[method-assign]
    assert list(smet.explain(model, x).not_fused) == ["unused.weight"]


def test_sparse_modules_beside_the_model_have_no_row(x: Tensor) -> None:
    """A loss may run a teacher, and a forward a module that is not registered."""
    model, teacher, hidden = make(), make().requires_grad_(False), make()
    step = smet.compile_train_step(model, smet.ActiveAdamW(model), lambda model, batch: model(batch) - teacher(batch))
    explanation = smet.explain(step, x)
    assert list(parts_of(explanation)) == ["first.weight", "second.weight"] and not explanation.not_fused
    forward = model.forward
    model.forward = lambda x: forward(x) + hidden(x)
    assert list(parts_of(smet.explain(model, x))) == ["first.weight", "second.weight"]


def test_a_buffer_that_repeats_its_entries(x: Tensor) -> None:
    model = make()
    model.register_buffer("repeated", torch.ones(1).expand(8))
    assert not smet.explain(model, x).not_fused


def test_graph_breaks_are_shown_and_each_part_is_fused(x: Tensor) -> None:
    model = make()
    model.breaks = True
    explanation = smet.explain(model, x)
    assert not explanation.not_fused
    assert len(explanation.graph_breaks) == 1 and "graph_break" in explanation.graph_breaks[0]
    assert "graph break: " in str(explanation)


def test_a_step_of_several_graphs_updates_after_backward(x: Tensor) -> None:
    model = make()
    model.breaks = True
    step = smet.compile_train_step(model, smet.ActiveAdamW(model), lambda model, batch: model(batch))
    explanation = smet.explain(step, x)
    assert set(explanation.not_fused) == {"first.weight", "second.weight"}
    assert all(
        "update: the step breaks into several graphs" in reasons[0] for reasons in explanation.not_fused.values()
    )


def test_inference_has_a_forward_only(x: Tensor) -> None:
    model = make().eval()
    with torch.no_grad():
        found = parts_of(smet.explain(model, x))
    assert found["second.weight"] == ["fused", "none", "none", "none"]


def test_a_frozen_weight_has_no_gradient(x: Tensor) -> None:
    model = make()
    model.second.parametrizations.weight.original.requires_grad_(False)
    assert parts_of(smet.explain(model, x))["second.weight"][:3] == ["fused", "fused", "none"]


def test_nothing_is_disturbed_however_often_it_is_asked(x: Tensor) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    for _ in range(10):
        assert not smet.explain(model, x).not_fused
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiled_model_and_keyword_inputs(x: Tensor) -> None:
    assert not smet.explain(torch.compile(make()), x=x).not_fused


def test_a_model_without_sites(x: Tensor) -> None:
    with pytest.raises(ValueError, match="explain: expected a model with compact weights, got one with none"):
        smet.explain(Net(), x)


@pytest.mark.usefixtures("older_objects_stay")
@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_of_a_model_that_was_explained_stays(x: Tensor, breaks: bool) -> None:
    torch._dynamo.reset()
    before = num_living(Captured)
    for _ in range(2):
        model = make()
        model.breaks = breaks
        modules_alive = living_modules_of(model)
        smet.explain(model, x)
        del model
        assert (modules_alive(), num_living(Captured)) == (0, before)


@pytest.mark.usefixtures("older_objects_stay")
def test_nothing_of_a_call_that_fails_stays(x: Tensor) -> None:
    torch._dynamo.reset()
    model, before = make(), num_living(Captured)
    with pytest.raises(RuntimeError):
        smet.explain(model, x[:, :3])
    with pytest.raises(ZeroDivisionError):
        smet.explain(Fails(model), x)
    assert num_living(Captured) == before


class Fails(nn.Module):
    """Fails after a graph break, when one graph was captured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        loss = self.model(x)
        torch._dynamo.graph_break()
        return loss * (1 / 0)
