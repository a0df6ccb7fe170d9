"""The corrected gradient reaches every optimizer by every route, and is that of a twin with masked dense weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import smet_compile as smet
from smet_compile.ops import direct, find_sites
from smet_compile.tracing import Capture
from tests.correction.networks import assert_weights, factors_by_mask, images, loss_of, sparse_net, train_twin

LR, MOMENTUM, NUM_STEPS = 0.05, 0.9, 4
CORRECTED = {"conv.weight", "point.weight", "linear.weight"}
Route = Callable[[nn.Module, Optimizer], None]


def active_sgd(model: nn.Module) -> Optimizer:
    return smet.ActiveSGD(model, lr=LR, momentum=MOMENTUM, warmup_steps=0)


def torch_sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def eager(model: nn.Module, optimizer: Optimizer) -> None:
    for step in range(NUM_STEPS):
        loss_of(model, images(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def unpacking(model: nn.Module, optimizer: Optimizer) -> None:
    with direct.unpacked():
        eager(model, optimizer)


def compiled(model: nn.Module, optimizer: Optimizer) -> None:
    run = torch.compile(model, backend=Capture(), fullgraph=True)
    for step in range(NUM_STEPS):
        loss_of(run, images(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_step(model: nn.Module, optimizer: Optimizer, **options: Any) -> None:
    step = smet.compile_train_step(model, optimizer, loss_of, **options)
    backend = Capture()
    step.compile(backend=backend)
    assert step.fused == (not options)
    for number in range(NUM_STEPS):
        step(images(number))
    assert len(backend.graphs) == 1


def kept(model: nn.Module, optimizer: Optimizer) -> None:
    train_step(model, optimizer, max_grad_norm=1e9)


@pytest.mark.parametrize("block_shape", [1, (1, 4), 4], ids=str)
@pytest.mark.parametrize("make_optimizer", [active_sgd, torch_sgd])
@pytest.mark.parametrize("route", [eager, unpacking, compiled, train_step, kept])
def test_equals_the_twin(
    route: Route, make_optimizer: Callable[[nn.Module], Optimizer], block_shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = sparse_net(block_shape)
    expected = train_twin(model, CORRECTED, LR, MOMENTUM, NUM_STEPS)
    plain = train_twin(model, set(), LR, MOMENTUM, NUM_STEPS)
    optimizer = make_optimizer(model)
    assert set(smet.correct_gradients(model, optimizer, images()).corrected) == CORRECTED
    route(model, optimizer)
    assert_weights(model, expected)
    with pytest.raises(AssertionError):  # the correction matters at this tolerance
        assert_weights(model, plain)


def test_is_part_of_the_fused_step() -> None:
    torch._dynamo.reset()
    model = sparse_net()
    optimizer = active_sgd(model)
    smet.correct_gradients(model, optimizer, images())
    step = smet.compile_train_step(model, optimizer, loss_of)
    rows = {row.name: row for row in smet.explain(step, images()).sites}
    assert {name: row.update for name, row in rows.items()} == dict.fromkeys(rows, "fused")
    assert {name for name, row in rows.items() if str(row.correction).startswith("corrected")} == CORRECTED
    assert "linear.weight: gradient corrected" in str(smet.explain(step, images()))


def test_factors_follow_the_topology_without_a_new_graph() -> None:
    torch._dynamo.reset()
    model = sparse_net()
    optimizer = torch_sgd(model)
    smet.correct_gradients(model, optimizer, images())
    backend = Capture()
    run = torch.compile(model, backend=backend, fullgraph=True)
    sites = find_sites(model)
    for change in range(3):
        for site in sites.values():
            site.compact.set_mask(torch.roll(site.compact.mask(), change))
        factors = factors_by_mask(model)
        corrected = gradients(run)
        for site in sites.values():
            site.compact.scales_rows = False
        raw = gradients(model)
        for name in CORRECTED:
            sites[name].compact.scales_rows = True
            factor = sites[name].compact.right_inverse(factors[name].expand(sites[name].layout.shape).contiguous())
            torch.testing.assert_close(corrected[name], raw[name] * factor, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(corrected["head.weight"], raw["head.weight"], rtol=1e-10, atol=1e-12)
    assert len(backend.graphs) == 1


def gradients(model: Any) -> dict[str, Any]:
    loss_of(model, images()).backward()
    owner = getattr(model, "_orig_mod", model)
    found = {name: site.values.grad.clone() for name, site in find_sites(owner).items()}
    owner.zero_grad()
    return found


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_growth_sees_the_gradient_without_the_factor(grow: str) -> None:
    """Growth with the correction picks what it picks without, from the same weights."""
    grown = []
    for corrects in (False, True):
        torch.manual_seed(0)
        model = sparse_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if corrects:
            smet.correct_gradients(model, optimizer, images())
        manager = smet.TopologyManager(
            model, optimizer, total_steps=100, every=2, schedule="cosine", grow=grow, min_age=0
        )
        eager_with(model, optimizer, manager)
        assert manager.history
        grown.append({name: site.compact.topology.clone() for name, site in find_sites(model).items()})
    for name in grown[0]:
        assert torch.equal(grown[0][name], grown[1][name]), name


def eager_with(model: nn.Module, optimizer: Optimizer, manager: smet.TopologyManager) -> None:
    for step in range(4):
        loss_of(model, images(step)).backward()
        optimizer.step()
        manager.step()
        optimizer.zero_grad()


def test_copies_keep_it_and_state_dicts_do_not_hold_it() -> None:
    model = sparse_net()
    keys = list(model.state_dict())
    smet.correct_gradients(model, active_sgd(model), images())
    assert list(model.state_dict()) == keys
    expected = gradients(model)
    for name, grad in gradients(copy.deepcopy(model)).items():
        assert torch.equal(grad, expected[name])
