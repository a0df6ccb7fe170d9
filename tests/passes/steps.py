"""Captures training steps, with their updates in backward, and compares them with the eager loop."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import smet_compile as smet
from smet_compile.passes.pipeline import PASSES, Pass
from smet_compile.tracing import Capture, Captured
from tests.passes.compiled import assert_close, settled

Loss = Callable[[nn.Module, Any], Tensor]
NUM_STEPS = 3


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def active_adamw(model: nn.Module) -> Optimizer:
    return smet.ActiveAdamW(model, lr=1e-2, weight_decay=0.1)


def capture_step(
    model: nn.Module,
    batch: Any,
    make_optimizer: Callable[[nn.Module], Optimizer] = active_adamw,
    loss: Loss = mean_square,
    passes: tuple[Pass, ...] = PASSES,
    tolerance: float = 1e-12,
    **options: Any,
) -> Captured:
    """Returns the one graph of a train step, after checking that several steps equal those of the eager loop."""
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make_optimizer(model), make_optimizer(twin)
    step = smet.compile_train_step(model, optimizer, loss, **options)
    backend = Capture(tuple(map(settled, passes)))
    step.compile(backend=backend)
    for _ in range(NUM_STEPS):
        actual = step(batch)
        expected = loss(twin, batch)
        expected.backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()
        assert_close({"loss": actual}, {"loss": expected.detach()}, tolerance)
    assert_close(tensors(model, optimizer), tensors(twin, twin_optimizer), tolerance)
    (graph,) = backend.graphs
    return graph


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        found |= {f"{key} of {name}": state[key] for key in sorted(state) if isinstance(state[key], Tensor)}
    return found
