"""A plan runs a few of many equal layers for all, and runs all of them where the model does not go layer by layer."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import smet_compile as smet
from smet_compile.plan import shapes

LAYERS, SIZE, BATCH = 6, 48, 16


class Lists(nn.Module):
    """Has two lists of equal layers; how it goes through them is up to a class that derives from it."""

    def __init__(self, num_others: int = LAYERS) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(LAYERS))
        self.second = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(num_others))
        self.num_layers = LAYERS


class OneAfterTheOther(Lists):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.first, *self.second):
            x = x + torch.tanh(layer(x))
        return x


class Together(Lists):
    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=False):
            x = x + second(torch.tanh(first(x)))
        return x


class ByNumber(Lists):
    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.num_layers):
            x = x + self.second[number](torch.tanh(self.first[number](x)))
        return x


class Enumerated(Lists):
    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.first):
            x = x + self.second[number](torch.tanh(layer(x)))
        return x


class OneLess(Lists):
    """Has the second list between the layers of the first: each layer but the first has one before it."""

    def __init__(self) -> None:
        super().__init__(LAYERS - 1)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.first):
            x = x + torch.tanh(layer(self.second[number - 1](x) if number else x))
        return x


class ByParameters(Lists):
    """Reads the parameters of its layers and calls none of them."""

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + nn.functional.linear(torch.tanh(nn.functional.linear(x, first.weight)), second.weight)
        return x


MODELS: list[Callable[[], nn.Module]] = [OneAfterTheOther, Together, ByNumber, Enumerated, OneLess, ByParameters]


def inputs(batch: int, _: Any) -> Tensor:
    return torch.zeros(batch, SIZE)


def loss_fn(model: Any, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def measured(model: nn.Module) -> tuple[int, int, int]:
    """Returns the operations of a step, the bytes that forward keeps for backward, and those of all gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.dim() == 2 and tensor.shape[0] == BATCH:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = inputs(BATCH, None)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_fn(model, x).backward()
    kept.pop(x.untyped_storage().data_ptr(), None)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return counter.get_total_flops(), sum(kept.values()), gradients


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("build", MODELS)
def test_operations_activations_and_gradients_are_those_of_all_layers(
    build: Callable[[], nn.Module], compiled: bool
) -> None:
    operations, kept, gradients = measured(build())
    plan = smet.plan(build(), 0.3, batch=BATCH, compiled=compiled, inputs=inputs, loss_fn=loss_fn)
    assert plan.dense.operations == operations
    if not compiled:
        assert plan.dense.activations == pytest.approx(kept, rel=0.02, abs=64)
        assert plan.dense.stored["gradients"] == gradients
        assert plan.dense.peak >= 3 * gradients + kept


def test_what_fits_has_room_for_all_layers() -> None:
    """The batch that fits into the peak of a batch is that batch, and the activations of all layers are in the peak."""
    options: dict[str, Any] = {"compiled": False, "inputs": inputs, "loss_fn": loss_fn}
    peak = smet.plan(Together(), 0.3, batch=64, **options).sparse.peak
    assert smet.plan(Together(), 0.3, fits=peak, **options).batch == 64
    assert peak > measured(Together())[1] * 64 / BATCH


def test_equal_layers_that_are_called_one_by_one_are_still_run_from_two(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run_eager = shapes.run_eager

    def look(model: nn.Module, *args: Any) -> Any:
        seen.append([len(module) for module in model.modules() if type(module) is nn.ModuleList])
        return run_eager(model, *args)

    monkeypatch.setattr(importlib.import_module("smet_compile.plan.run"), "run_eager", look)
    smet.plan(OneAfterTheOther(), 0.3, batch=BATCH, compiled=False, inputs=inputs, loss_fn=loss_fn)
    assert sorted(seen[:3]) == [[1, 1], [1, 2], [2, 1]] and [LAYERS, LAYERS] not in seen


def test_a_model_that_fails_whole_is_refused() -> None:
    class Broken(Lists):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.first[LAYERS](x)

    with pytest.raises(ValueError, match=r"model: Broken cannot be run on shapes alone: index 6 is out of range"):
        smet.plan(Broken(), 0.3, batch=BATCH, compiled=False, inputs=inputs, loss_fn=loss_fn)
