"""Tests models that use weights twice, in checkpointed regions, not at all, or across graph breaks."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.ops.call_forms import ReadTwice
from tests.train_step.setting import Net, Output, active, assert_equal_runs, batch_of, sparse, twice

NUM_STEPS = 15


def dampened(model: nn.Module) -> Optimizer:
    """Makes SGD whose first update is unlike those that follow: torch's momentum buffer begins as the gradient."""
    return SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)


class ReadsTwice(Net):
    """Calls a module twice, which reads its weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.between = ReadTwice(20, 20)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.between(torch.tanh(self.between(super().hidden(x)))))


class Checkpointed(Net):
    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(20, 20)

    def region(self, x: Tensor) -> Tensor:
        return torch.tanh(self.between(self.norm(x)))

    def hidden(self, x: Tensor) -> Tensor:
        return checkpoint(self.region, self.first(x), use_reentrant=self.use_reentrant)


class CheckpointedInAndOut(Checkpointed):
    """Reads a layer in the region and outside."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.between(super().hidden(x)))


class Reentrant(Checkpointed):
    use_reentrant = True


class Region(nn.Module):
    """Adds to its input: inductor overwrites the output of a region that is saved for backward, without us too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(20, 20)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Regions(Net):
    """Has modules that look alike, whose forward is compiled once for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.ModuleList(Region() for _ in range(4))

    def hidden(self, x: Tensor) -> Tensor:
        x = super().hidden(x)
        for region in self.between:
            x = region(x)
        return x


class Break(Net):
    def hidden(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return torch.tanh(self.norm(x))


class ReentrantBreak(Reentrant):
    def region(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().region(x)


class Branch(Net):
    """Uses a layer where numbers of the batch say so, which breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(20, 20)

    def is_used(self, x: Tensor) -> bool:
        return bool(x[0, 0] > 0)

    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        return torch.tanh(self.between(hidden)) if self.is_used(x) else hidden


class Flag(Branch):
    """Uses the layer where the number of rows says so, with one graph for each answer."""

    def is_used(self, x: Tensor) -> bool:
        return x.shape[0] > 5


def both(make_model: Any, make_optimizer: Any = active, batches: Any = None, stance: str = "default") -> smet.TrainStep:
    """Runs step and loop; returns the step."""
    batches = batches or [batch_of(i) for i in range(NUM_STEPS)]
    step_run, loop_run = twice(sparse(make_model), make_optimizer)
    step = step_run.compiled()
    with torch.compiler.set_stance(stance):
        step_run.in_step(step, batches, breaks=issubclass(make_model, (Break, ReentrantBreak, Branch)))
    loop_run.in_loop(batches)
    assert_equal_runs(step_run, loop_run)
    return step


@pytest.mark.parametrize("make_model", [ReadsTwice, CheckpointedInAndOut, Reentrant])
def test_in_one_graph(make_model: Any) -> None:
    assert both(make_model).fused


@pytest.mark.parametrize("frozen", [None, 0, 2])
def test_regions_that_are_compiled_once(frozen: int | None) -> None:
    """Each weight has its own update, also beside a region whose weight has none."""
    step_run, loop_run = twice(sparse(Regions))
    for run in (step_run, loop_run) if frozen is not None else ():
        find_sites(run.model)[f"between.{frozen}.inner.weight"].values.requires_grad_(False)
    step = step_run.compiled("inductor")
    step_run.in_step(step, map(batch_of, range(NUM_STEPS)))
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)))
    assert_equal_runs(step_run, loop_run)
    assert step.fused


@pytest.mark.parametrize("make_model", [Net, ReadsTwice, CheckpointedInAndOut, Reentrant, Regions])
def test_without_the_compiler(make_model: Any) -> None:
    """The step does the same in eager mode, where checkpointed regions run again in backward."""
    assert both(make_model, stance="force_eager").fused


@pytest.mark.parametrize("make_model", [Break, ReentrantBreak])
def test_with_graph_breaks_gradients_are_kept(make_model: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"the step is not one graph \(Call to .*graph_break.*no update is fused"
    ) as seen:
        assert not both(make_model).fused
    assert len([w for w in seen if "compile_train_step" in str(w.message)]) == 1


@pytest.mark.parametrize(("make_model", "make_optimizer"), [(Flag, active), (Flag, dampened), (Branch, dampened)])
def test_a_weight_that_a_step_does_not_reach_stays_as_it_is(make_model: Any, make_optimizer: Any) -> None:
    """Its steps are not counted, its momentum does not decay, and before its first update it has no state."""
    batches = [batch_of(i) for i in range(12)]
    for i, each in enumerate(batches):
        is_used = i in (4, 5, 9)
        each["x"][0, 0] = 1.0 if is_used else -1.0
        if make_model is Flag and not is_used:
            each.update({name: tensor[:4] for name, tensor in each.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="compile_train_step: the step is not one graph")
        step = both(make_model, make_optimizer, batches)
    assert step.fused == (make_model is Flag)
    state = step.optimizer.state[find_sites(step.model)["between.weight"].values]
    assert make_optimizer is dampened or state["step"] == 3


def test_under_compiled_autograd() -> None:
    """Autograd itself runs the backward of a fused step, which is compiled already."""
    step_run, loop_run = twice(sparse(), active, grow="gradient", every=3)
    step = step_run.compiled("inductor")
    compiled_autograd = torch._dynamo.compiled_autograd
    with compiled_autograd._enable(torch.compile(backend="inductor")):
        step_run.in_step(step, map(batch_of, range(NUM_STEPS)))
        assert compiled_autograd.compiled_autograd_enabled
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)))
    assert_equal_runs(step_run, loop_run)
    assert step.fused and len(step_run.manager.history) == NUM_STEPS // 3


def test_a_frozen_weight_stays_and_thaws() -> None:
    model = sparse()
    find_sites(model)["first.weight"].values.requires_grad_(False)
    step_run, loop_run = twice(model)
    step = step_run.compiled()
    for first, is_trained in ((0, False), (5, True), (10, False)):
        for run in (step_run, loop_run):
            find_sites(run.model)["first.weight"].values.requires_grad_(is_trained)
        step_run.in_step(step, map(batch_of, range(first, first + 5)))
        loop_run.in_loop(map(batch_of, range(first, first + 5)))
    assert_equal_runs(step_run, loop_run)
    assert step_run.optimizer.state[find_sites(step_run.model)["first.weight"].values]["step"] == 5


def test_a_model_called_twice_in_the_loss() -> None:
    step_run, loop_run = twice(sparse())

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Output:
        return Output(model(x, y).loss + 0.5 * model(x.cos(), y).loss)

    step = step_run.compiled(loss_fn=lambda model, batch: loss(model, **batch).loss)
    step_run.in_step(step, map(batch_of, range(NUM_STEPS)))
    loop_run.in_loop(map(batch_of, range(NUM_STEPS)), lambda **batch: loss(loop_run.model, **batch))
    assert_equal_runs(step_run, loop_run)


@pytest.mark.usefixtures("uncompiled")
def test_a_gradient_that_was_there_before_is_added_to() -> None:
    step_run, loop_run = twice(sparse())
    for run in (step_run, loop_run):
        run.model(**batch_of(100)).loss.backward()
    step_run.in_step(step_run.compiled(), map(batch_of, range(3)))
    loop_run.in_loop(map(batch_of, range(3)))
    assert_equal_runs(step_run, loop_run)


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "eager"])
def test_a_change_of_a_weight_that_was_read_and_is_still_held(is_compiled: bool) -> None:
    step_run, loop_run = twice(sparse(), dampened)
    step, held = step_run.compiled(), []
    with torch.compiler.set_stance("default" if is_compiled else "force_eager"):
        for call in range(3):
            for run in (step_run, loop_run):  # the read of another weight would keep the change
                weight = run.model.last.weight
                with torch.no_grad():
                    weight.clamp_(-0.1, 0.1)
                held.append(weight)
                if run is step_run:
                    run.in_step(step, [batch_of(call)])
                else:
                    run.in_loop([batch_of(call)])
    assert_equal_runs(step_run, loop_run)
    assert len(held) == 6


@pytest.mark.usefixtures("uncompiled")
def test_a_change_of_a_weight_that_cannot_be_kept_is_an_error_before_the_step() -> None:
    run = twice(sparse(), dampened)[0]
    step, weight = run.compiled(), run.model.last.weight
    before = run.model.state_dict()["last.parametrizations.weight.original"].clone()
    weight.mul_(2)
    with pytest.raises(ValueError, match=r"last\.weight: .* while gradients are recorded"):
        step(batch_of(0))
    assert torch.equal(run.model.state_dict()["last.parametrizations.weight.original"], before)
    assert not run.optimizer.state and step(batch_of(0)).isfinite() and weight.requires_grad
