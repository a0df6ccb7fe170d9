"""An active optimizer is a torch.optim.Optimizer in schedulers, groups, hooks, scaling, clipping and closures."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.slope import Slope, step_on
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, same_bits, snapshot
from tests.support.training import loss_on, train


def make(**options) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density=0.5)
    return model, smet.ActiveAdamW(model, **{"lr": 1e-2, **options})


def test_is_an_optimizer_of_all_parameters() -> None:
    model, optimizer = make()
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_scheduler_sets_the_rate_of_each_step() -> None:
    model = smet.sparsify(Slope(4, 4).double(), density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1.0, warmup_steps=0, lr_density_exponent=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    values = find_sites(model)["weight"].values
    for step in range(5):
        before = values.detach().clone()
        step_on(model, optimizer)
        scheduler.step()
        torch.testing.assert_close(before - values.detach(), torch.full_like(before, 1 / (1 + step)), rtol=1e-6, atol=0)


def test_a_0d_tensor_rate_is_a_float_rate() -> None:
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model, optimizer = make(lr=lr)
        results.append([train(model, optimizer, steps=5), snapshot(model)])
    assert_same(results[0], results[1])


def test_param_groups_have_their_own_options() -> None:
    model = nn.ModuleList([Slope(4, 4), Slope(4, 4)]).double()
    smet.sparsify(model, density=0.5)
    values = [site.values for site in find_sites(model).values()]
    groups = [{"params": [values[0]], "lr": 0.5, "warmup_steps": 2}, {"params": [values[1]]}]
    optimizer = smet.ActiveAdamW(groups, lr=0.25, warmup_steps=0, lr_density_exponent=0.0, model=model)
    before = [v.detach().clone() for v in values]
    (model[0]() + model[1]()).backward()
    optimizer.step()
    for v, b in zip(values, before, strict=True):
        torch.testing.assert_close(b - v.detach(), torch.full_like(b, 0.25), rtol=1e-6, atol=0)


def test_decay_groups() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(5, 6), nn.Linear(6, 6, bias=False))
    smet.sparsify(model, density=0.5, include=["0", "3"])
    decay, no_decay = smet.decay_groups(model, weight_decay=0.1)
    assert decay["weight_decay"] == 0.1 and no_decay["weight_decay"] == 0.0
    sites = find_sites(model)
    assert {id(p) for p in decay["params"]} == {
        id(sites["0.weight"].values),
        id(sites["3.weight"].values),
        id(model[2].weight),
    }
    assert {id(p) for p in no_decay["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    train_on = smet.ActiveAdamW([decay, no_decay], lr=1e-3, model=model)
    assert [g["weight_decay"] for g in train_on.param_groups] == [0.1, 0.0]


def test_a_group_can_be_added_later() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    compact = [site.values for site in find_sites(model).values()]
    rest = [p for p in model.parameters() if all(p is not v for v in compact)]
    optimizer = smet.ActiveAdamW([{"params": compact}], lr=1e-2, model=model)
    optimizer.add_param_group({"params": rest, "lr": 1e-3})
    before = model[0].bias.detach().clone()
    train(model, optimizer)
    assert not same_bits(model[0].bias.detach(), before)


def test_a_parameter_added_to_the_model_later() -> None:
    model, optimizer = make()
    model.append(nn.Linear(7, 7))
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 1e-3})
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    assert not any(same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="none of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 2


def test_step_hooks_run() -> None:
    model, optimizer = make()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer)
    assert seen == ["before", "after"]


def test_closure() -> None:
    model, optimizer = make()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_on(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(loss_on(make()[0], 0).item())


def test_grad_scaler_changes_nothing_but_the_scale() -> None:
    model, optimizer = make()
    scaled, scaled_optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(10):
        train(model, optimizer, first=step)
        scaler.scale(loss_on(scaled, step)).backward()
        scaler.step(scaled_optimizer)
        scaler.update()
        scaled_optimizer.zero_grad()
    assert_same(snapshot(scaled, scaled_optimizer), snapshot(model, optimizer))


def test_a_step_the_scaler_skips_changes_nothing() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=2)
    before = snapshot(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_on(model, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(snapshot(model, optimizer), before)
    assert scaler.get_scale() == 2.0**9


def test_clipping_acts_on_the_compact_gradients() -> None:
    model, _ = make()
    twin = copy.deepcopy(model)
    loss_on(model, 0).backward()
    loss_on(twin, 0).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    torch.testing.assert_close(norm, expected)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_gradients_add_up() -> None:
    model, _ = make()
    twin = copy.deepcopy(model)
    loss_on(model, 0).backward()
    loss_on(model, 1).backward()
    (loss_on(twin, 0) + loss_on(twin, 1)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_parameter_without_gradient_is_skipped() -> None:
    model, optimizer = make(weight_decay=0.5)
    frozen = find_sites(model)["0.weight"].values.requires_grad_(False)
    unused = model[0].bias.requires_grad_(False)
    before = frozen.detach().clone(), unused.detach().clone()
    train(model, optimizer, steps=3)
    assert same_bits(frozen.detach(), before[0]) and same_bits(unused.detach(), before[1])
    assert frozen not in optimizer.state or not optimizer.state[frozen]


@pytest.mark.parametrize("block_shape", [1, 4])
@pytest.mark.parametrize("kind", [smet.ActiveAdamW, smet.ActiveScale, smet.ActiveSGD])
def test_no_gradient_outlives_zero_grad(kind: type[torch.optim.Optimizer], block_shape: int) -> None:
    """Otherwise two sets of gradients are in memory during the next backward."""
    model = smet.sparsify(two_layers(), density=0.5, block_shape=block_shape)
    optimizer = kind(model, lr=1e-2)
    for step in range(2):
        loss_on(model, step).backward()
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert [gradient() for gradient in gradients] == [None] * len(gradients)


def test_no_gradient_outlives_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One update fails for want of memory, say: the gradients that were read are let go as well."""
    model, optimizer = make()
    loss_on(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_on(model, 1).backward()
    gradients = [weakref.ref(p.grad) for p in model.parameters()]

    def fail(updates: list[Any]) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("smet_compile.optim.parameters.update_all", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    optimizer.zero_grad()
    assert [gradient() for gradient in gradients] == [None] * len(gradients)
