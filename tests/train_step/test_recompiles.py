"""Four hundred steps with ten changes of topology, a schedule of the rate and a checkpoint: one graph, or the two that
growth by gradient needs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import LambdaLR

import smet_compile as smet
from tests.support.living_modules import living_modules_of
from tests.train_step.setting import Batch, Output

NUM_STEPS = 400


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Output:
        return Output(self.only(x).square().mean())


Advance = Callable[[Batch], None]


def with_step(model: nn.Module, optimizer: smet.ActiveAdamW, counter: CompileCounterWithBackend) -> Advance:
    step = smet.compile_train_step(model, optimizer)
    step.compile(backend=counter)
    return lambda batch: None if step(batch).isfinite() else pytest.fail("the loss is not finite")


def with_loop(model: nn.Module, optimizer: smet.ActiveAdamW, counter: CompileCounterWithBackend) -> Advance:
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def advance(batch: Batch) -> None:
        compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return advance


@pytest.mark.parametrize(
    ("how", "grow", "num_graphs"),
    [
        (with_step, "random", 1),
        (with_step, "gradient", 2),
        (with_loop, "random", 1),
        (with_loop, "gradient", 2),
    ],
)
def test_a_long_run(how: Callable[..., Advance], grow: str, num_graphs: int, tmp_path: Path) -> None:
    model = smet.sparsify(Tiny(), 0.5)
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5)
    manager = smet.TopologyManager(model, optimizer, total_steps=520, every=36, grow=grow)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 40) * (1 - step / 800))
    counter = CompileCounterWithBackend("aot_eager")
    advance = how(model, optimizer, counter)
    for step in range(NUM_STEPS):
        advance({"x": torch.randn(3, 6)})
        scheduler.step()
        manager.step()
        if step == 159:
            smet.save_checkpoint(tmp_path / "checkpoint", model, optimizer, manager)
        if step == 179:
            smet.load_checkpoint(tmp_path / "checkpoint", model, optimizer, manager)
    assert manager.num_steps == NUM_STEPS - 20 and len(manager.history) == 10
    assert counter.frame_count == num_graphs


def test_a_model_is_freed_with_its_step() -> None:
    for _ in range(2):
        model = smet.sparsify(Tiny(), 0.5)
        num_living = living_modules_of(model)
        step = smet.compile_train_step(model, smet.ActiveAdamW(model, lr=1e-2))
        step.compile(backend="aot_eager")
        step({"x": torch.randn(4, 6)})
        del model, step
        assert num_living() == 0
