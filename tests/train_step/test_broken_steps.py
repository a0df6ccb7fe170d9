"""Wherever a step fails, no gradient is left, and the next step is that of a fresh TrainStep."""

import copy
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import smet_compile as smet
from smet_compile.ops import find_sites, growth
from tests.support.snapshots import assert_same
from tests.train_step.setting import (
    Batch,
    MakeOptimizer,
    Output,
    Run,
    active,
    assert_equal_runs,
    assert_nothing_left,
    batch_of,
    sparse,
)


class Interrupt(KeyboardInterrupt):
    pass


class Fault(RuntimeError):
    pass


class Breaks(torch.autograd.Function):
    """Is the identity, whose backward raises ``error`` once."""

    error: BaseException | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        error, Breaks.error = Breaks.error, None
        if error is not None:
            raise error
        return grad


class Net(nn.Module):
    """Has three sites, the second frozen. Its backward can fail between the last site and the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 20), nn.LayerNorm(20)
        self.frozen, self.last = nn.Linear(20, 20), nn.Linear(20, 7)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        hidden = Breaks.apply(torch.tanh(self.norm(self.first(x))))
        return Output((self.last(torch.tanh(self.frozen(hidden))) - y).square().mean())


class BadBatch(Mapping[str, Any]):
    """Is a batch whose tensors cannot be read."""

    def __init__(self, batch: Batch, error: BaseException) -> None:
        self.batch, self.error = batch, error

    def __getitem__(self, name: str) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)


def in_backward(run: Run, batch: Batch, error: BaseException) -> Any:
    Breaks.error = error
    return batch


def at_the_input(run: Run, batch: Batch, error: BaseException) -> Any:
    x = batch["x"].clone().requires_grad_()
    once(lambda hook: x.register_hook(hook), error)
    return {**batch, "x": x}


def in_a_hook_of_a_module(run: Run, batch: Batch, error: BaseException) -> Any:
    once(lambda hook: run.model.last.register_forward_hook(hook), error)
    return batch


def in_a_hook_of_a_gradient(run: Run, batch: Batch, error: BaseException) -> Any:
    once(lambda hook: run.model.norm.weight.register_post_accumulate_grad_hook(hook), error)
    return batch


def in_a_batch(run: Run, batch: Batch, error: BaseException) -> Any:
    return BadBatch(batch, error)


def before_the_update(run: Run, batch: Batch, error: BaseException) -> Any:
    once(register_optimizer_step_pre_hook, error)  # with a hook of its own no update would be fused
    return batch


def after_the_update(run: Run, batch: Batch, error: BaseException) -> Any:
    once(lambda hook: run.optimizer.register_step_post_hook(hook), error)
    return batch


def once(register: Callable[[Any], Any], error: BaseException) -> None:
    def hook(*_: Any) -> None:
        handle.remove()
        raise error

    handle = register(hook)


IN_EVERY_CALL = [in_backward, at_the_input, in_a_hook_of_a_module, in_a_hook_of_a_gradient, in_a_batch]
IN_THE_LAST_CALL = [before_the_update, after_the_update]


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9, dampening=0.1)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2)


def run_of(make_optimizer: MakeOptimizer, model: nn.Module | None = None) -> Run:
    torch.manual_seed(0)
    model = sparse(Net) if model is None else model
    return Run(model, make_optimizer(model))


def fresh_copy(run: Run, make_optimizer: MakeOptimizer) -> Run:
    copied = run_of(make_optimizer, copy.deepcopy(run.model))
    copied.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return copied


def check_that_it_goes_on(run: Run, step: smet.TrainStep, make_optimizer: MakeOptimizer, num_calls: int) -> None:
    """Checks that nothing is left of a failed step, and that training goes on as with a fresh step."""
    assert_nothing_left(run.model)
    frozen = [name for name, p in run.model.named_parameters() if not p.requires_grad]
    assert frozen == ["frozen.bias", "frozen.parametrizations.weight.original"]
    for site in find_sites(run.model).values():
        collected = site.compact.collected
        assert collected is None or not collected.has_gradient()
    other = fresh_copy(run, make_optimizer)
    for each, own in (
        (run, step),
        (other, other.compiled(accumulate=step.accumulate, max_grad_norm=step.max_grad_norm)),
    ):
        each.losses.clear()
        each.in_step(own, map(batch_of, range(50, 50 + num_calls)))
    assert run.losses == other.losses
    assert_same(dict(run.model.state_dict()), dict(other.model.state_dict()), "model")
    assert_same(run.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"], "optimizer")


@pytest.fixture(autouse=True)
def no_error_is_left() -> Iterator[None]:
    yield
    assert Breaks.error is None


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("error", [Fault, Interrupt])
@pytest.mark.parametrize(
    ("place", "make_optimizer"),
    [(place, active) for place in IN_EVERY_CALL + IN_THE_LAST_CALL]
    + [(in_backward, adamw), (in_backward, momentum), (in_backward, sgd)],
)
def test_a_fused_step(place: Any, make_optimizer: MakeOptimizer, error: type[BaseException]) -> None:
    for num_before in (0, 2):
        run = run_of(make_optimizer)
        step = run.compiled()
        assert step.fused
        run.in_step(step, map(batch_of, range(num_before)))
        with pytest.raises(error):
            step(place(run, batch_of(7), error()))
        check_that_it_goes_on(run, step, make_optimizer, num_calls=2)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", IN_EVERY_CALL + IN_THE_LAST_CALL)
def test_gradients_that_are_kept(place: Any, accumulate: int) -> None:
    """An accumulation that broke in any of its calls begins anew."""
    for broken_call in range(accumulate) if place in IN_EVERY_CALL else (accumulate - 1,):
        run = run_of(active)
        step = run.compiled(accumulate=accumulate, max_grad_norm=0.1)
        run.in_step(step, map(batch_of, range(accumulate + broken_call)))
        with pytest.raises(Interrupt):
            step(place(run, batch_of(7), Interrupt()))
        check_that_it_goes_on(run, step, active, num_calls=accumulate)


@pytest.mark.usefixtures("uncompiled")
def test_what_a_broken_fused_step_has_done() -> None:
    """Weights whose update came before are those of a whole step, the others are as they were, without a state."""
    run, whole = run_of(active), run_of(active)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    whole.in_step(whole.compiled(), [batch_of(7)])
    with pytest.raises(Fault):
        run.compiled()(in_backward(run, batch_of(7), Fault()))
    expected = dict(whole.model.named_parameters())
    last = "last.parametrizations.weight.original"
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name] if name == last else before[name], rtol=0, atol=0)
    assert set(run.state()) == {last}


@pytest.mark.usefixtures("uncompiled")
def test_gradients_from_before_the_step_are_dropped_too() -> None:
    """A loop that goes on after an error makes them anew: kept, they would count twice."""
    run = run_of(active)
    step = run.compiled()
    run.model(**batch_of(3)).loss.backward()
    with pytest.raises(Fault):
        step(in_backward(run, batch_of(7), Fault()))
    check_that_it_goes_on(run, step, active, num_calls=2)


@pytest.mark.usefixtures("uncompiled")
def test_an_argument_that_is_refused_breaks_no_step() -> None:
    """It is refused before the step begins, so accumulated gradients stay."""
    run, other = run_of(active), run_of(active)
    step, whole = run.compiled(accumulate=2), other.compiled(accumulate=2)
    for each, own in ((run, step), (other, whole)):
        own(batch_of(0))
        if each is run:
            with pytest.raises(ValueError, match="batch: expected a dict"):
                own([1])
        own(batch_of(1))
    assert_same(dict(run.model.state_dict()), dict(other.model.state_dict()))


@pytest.mark.usefixtures("uncompiled")
def test_an_update_that_cannot_be_made_ready_leaves_no_state() -> None:
    """The first weight's update is ready, and has made a state, when the last weight is found to be replaced."""
    run = run_of(active)
    step = run.compiled()
    last = find_sites(run.model)["last.weight"]
    last.module.parametrizations.weight.original = nn.Parameter(last.values.detach().clone())
    with pytest.raises(ValueError, match=r"last\.weight: expected an optimizer that holds it"):
        step(batch_of(0))
    assert not any(run.optimizer.state.values())
    assert_nothing_left(run.model)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_growth_that_breaks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a broken step are forgotten, and the update of the topology takes those of the next."""
    run = run_of(active)
    manager = smet.TopologyManager(run.model, run.optimizer, total_steps=40, every=1, grow="gradient")
    step = run.compiled(**options)
    means, calls = growth.all_block_means, []

    def breaks(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise Fault
        return means(*args)

    with monkeypatch.context() as patched, pytest.raises(Fault):
        patched.setattr(growth, "all_block_means", breaks)
        step(batch_of(0))
    assert len(calls) == 2 and manager.step() is None
    collected = [site.compact.collected for site in manager.sites.values()]
    assert all(each is not None and not each.has_gradient() for each in collected)
    assert_nothing_left(run.model)
    for call in range(step.accumulate):
        step(batch_of(call))
    event = manager.step()
    assert event is not None and set(event.sites) == {"first.weight", "last.weight"}


@pytest.mark.usefixtures("uncompiled")
def test_an_interrupt_while_a_broken_step_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call finishes the cleaning up."""
    run = run_of(active)
    step = run.compiled()
    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(run.model, "zero_grad", lambda **_: in_turn(Interrupt()))
        step(in_backward(run, batch_of(7), Fault()))
    assert [name for name, p in run.model.named_parameters() if p.grad is not None]
    other = fresh_copy(run, active)
    run.in_step(step, map(batch_of, range(2)))
    other.in_step(other.compiled(), map(batch_of, range(2)))
    assert_same(dict(run.model.state_dict()), dict(other.model.state_dict()), "model")
    assert_nothing_left(run.model)


def in_turn(error: BaseException) -> None:
    raise error


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "max_grad_norm": 0.1}], ids=str)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_at_any_time(options: dict[str, Any]) -> None:
    """A timer interrupts steps where it likes: in forwards, hooks, between the updates, in the optimizer."""
    run, random = run_of(active), Random(0)
    step = run.compiled(**options)
    run.in_step(step, map(batch_of, range(6)))
    begin = time.perf_counter()
    run.in_step(step, map(batch_of, range(6)))
    duration, num_interrupts = (time.perf_counter() - begin) / 6, 0

    def interrupt(*_: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for call in range(300):
            asks = [p.requires_grad for p in run.model.parameters()]
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, duration))
                    step(batch_of(call))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                num_interrupts += 1
                if step._num_accumulated == 0:  # else it came between two calls, and left what they accumulated
                    assert_nothing_left(run.model)
            assert [p.requires_grad for p in run.model.parameters()] == asks
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    finally:
        signal.signal(signal.SIGALRM, before)
    assert num_interrupts > 100
    step._num_accumulated = 0
    run.model.zero_grad()
    check_that_it_goes_on(run, step, active, num_calls=step.accumulate)


def test_a_compiled_step() -> None:
    model = sparse()
    run = Run(model, active(model))
    step = run.compiled()
    once(lambda hook: model.norm.weight.register_post_accumulate_grad_hook(hook), Interrupt())
    with pytest.raises(Interrupt):
        step(batch_of(7))
    assert_nothing_left(model)
    other = fresh_copy(run, active)
    run.in_step(step, map(batch_of, range(2)))
    other.in_loop(map(batch_of, range(2)))
    assert_equal_runs(run, other)
