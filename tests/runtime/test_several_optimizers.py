"""Several optimizers share a manager: one per parameter, per group, stepped in backward; and none that steps."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.masked import masks_of
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, same_bits, snapshot
from tests.support.training import loss_on, train

Kind = Callable[[nn.Module, list[nn.Parameter]], torch.optim.Optimizer]


def active(model: nn.Module, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return smet.ActiveAdamW(params, lr=1e-2, warmup_steps=3, model=model)


def adamw(model: nn.Module, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def sparse_layers() -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(two_layers(), density=0.4)


def manage(model: nn.Module, optimizer: Any, **options: Any) -> smet.TopologyManager:
    return smet.TopologyManager(model, optimizer, **{"total_steps": 1000, "every": 3, "auto_step": False, **options})


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("kind", [active, adamw])
def test_one_per_parameter_stepped_in_backward(kind: Kind, grow: str) -> None:
    """Bit for bit the run with one optimizer, though each gradient is gone when the next is made."""
    model = sparse_layers()
    each = {p: kind(model, [p]) for p in model.parameters()}
    manager = manage(model, each, grow=grow)

    def update(parameter: nn.Parameter) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    twin = sparse_layers()
    one = kind(twin, list(twin.parameters()))
    twin_manager = manage(twin, one, grow=grow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(7):
            loss_on(model, step).backward()
            manager.step()
            train(twin, one, twin_manager, first=step)
    assert manager.num_steps == 7
    assert_same(snapshot(model, manager), snapshot(twin, twin_manager))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(dict(each[mine].state[mine]), dict(one.state[other]))


def test_steps_count_once_whoever_makes_them() -> None:
    """Matrices and biases apart; the biases' optimizer leaves out every second step."""
    model = sparse_layers()
    compact = [site.values for site in find_sites(model).values()]
    matrices, biases = active(model, compact), adamw(model, [model[0].bias, model[3].bias])
    manager = manage(model, [matrices, biases], every=4)
    for step in range(8):
        loss_on(model, step).backward()
        matrices.step()
        if step % 2:
            biases.step()
        matrices.zero_grad()
        biases.zero_grad()
        manager.step()
    assert manager.num_steps == 8 and [event.step for event in manager.history] == [4, 8]


def test_a_gradient_of_any_of_them_that_is_not_finite_postpones_the_update() -> None:
    model = sparse_layers()
    compact = [site.values for site in find_sites(model).values()]
    both = active(model, compact), adamw(model, [model[0].bias, model[3].bias])
    manager = manage(model, both, every=2)
    for step in range(3):
        loss_on(model, step).backward()
        if step == 1:
            model[3].bias.grad[0] = torch.nan
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        model[3].bias.data.nan_to_num_()
        manager.step()
    assert [event.step for event in manager.history] == [3]


def test_a_weight_whose_optimizer_did_not_step_keeps_its_topology() -> None:
    model = sparse_layers()
    first, second = (active(model, [site.values]) for site in find_sites(model).values())
    manager, before = manage(model, (first, second), every=1), masks_of(model)
    loss_on(model, 0).backward()
    second.step()
    event = manager.step()
    assert event is not None and set(event.sites) == {"3.weight"}
    assert torch.equal(masks_of(model)["0.weight"], before["0.weight"])


def test_one_active_adamw_finds_the_others_of_its_model() -> None:
    model, other_model = sparse_layers(), sparse_layers()
    each = [active(model, [p]) for p in model.parameters()]
    others = [active(other_model, [p]) for p in other_model.parameters()]
    manager = manage(model, each[2], every=2)
    assert {id(each[2])} < {id(optimizer) for optimizer in manager.optimizers} <= {id(optimizer) for optimizer in each}
    for step in range(2):
        loss_on(model, step).backward()
        for optimizer in each:
            optimizer.step()
            optimizer.zero_grad()
        manager.step()
    assert set(manager.history[0].sites) == {"0.weight", "3.weight"} and manager.history[0].sites["3.weight"].mean_age
    assert smet.inspect(model, manager=manager).sites[1].history.mean_age is not None
    assert len(others) == 4


def test_an_optimizer_that_another_replaces_is_no_sibling() -> None:
    model = sparse_layers()
    whole = active(model, list(model.parameters()))
    part = active(model, [find_sites(model)["0.weight"].values])
    with pytest.raises(ValueError, match=r"^3\.weight: expected the optimizer to hold"):
        manage(model, part)
    assert whole.param_groups


def test_calls_without_a_step_warn_once() -> None:
    model = sparse_layers()
    held, stepped = (active(model, list(model.parameters())) for _ in range(2))
    manager = manage(model, held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, stepped, manager, steps=9)
    with pytest.warns(UserWarning, match=r"called 10 times and no step of the optimizer \(ActiveAdamW\)") as caught:
        train(model, stepped, manager, first=9, steps=20)
    assert len(caught) == 1 and caught[0].filename.endswith("training.py")


def test_accumulation_does_not_warn() -> None:
    model = sparse_layers()
    optimizer = active(model, list(model.parameters()))
    manager = manage(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(64):
            loss_on(model, step).backward()
            manager.step()
    optimizer.step()
    manager.step()
    assert manager.num_steps == 1


@pytest.mark.parametrize("kind", [active, adamw])
def test_a_weight_that_is_replaced_later_is_an_error_of_the_next_step(kind: Kind) -> None:
    """No gradient reaches the parameters that the optimizer holds."""
    model = sparse_layers()
    optimizer = kind(model, list(model.parameters()))
    manager = manage(model, optimizer)
    train(model, optimizer, manager)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    loss_on(model, 1).backward()
    if kind is active:
        with pytest.raises(ValueError, match=r"0\.weight: the model's weight was replaced"):
            optimizer.step()
    else:
        optimizer.step()
    with pytest.raises(ValueError, match=r"0\.weight: the model's weight was replaced"):
        manager.step()


def test_a_weight_that_is_made_dense_by_hand_is_an_error_of_the_next_step() -> None:
    model = sparse_layers()
    optimizer = active(model, list(model.parameters()))
    manager = manage(model, optimizer)
    train(model, optimizer, manager)
    nn.utils.parametrize.remove_parametrizations(model[3], "weight")
    before = snapshot(model)
    for step in (optimizer.step, manager.step):
        with pytest.raises(ValueError, match=r"3\.weight: the weight was made dense"):
            step()
    assert_same(snapshot(model), before)


def test_a_group_added_later_is_found() -> None:
    model = sparse_layers()
    late = find_sites(model)["3.weight"].values.requires_grad_(False)
    optimizer = adamw(model, [p for p in model.parameters() if p is not late])
    manager = manage(model, optimizer, every=2)
    train(model, optimizer, manager, steps=2)
    late.requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    before = late.detach().clone()
    train(model, optimizer, manager, first=2, steps=2)
    assert [set(event.sites) for event in manager.history] == [{"0.weight"}, {"0.weight", "3.weight"}]
    assert not same_bits(late.detach(), before)
