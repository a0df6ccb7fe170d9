"""A compiled run compiles once for each density stage, with fixed sizes, and trains as the eager loop does."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.living_bytes import living_bytes
from tests.train_step.setting import Net, batch_of

STAGES = [(2, 0.3), (4, 0.7)]
NUM_STEPS = 6


class Counter(CompileCounterWithBackend):
    """Counts graphs, and the inputs of graphs that are symbols or have one as a size."""

    def __init__(self) -> None:
        super().__init__("aot_eager")
        self.num_symbols = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value") if node.op == "placeholder" else None
            is_sized = isinstance(value, Tensor) and any(not isinstance(size, int) for size in value.shape)
            self.num_symbols += is_sized or isinstance(value, torch.SymInt)
        return super().__call__(graph, inputs)


def run(how: str, make_optimizer: Callable[[nn.Module], Any], block_shape: Any) -> tuple[list[float], Any, Counter]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # all runs share the code of Net.forward, and so the limit of its recompiles
    model = smet.sparsify(Net().double(), 1.0, block_shape=block_shape, dense_as_compact=True)
    optimizer, counter = make_optimizer(model), Counter()
    manager = smet.TopologyManager(model, optimizer, total_steps=20, schedule="none", density_schedule=STAGES)
    called = model if how == "eager" else torch.compile(model, backend=counter, fullgraph=True)
    step = smet.compile_train_step(model, optimizer)
    step.compile(backend=counter)
    losses = []
    for i in range(NUM_STEPS):
        if how == "step":
            assert step.fused
            losses.append(step(batch_of(i)).item())
        else:
            loss = called(**batch_of(i)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        manager.step()
    assert len(manager.history) == len(STAGES)
    return losses, model.state_dict(), counter


OPTIMIZERS = {
    "active": lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3),
    "int8": lambda model: smet.ActiveAdamW(model, lr=1e-2, moment_dtype="int8"),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize(("name", "block_shape"), [("active", 1), ("int8", (4, 4)), ("adamw", (1, 4))], ids=str)
def test_each_stage_compiles_once(name: str, block_shape: Any) -> None:
    eager, weights, _ = run("eager", OPTIMIZERS[name], block_shape)
    for how in ("step", "loop"):
        losses, compiled_weights, counter = run(how, OPTIMIZERS[name], block_shape)
        assert (counter.frame_count, counter.num_symbols) == (1 + len(STAGES), 0), how
        torch.testing.assert_close(losses, eager, atol=1e-10, rtol=1e-10)
        for key, tensor in weights.items():
            torch.testing.assert_close(compiled_weights[key], tensor, atol=1e-8, rtol=1e-8)


def test_more_stages_than_recompiles_are_allowed() -> None:
    """Each stage has a compiled step of its own, so none counts as a recompile of another."""
    model = smet.sparsify(Net().double(), 1.0, dense_as_compact=True)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    stages = smet.cubic_density(1.0, 0.1, end=12, num_stages=12)[:10]
    manager = smet.TopologyManager(model, optimizer, total_steps=20, schedule="none", density_schedule=stages)
    step = smet.compile_train_step(model, optimizer)
    step.compile(backend="eager")
    for i in range(12):
        step(batch_of(i))
        manager.step()
    assert step.fused and len(manager.history) == 10


def test_kept_gradients_and_accumulation() -> None:
    model = smet.sparsify(Net().double(), 1.0, dense_as_compact=True)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, schedule="none", density_schedule=STAGES)
    step = smet.compile_train_step(model, optimizer, accumulate=2, max_grad_norm=1.0)
    step.compile(backend="eager")
    for i in range(2 * NUM_STEPS):
        step(batch_of(i))
        manager.step()
    assert [event.step for event in manager.history] == [2, 4]
    assert {round(site.density, 1) for site in find_sites(model).values()} == {0.7}


@pytest.mark.parametrize("how", ["step", "loop"])
def test_the_memory_of_what_goes_is_freed(how: str) -> None:
    """The code compiled for the stage before holds no memory."""
    model = smet.sparsify(nn.Sequential(nn.Linear(200, 150, bias=False)), 1.0, dense_as_compact=True)
    optimizer, x = smet.ActiveAdamW(model), torch.randn(4, 200)
    manager = smet.TopologyManager(
        model, optimizer, auto_step=False, total_steps=9, schedule="none", density_schedule=[(2, 0.1)]
    )
    step = smet.compile_train_step(model, optimizer, lambda model, x: model(x).square().mean())
    step.compile(backend="aot_eager")
    compiled = torch.compile(model, backend="aot_eager")
    for i in range(4):
        if how == "step":
            step(x)
        else:
            compiled(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if i == 1:
            gc.collect()
            full = living_bytes()
        manager.step()
    assert full - living_bytes() >= 0.9 * 30_000 * 13
