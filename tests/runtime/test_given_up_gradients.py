"""Growth looks at the gradients of steps that were made, not at those that were given up or belong to another loss."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from tests.support.snapshots import assert_same

POLICIES = [
    {"grow": "gradient"},
    {"grow": "momentum", "window": 3},
    {"grow": "gradient", "drop": "saliency", "window": 2},
]


def begin(**options: Any) -> tuple[nn.Module, Any, smet.TopologyManager]:
    torch.manual_seed(0)
    model = smet.sparsify(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), 0.3)
    optimizer = smet.ActiveAdamW(model, lr=1e-3)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=5, **options)


def batch(number: int, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, size, generator=torch.Generator().manual_seed(number), dtype=dtype)


def loss_of(model: nn.Module, number: int) -> Tensor:
    x = batch(number)
    return (model(x) - x.roll(1, 1)).square().mean()


def train(run: Any, give_up: Any = None, micro_batches: int = 1) -> dict[str, Tensor]:
    """Trains for ten steps, before each of which ``give_up`` may compute gradients that no step uses."""
    model, optimizer, manager = run
    for step in range(10):
        if give_up is not None:
            give_up(model, optimizer, step)
        for part in range(micro_batches):
            loss_of(model, 10 * step + part).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [event.step for event in manager.history] == [5, 10]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_zero_grad(model: nn.Module, optimizer: Any, step: int) -> None:
    (1000 * loss_of(model, -1 - step)).backward()
    optimizer.zero_grad()


def twice(model: nn.Module, optimizer: Any, step: int) -> None:
    for _ in range(2):
        (1000 * loss_of(model, -1 - step)).backward()
    model.zero_grad()
    by_zero_grad(model, optimizer, step)


def fail(grad: Tensor) -> None:
    raise MemoryError


def by_an_error(model: nn.Module, optimizer: Any, step: int) -> None:
    hidden = model[0](torch.ones(8, 16))
    hidden.register_hook(fail)  # the last layer has its gradient by then
    with pytest.raises(MemoryError):
        (1000 * model[2](hidden).square().mean()).backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("give_up", [by_zero_grad, twice, by_an_error])
@pytest.mark.parametrize("policies", POLICIES, ids=str)
def test_gradients_that_no_step_uses_change_nothing(policies: Any, give_up: Any, micro_batches: int) -> None:
    expected = train(begin(**policies), micro_batches=micro_batches)
    assert_same(train(begin(**policies), give_up, micro_batches), expected)


def test_steps_that_a_grad_scaler_leaves_out_do_not_count() -> None:
    """Their gradients overflow in one layer alone: those of the other are finite, and would count."""

    def overflow(model: nn.Module, optimizer: Any, step: int) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        loss = scaler.scale(loss_of(model, -1 - step)) + float("inf") * model[2].bias.sum()
        loss.backward()
        scaler.step(optimizer)
        optimizer.zero_grad()

    expected = train(begin(grow="gradient"))
    assert_same(train(begin(grow="gradient"), overflow), expected)


@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("policies", [{}, *POLICIES], ids=str)
def test_a_discriminator_is_moved_by_its_own_loss(policies: Any, freezes: bool) -> None:
    """The generator's loss goes through it, after its own step; then it may be frozen."""
    ends = []
    for through in (False, True):
        torch.manual_seed(0)
        both = smet.sparsify(nn.ModuleDict({"g": nn.Linear(16, 32), "d": nn.Linear(32, 16)}).double(), 0.3)
        of_d, of_g = (smet.ActiveAdamW(list(both[name].parameters()), 1e-2, model=both) for name in "dg")
        manager = smet.TopologyManager(both, [of_d, of_g], total_steps=60, every=5, **policies)
        for step in range(15):
            x, real = (batch(step, size, torch.float64) for size in (16, 32))
            of_d.zero_grad()
            (both["d"](real).square().mean() - both["d"](both["g"](x).detach()).square().mean()).backward()
            of_d.step()
            of_g.zero_grad()
            both["d"].requires_grad_(not freezes)
            judge = both["d"] if through else copy.deepcopy(both["d"]).requires_grad_(False)
            (1000 * judge(both["g"](x)).square().mean()).backward()
            of_g.step()
            both["d"].requires_grad_(True)
        assert [set(event.sites) for event in manager.history] == 3 * [{"d.weight", "g.weight"}]
        ends.append(smet.export_dense(both).state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor != 0, ends[1][name] != 0), name
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-12)


def test_an_error_of_a_policy_leaves_no_gradient_for_the_next_step() -> None:
    """The update that follows reads the gradient of its own step alone."""
    seen: list[Tensor] = []

    @smet.needs_gradient
    def grow(site: Any, context: Any) -> Tensor:
        if not seen:
            seen.append(torch.empty(0))
            raise RuntimeError("not now")
        seen.append(context.gradient.clone())
        return context.gradient_means()

    model, optimizer, manager = begin(grow=grow, auto_step=False)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 4:
            manager.step()
    with pytest.raises(RuntimeError, match="not now"):
        manager.step()
    twin = smet.export_dense(model)
    (expected,) = torch.autograd.grad(loss_of(twin, 5), twin[0].weight)
    loss_of(model, 5).backward()
    optimizer.step()
    assert manager.step() is not None
    kept = seen[1] != 0
    torch.testing.assert_close(seen[1][kept], expected[kept])
    assert manager.num_steps == 6
