"""Makes a run twice in float64: with the compiled step, and with the eager loop of calls that it stands for."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import smet_compile as smet
from smet_compile.tracing import Capture
from tests.support.small_models import batch

Batch = dict[str, Any]
MakeOptimizer = Callable[[nn.Module], Optimizer]


class Output(NamedTuple):
    loss: Tensor


class Net(nn.Module):
    """Has two sites, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 7)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x: Tensor, y: Tensor) -> Output:
        return Output((self.last(self.hidden(x)) - y).square().mean())


class Fault(Net):
    """Makes the gradient of a weight's first row NaN where the batch says so, while the loss stays finite."""

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Output:
        root = torch.sqrt(self.first.weight[0].square().sum() * weight) + torch.sqrt(
            self.first.bias.square().sum() * bias
        )
        return Output(super().forward(x, y).loss + 0.01 * root)


def batch_of(step: int, dtype: torch.dtype = torch.float64) -> Batch:
    x, y = batch(step, 12, 7, dtype)
    return {"x": x, "y": y}


def faulty(step: int, bad_weight: bool = False, bad_bias: bool = False) -> Batch:
    flags = {"weight": torch.tensor(float(not bad_weight)), "bias": torch.tensor(float(not bad_bias))}
    return {**batch_of(step), **{name: flag.double() for name, flag in flags.items()}}


def sparse(make_model: Callable[[], nn.Module] = Net, block_shape: Any = 1, density: float = 0.5) -> nn.Module:
    return smet.sparsify(make_model().double(), density, block_shape=block_shape)


def active(model: nn.Module) -> Optimizer:
    return smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5, weight_decay=0.1)


@dataclass
class Run:
    """Holds a model in training, and its losses so far."""

    model: nn.Module
    optimizer: Optimizer
    manager: smet.TopologyManager | None = None
    scheduler: Any = None
    losses: list[float] = field(default_factory=list)

    def compiled(self, backend: Any = None, loss_fn: Any = None, **options: Any) -> smet.TrainStep:
        """Returns a step that runs the passes and generates no code, unless another backend is given."""
        step = smet.compile_train_step(self.model, self.optimizer, loss_fn, **options)
        step.compile(backend=backend or Capture())
        return step

    def in_step(self, step: smet.TrainStep, batches: Iterable[Batch], breaks: bool = False) -> None:
        """Trains by the step. Unless it ``breaks`` into several graphs, it has to stay fused if it was."""
        was_fused = step.fused
        for each in batches:
            self.losses.append(step(each).item())
            self.after_update()
        assert breaks or step.fused == was_fused

    def in_loop(self, batches: Iterable[Batch], call: Any = None) -> None:
        for each in batches:
            loss = (self.model if call is None else call)(**each).loss
            loss.backward()
            self.losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.after_update()

    def after_update(self) -> None:
        if self.scheduler is not None:
            self.scheduler.step()
        if self.manager is not None:
            self.manager.step()

    def state(self) -> dict[str, dict[str, Any]]:
        """Returns the optimizer's state by parameter name, for parameters that have one."""
        named = dict(self.model.named_parameters())
        return {name: dict(self.optimizer.state[p]) for name, p in named.items() if p in self.optimizer.state}

    def history(self) -> list[Any]:
        return [] if self.manager is None else [event.to_dict() for event in self.manager.history]


def twice(model: nn.Module, make_optimizer: MakeOptimizer = active, **manager: Any) -> tuple[Run, Run]:
    """Returns two runs that start alike, with a manager where its arguments are given."""
    runs = []
    for each in (model, copy.deepcopy(model)):
        run = Run(each, make_optimizer(each))
        if manager:
            run.manager = smet.TopologyManager(
                each, run.optimizer, **{"total_steps": 100, "every": 4, "schedule": "cosine", **manager}
            )
        runs.append(run)
    return runs[0], runs[1]


def assert_equal_runs(actual: Run, expected: Run) -> None:
    """Compares losses, parameters, topologies, optimizer states and histories, to 1e-12 of their largest entry."""
    assert expected.losses
    assert_close(actual.losses, expected.losses, "losses")
    assert_close(dict(actual.model.state_dict()), dict(expected.model.state_dict()), "model")
    assert_close(actual.state(), expected.state(), "optimizer")
    assert actual.history() == expected.history()
    assert_nothing_left(actual.model)


def assert_nothing_left(model: nn.Module) -> None:
    """Checks that there is no gradient and no open sink."""
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    sinks = [getattr(m, "update_sink", None) for m in model.modules()]
    assert sinks and not any(sink is not None for sink in sinks)


def assert_close(actual: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor) and expected.is_floating_point():
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, where
        difference, size = (actual - expected).detach().abs().max(), expected.detach().abs().max()
        assert difference <= 1e-12 * size, f"{where}: off by {difference:.3g} of {size:.3g}"
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: {list(actual)} != {list(expected)}"
        for key in expected:
            assert_close(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert_close(torch.tensor(actual).double(), torch.tensor(expected).double(), where)
    else:
        assert actual == expected, f"{where}: {actual!r} != {expected!r}"
