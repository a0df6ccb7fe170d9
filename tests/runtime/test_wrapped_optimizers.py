"""Whatever wraps an optimizer: its state follows the topology bit for bit, and a training step counts once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.ops.optimizers import find_optimizers
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on
from tests.support.wrappers import (
    SAM,
    Bag,
    Bound,
    Known,
    Lookahead,
    LookaheadInLists,
    LookaheadInside,
    OfParent,
    OnesAtFirst,
    Proxy,
    Unanswering,
    step_in_two,
)

Make = Callable[[nn.Module], Any]


def active(model: nn.Module) -> Any:
    return smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3)


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def of(kind: Any, **options: Any) -> Make:
    return lambda model: kind(model.parameters(), **options)


def make(make_optimizer: Make, every: int = 3) -> tuple[nn.Module, Any, smet.TopologyManager]:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density=0.4)
    optimizer = make_optimizer(model)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=1000, every=every, auto_step=False)


def train_step(model: nn.Module, optimizer: Any, step: int) -> None:
    if isinstance(optimizer, SAM):
        step_in_two(optimizer, lambda: loss_on(model, step))
        return
    loss_on(model, step).backward()
    optimizer.step()
    optimizer.zero_grad()


def states(optimizer: Any, values: nn.Parameter) -> dict[str, Tensor]:
    """Every tensor shaped like ``values`` that any of the optimizers keeps for it."""
    found = [each.state_of(values) for each in find_optimizers(optimizer, [values])]
    return {k: v for state in found for k, v in state.items() if isinstance(v, Tensor) and v.shape == values.shape}


WRAPPED: dict[str, tuple[Make, dict[str, float]]] = {
    "lookahead of AdamW": (lambda model: Lookahead(adamw(model)), {"slow": 0.0, "exp_avg": 0.0}),
    "lookahead of ActiveAdamW": (lambda model: Lookahead(active(model)), {"slow": 0.0, "exp_avg_sq": 0.0}),
    "slow weights in the inner state": (lambda model: LookaheadInside(adamw(model)), {"slow": 0.0, "exp_avg": 0.0}),
    "slow weights in that of ActiveAdamW": (lambda m: LookaheadInside(active(m)), {"slow": 0.0, "exp_avg": 0.0}),
    "SAM": (of(SAM, base_optimizer=torch.optim.AdamW, lr=1e-2), {"exp_avg": 0.0, "climb": 0.0, "old_p": 0.0}),
    "SAM of SGD": (of(SAM, base_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9), {"momentum_buffer": 0.0}),
    "in a container": (lambda model: Bag(adamw(model)), {"exp_avg": 0.0}),
    "by a bound method": (lambda model: Bound(active(model)), {"exp_avg": 0.0}),
    "three deep": (lambda model: Bag(Bound(LookaheadInside(adamw(model)))), {"slow": 0.0, "exp_avg": 0.0}),
    "by a proxy": (lambda model: Proxy(active(model)), {"exp_avg": 0.0}),
    "proxies in a list": (lambda model: Bag(Proxy(adamw(model))), {"exp_avg": 0.0}),  # type: ignore[arg-type]
    "knows its wrapper": (lambda model: Known(adamw(model)).inner, {"exp_avg": 0.0}),
    "a step of its parent": (of(OfParent), {"exp_avg": 0.0}),
    "Rprop": (of(torch.optim.Rprop, lr=1e-2), {"step_size": 1e-2, "prev": 0.0}),
    "Rprop in lookahead": (lambda m: LookaheadInside(torch.optim.Rprop(m.parameters(), lr=0.02)), {"step_size": 0.02}),
    "Adagrad": (of(torch.optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1), {"sum": 0.1}),
    "Adagrad in lookahead": (
        lambda m: Lookahead(torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.2)),
        {"sum": 0.2, "slow": 0.0},
    ),
    "Adamax": (of(torch.optim.Adamax), {"exp_inf": 0.0}),
    "NAdam": (of(torch.optim.NAdam), {"exp_avg_sq": 0.0}),
    "RAdam": (of(torch.optim.RAdam), {"exp_avg_sq": 0.0}),
    "ASGD": (of(torch.optim.ASGD), {"ax": 0.0}),
    "RMSprop": (of(torch.optim.RMSprop, centered=True), {"square_avg": 0.0, "grad_avg": 0.0}),
    "Adadelta": (of(torch.optim.Adadelta), {"acc_delta": 0.0}),
    "a constructor of its own": (lambda model: OnesAtFirst("name", model.parameters()), {"trust": 1.0}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_state_follows_the_topology(name: str) -> None:
    make_optimizer, fresh = WRAPPED[name]
    model, optimizer, manager = make(make_optimizer)
    for step in range(6):
        train_step(model, optimizer, step)
        site = find_sites(model)["0.weight"]
        before = site.mask()
        dense = {}
        for key, state in states(optimizer, site.values).items():
            dense[key] = torch.zeros(before.numel(), dtype=state.dtype)
            dense[key][before] = state.detach()
        weight = model[0].weight.detach().flatten()
        event = manager.step()
        assert manager.num_steps == step + 1 and (event is not None) == (step in (2, 5))
        if event is None:
            continue
        after = site.mask()
        grown = (after & ~before)[after]
        assert grown.any() and torch.equal(model[0].weight.flatten()[after & before], weight[after & before])
        assert torch.equal(site.values == 0, grown)
        got = states(optimizer, site.values)
        for key, number in fresh.items():
            torch.testing.assert_close(got[key][grown], torch.full_like(got[key][grown], number), rtol=0, atol=1e-8)
            assert torch.equal(got[key][~grown], dense[key][after][~grown])


def test_a_step_size_is_fresh_at_the_rate_of_the_moment() -> None:
    model, optimizer, manager = make(of(torch.optim.Rprop, lr=1e-2))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        train_step(model, optimizer, step)
        manager.step()
    values = find_sites(model)["0.weight"].values
    sizes = optimizer.state[values]["step_size"][values == 0]
    torch.testing.assert_close(sizes, torch.full_like(sizes, 3e-3))


def test_asking_changes_nothing() -> None:
    """No random numbers are used up, and a twin of a run without it is the same."""
    model, optimizer, manager = make(of(SAM, base_optimizer=torch.optim.AdamW, lr=1e-2), every=100)
    for step in range(2):
        train_step(model, optimizer, step)
        before, random = snapshot(model), torch.get_rng_state()
        manager.step()
        assert_same(snapshot(model), before)
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("make_optimizer", "match"),
    [
        (lambda m: LookaheadInLists(adamw(m)), r"LookaheadInLists keeps a tensor .* in slow_weights\[0\]\[\d\]"),
        (lambda m: LookaheadInLists(active(m)), r"LookaheadInLists keeps a tensor .* in slow_weights\[0\]\[\d\]"),
        (
            lambda m: Unanswering(torch.Generator(), m.parameters()),
            r"0\.weight: Unanswering keeps a state 'trust' .* could not be made to ask",
        ),
    ],
    ids=["lists", "lists round ActiveAdamW", "unanswering"],
)
def test_what_cannot_follow_is_refused_before_anything_changes(make_optimizer: Make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model, optimizer, manager = make(make_optimizer, every=1)
        train_step(model, optimizer, 0)
        before = snapshot(model)
        try:
            manager.step()
        finally:
            assert_same(snapshot(model), before)


class NoOptimizer:
    """Holds parameters and steps, and is no ``torch.optim.Optimizer``."""

    def __init__(self, params: Any) -> None:
        self.param_groups, self.state = [{"params": list(params)}], {}

    def step(self) -> None: ...


@pytest.mark.parametrize(
    ("make_optimizer", "match"),
    [
        (lambda model: None, r"optimizer: expected an optimizer .*, got None"),
        (lambda model: model, r"optimizer: expected an optimizer .*, got "),
        (lambda model: [], r"optimizer: expected an optimizer .*, got "),
        (lambda model: torch.optim.SGD([find_sites(model)["3.weight"].values]), r"^0\.weight: .*all of them in a list"),
        (lambda model: Bag(adamw(two_layers())), r"optimizer: expected an optimizer .*, got "),
        (lambda model: adamw(two_layers()), r"0\.weight, 3\.weight: expected the optimizer to hold .* AdamW does not"),
        (of(NoOptimizer), "NoOptimizer: expected a torch.optim.Optimizer, whose steps can be counted"),
    ],
    ids=["none", "model", "empty list", "one of two", "bag of another model", "of another model", "no optimizer"],
)
def test_what_holds_no_state_is_refused(make_optimizer: Make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(make_optimizer)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, gradient_accumulation_steps=3)
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("prepare_first", [True, False])
def test_accelerate_accumulates(accelerator: Accelerator, prepare_first: bool) -> None:
    """A run with Accelerate equals one without, whichever is made first; only the inner optimizer's steps count."""
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density=0.4)
    plain = active(model)
    if prepare_first:
        model, optimizer = accelerator.prepare(model, plain)
        manager = smet.TopologyManager(model, optimizer, total_steps=1000, every=3, auto_step=False)
    else:
        manager = smet.TopologyManager(model, plain, total_steps=1000, every=3, auto_step=False)
        model, optimizer = accelerator.prepare(model, plain)
    for step in range(18):
        with accelerator.accumulate(model):
            accelerator.backward(loss_on(model, step))
            optimizer.step()
            optimizer.zero_grad()
            manager.step()
    twin, twin_optimizer, twin_manager = make(active)
    for step in range(18):
        (loss_on(twin, step) / 3).backward()
        if step % 3 == 2:
            twin_optimizer.step()
            twin_optimizer.zero_grad()
            twin_manager.step()
    assert [event.step for event in manager.history] == [3, 6]
    assert_same(snapshot(model, plain, manager), snapshot(twin, twin_optimizer, twin_manager))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool) -> None:
    """A fused optimizer's step is called and skips by itself."""
    model, optimizer, manager = make(of(torch.optim.AdamW, lr=1e-2, fused=fused), every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        loss = loss_on(model, step)
        scaler.scale(loss * torch.inf if step in (1, 3) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        manager.step()
    assert manager.num_steps == 4 and [event.step for event in manager.history] == [2, 4]


def test_a_group_whose_steps_are_differentiable_is_asked_too() -> None:
    model, optimizer, manager = make(lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9))
    optimizer.param_groups[0]["differentiable"] = True  # the optimizer goes by what it was made with
    for step in range(3):
        train_step(model, optimizer, step)
        manager.step()
    assert len(manager.history) == 1
