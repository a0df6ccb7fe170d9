"""A manager that steps by itself does what an explicit call after each optimizer step does."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.wrappers import Lookahead

STEPS, EVERY = 24, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def sparse_net() -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(Net(), 0.3)


def manager_of(model: nn.Module, optimizer: Any, auto_step: bool, **options: Any) -> smet.TopologyManager:
    return smet.TopologyManager(model, optimizer, total_steps=STEPS, every=EVERY, auto_step=auto_step, **options)


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def one(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [smet.ActiveAdamW(model, 1e-2, warmup_steps=3)]


def torch_one(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2)]


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        smet.ActiveAdamW(model.first.parameters(), 1e-2, model=model),
        torch.optim.SGD(model.second.parameters(), 1e-2, momentum=0.9),
    ]


def one_and_biases(model: nn.Module) -> list[torch.optim.Optimizer]:
    biases = [model.first.bias, model.second.bias]
    others = [p for p in model.parameters() if not any(p is bias for bias in biases)]
    return [smet.ActiveAdamW(others, 1e-2, model=model), torch.optim.SGD(biases, 1e-2)]


def trained(make: Any, auto_step: bool, calls: bool, accumulate: int = 1, **options: Any) -> Any:
    """Trains; returns the model's tensors, its topologies, the history and what the calls returned."""
    model = sparse_net()
    optimizers = make(model)
    manager, events = manager_of(model, optimizers, auto_step, **options), []
    for step in range(STEPS):
        for part in range(accumulate):
            loss_of(model, step * accumulate + part).backward()
            if calls and part < accumulate - 1:
                assert manager.step() is None
        for optimizer in optimizers:
            optimizer.step()
        if calls:
            events.append(manager.step())
        for optimizer in optimizers:
            optimizer.zero_grad()
    return state_of(model), [event.to_dict() for event in manager.history], [e.step for e in events if e]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make", [one, torch_one, two, one_and_biases])
@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_does_what_explicit_calls_do(make: Any, grow: str, accumulate: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, history, steps = trained(make, False, True, accumulate, grow=grow)
        found, own_history, _ = trained(make, True, False, accumulate, grow=grow)
        _, called_history, called_steps = trained(make, True, True, accumulate, grow=grow)
    assert steps == [4, 8, 12, 16] and history == own_history == called_history and called_steps == steps
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_compiled_step_moves_the_topology_too() -> None:
    found = []
    for auto_step in (False, True):
        model = sparse_net()
        optimizer = smet.ActiveAdamW(model, 1e-2)
        manager = manager_of(model, optimizer, auto_step)
        step = smet.compile_train_step(model, optimizer, lambda model, x: model(x).square().mean())
        step.compile(backend="eager")
        for number in range(STEPS):
            step(torch.randn(5, 12, generator=torch.Generator().manual_seed(number)))
            if not auto_step:
                manager.step()
        found.append((state_of(model), [event.step for event in manager.history]))
    (wanted, steps), (own, own_steps) = found
    assert steps == own_steps == [4, 8, 12, 16]
    assert all(torch.equal(own[name], tensor) for name, tensor in wanted.items())


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    model = sparse_net()
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = manager_of(model, optimizer, True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(EVERY):
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.first.bias.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert manager.num_steps == EVERY - 1 and not manager.history


def test_a_resumed_run_goes_on_by_itself() -> None:
    def begin() -> Any:
        model = sparse_net()
        optimizer = smet.ActiveAdamW(model, 1e-2)
        return model, optimizer, manager_of(model, optimizer, True)

    def go(parts: Any, steps: range) -> None:
        model, optimizer, _ = parts
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, half = begin(), begin()
    go(whole, range(STEPS))
    go(half, range(10))
    saved = copy.deepcopy((half[0].state_dict(), half[1].state_dict(), half[2].state_dict()))
    resumed = begin()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    go(resumed, range(10, STEPS))
    assert resumed[2].num_steps == STEPS
    assert all(torch.equal(whole[0].state_dict()[name], tensor) for name, tensor in resumed[0].state_dict().items())


def test_nobody_has_to_keep_the_manager() -> None:
    model = sparse_net()
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager_of(model, optimizer, True)
    gc.collect()
    before = {name: site.compact.topology.clone() for name, site in find_sites(model).items()}
    for step in range(EVERY):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(site.compact.topology, before[name]) for name, site in find_sites(model).items())


def test_hugging_faces_trainer_needs_no_callback(tmp_path: Path) -> None:
    model = sparse_net()
    model.forward = lambda x, labels=None: {"loss": Net.forward(model, x).square().mean()}
    optimizer = smet.ActiveAdamW(model, 1e-2)
    manager = manager_of(model, optimizer, True)
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, **settings)
    rows = [{"x": row, "labels": row} for row in torch.randn(256, 12)]
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert manager.num_steps == STEPS and [event.step for event in manager.history] == [4, 8, 12, 16]


def test_a_flag_is_a_flag() -> None:
    model = sparse_net()
    with pytest.raises(ValueError, match="auto_step: expected True or False, got 'yes'"):
        manager_of(model, one(model)[0], "yes")


def test_it_is_the_default_but_for_wrappers_that_act_afterwards() -> None:
    model = sparse_net()
    plain = smet.ActiveAdamW(model, 1e-2)
    assert smet.TopologyManager(model, plain, total_steps=STEPS, every=EVERY).auto_step
    model = sparse_net()
    wrapped = Lookahead(smet.ActiveAdamW(model, 1e-2), k=2)
    assert not smet.TopologyManager(model, wrapped, total_steps=STEPS, every=EVERY).auto_step
    with pytest.raises(ValueError, match=r"auto_step: expected False for Lookahead, which wraps .* call manager.step"):
        manager_of(model, wrapped, True)


@pytest.mark.parametrize("pause", [3, 100])
def test_an_optimizer_that_pauses_holds_up_nothing(pause: int) -> None:
    """The second makes one step in ``pause``; steps of the first are counted, and its weight moves."""
    model = sparse_net()
    first, second = two(model)
    manager = manager_of(model, [first, second], True)
    before = find_sites(model)["first.weight"].compact.topology.clone()
    for step in range(STEPS):
        loss_of(model, step).backward()
        first.step()
        if step % pause == pause - 1:
            second.step()
        first.zero_grad()
        second.zero_grad()
    assert manager.num_steps >= 20 and manager.history
    assert not torch.equal(find_sites(model)["first.weight"].compact.topology, before)


def test_steps_in_backward_change_the_topology_at_its_end() -> None:
    model, twin = sparse_net(), sparse_net()
    each = {p: torch.optim.SGD([p], 1e-2, momentum=0.9) for p in model.parameters()}
    together = torch.optim.SGD(twin.parameters(), 1e-2, momentum=0.9)
    manager, other = manager_of(model, each, True), manager_of(twin, together, True)

    def update(parameter: nn.Parameter) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for step in range(STEPS):
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        together.step()
        together.zero_grad()
    assert [e.to_dict() for e in manager.history] == [e.to_dict() for e in other.history] and len(manager.history) == 4
    assert all(torch.equal(tensor, state_of(twin)[name]) for name, tensor in state_of(model).items())


def test_of_two_managers_the_later_one_steps() -> None:
    model = sparse_net()
    optimizer = smet.ActiveAdamW(model, 1e-2)
    first = manager_of(model, optimizer, True)
    with pytest.warns(UserWarning, match="another manager, made before, which no longer steps by itself"):
        second = manager_of(model, optimizer, True)
    gone = weakref.ref(first)
    for step in range(EVERY):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not first.history and first.num_steps == 0 and len(second.history) == 1
    assert first.step() is None
    del first
    gc.collect()
    assert gone() is None
    other = smet.ActiveAdamW(model, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager_of(model, other, True)
    assert not second.auto_step


@pytest.mark.parametrize("make", [one, two])
def test_a_copy_of_a_run_and_the_run_step_each_for_itself(make: Any) -> None:
    model = sparse_net()
    optimizers = make(model)
    first = model, optimizers, manager_of(model, optimizers, True)
    other = copy.deepcopy(first)
    for run in (first, other):
        for step in range(STEPS):
            loss_of(run[0], step).backward()
            for optimizer in run[1]:
                optimizer.step()
                optimizer.zero_grad()
    for _, _, manager in (first, other):
        assert manager.auto_step and manager.num_steps == STEPS and len(manager.history) == 4
    assert all(torch.equal(tensor, other[0].state_dict()[name]) for name, tensor in first[0].state_dict().items())


def test_calls_warn_where_the_optimizer_makes_no_step() -> None:
    model = sparse_net()
    manager = smet.TopologyManager(model, smet.ActiveAdamW(model, 1e-2), total_steps=STEPS, every=EVERY)
    with pytest.warns(UserWarning, match=r"step\(\) was called 10 times and no step of the optimizer"):
        for _ in range(10):
            manager.step()
