"""Density 1 is the dense baseline of a sweep: the same script, and bit for bit the training of a plain model."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on, train

BASELINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "density": lambda model: smet.sparsify(model, density=1.0),
    "blocks": lambda model: smet.sparsify(model, density=1, block_shape=4, distribution="erk"),
    "magnitude": lambda model: smet.sparsify(model, density=1.0, select="magnitude", rescale=True),
    "rules": lambda model: smet.sparsify(model, density=0.3, rules={"*": 1.0}),
    "rules_and_density": lambda model: smet.sparsify(model, density=1.0, rules={"0.weight": 1}),
    "included": lambda model: smet.sparsify(model, density=1.0, include="0.weight"),
}


@pytest.mark.parametrize("name", list(BASELINES))
def test_the_model_stays_as_it_is(name: str) -> None:
    torch.manual_seed(3)
    plain = two_layers()
    model = BASELINES[name](copy.deepcopy(plain))
    assert find_sites(model) == {} and type(model[0]) is nn.Linear
    assert_same(snapshot(model), snapshot(plain))
    report = smet.report(model)
    assert report.density == 1 and not report.sites and str(report)
    assert report.skipped[0].reason == "keeps every block: density 1"


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "none"])
def test_the_same_script_trains_a_dense_model(schedule: str, grow: str) -> None:
    torch.manual_seed(3)
    plain = two_layers()
    model = smet.sparsify(copy.deepcopy(plain), density=1.0)
    optimizer = smet.ActiveAdamW(model, lr=1e-2, weight_decay=0.1)
    manager = smet.TopologyManager(model, optimizer, total_steps=10, every=2, schedule=schedule, grow=grow)
    train(model, optimizer, manager, steps=6)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1), steps=6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, plain.get_parameter(name), rtol=1e-5, atol=1e-7)
    assert manager.next_update is None and manager.history == [] and manager.num_steps == 6


@pytest.mark.parametrize("name", ["blocks", "rules"])
def test_everything_else_works_on_it(name: str, tmp_path: Path) -> None:
    model = BASELINES[name](two_layers())
    optimizer = smet.ActiveAdamW(smet.decay_groups(model, 0.1), model=model)
    manager = smet.TopologyManager(model, optimizer, total_steps=10, every=2)
    train(model, optimizer, manager, steps=3)
    dense = smet.export_dense(model)
    assert dense is not model and not [key for module in dense.modules() for key in vars(module) if "smet" in key]
    assert_same(snapshot(dense), snapshot(model))
    with pytest.raises(ValueError, match="TopologyManager: expected a model with compact weights"):
        smet.TopologyManager(dense, torch.optim.SGD(dense.parameters(), lr=0.1), total_steps=10)
    x = torch.randn(3, 12)
    explained = smet.explain(model, x)
    assert explained.sites == [] and str(explained)
    assert smet.inspect(model).sites == () and str(smet.inspect(model, x, manager=manager))
    assert smet.inspect(copy.deepcopy(model), optimizer=optimizer).sites == ()
    smet.save_checkpoint(tmp_path / "run", model, optimizer, manager)
    state = snapshot(model, optimizer, manager)
    train(model, optimizer, manager, steps=3)
    smet.load_checkpoint(tmp_path / "run", model, optimizer, manager)
    assert_same(snapshot(model, optimizer, manager), state)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return loss_on(model, step)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "max_grad_norm": 1.0}], ids=str)
def test_a_compiled_step_trains_it(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    plain = two_layers()
    model = smet.sparsify(copy.deepcopy(plain), density=1.0)
    step = smet.compile_train_step(model, smet.ActiveAdamW(model, lr=1e-2), loss_of, **options)
    step.compile(backend="eager")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    accumulate = options.get("accumulate", 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [float(step(i)) for i in range(4)]
    assert not [warning for warning in caught if "compile_train_step" in str(warning.message)]
    for i, loss in enumerate(losses):
        expected = loss_on(plain, i)
        assert loss == pytest.approx(float(expected), rel=1e-4)
        (expected / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if "max_grad_norm" in options:
                nn.utils.clip_grad_norm_(plain.parameters(), options["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
    assert not step.fused
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_parts_and_wrappers_of_a_baseline() -> None:
    """The manager takes the model, a part of it, or a wrapper, as with compact weights."""
    model = smet.sparsify(nn.Sequential(two_layers(), nn.LayerNorm(7)), density=1.0)
    for made in (model[0], nn.Sequential(model), copy.deepcopy(model), torch.compile(model, backend="eager")):
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        smet.TopologyManager(made, optimizer, total_steps=10)
        smet.compile_train_step(made, optimizer)
    norm = model[1]
    with pytest.raises(ValueError, match="expected a model with compact weights, got one with none; sparsify it"):
        smet.TopologyManager(norm, torch.optim.SGD(norm.parameters(), lr=0.1), total_steps=10)


def test_a_baseline_can_be_made_sparse_later() -> None:
    model = smet.sparsify(smet.sparsify(two_layers(), density=1.0), density=0.5)
    assert len(find_sites(model)) == 2 and smet.report(model).skipped == []


def test_blocks_too_large_for_a_density_are_still_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to make sparse: all 2 chosen weights keep every block"):
        smet.sparsify(two_layers(), density=0.9, block_shape=16)


def test_it_is_planned() -> None:
    step = {"inputs": lambda b, s: torch.zeros(b, 12), "loss_fn": lambda m, x: m(x).sum(), "compiled": False}
    planned = smet.plan(two_layers(), 1.0, **step)
    assert planned.density == 1 and planned.sparse.stored["index"] == 0
    again = smet.plan(smet.sparsify(two_layers(), 1.0), 1.0, **step)
    assert again.sparse == planned.sparse
