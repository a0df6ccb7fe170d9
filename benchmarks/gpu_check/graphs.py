"""Checks CUDA graphs on the card: a step captured by hand, a compiled step in ``mode="reduce-overhead"``, two streams.

Every check compares bits with the same steps launched call by call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks.gpu_check.cases import Case, Layer, same_bits
from benchmarks.gpu_check.records import Check
from benchmarks.layer import DENSITY, PRODUCTS
from benchmarks.ratios import Work

SIDE, LAYERS, TOKENS = 1024, 8, 2048
TRAINED_LAYERS, STEPS, EVERY = 4, 12, 4
REDUCE_OVERHEAD = "reduce-overhead"
_COPIED_INPUTS = "cudagraph_recorded_non_static_inputs"


def run(check: Check) -> None:
    for block in check.size((64, 1), (16,)):
        with check.attempt("graph", block=block):
            _check_captured_step(check, block)
    with check.attempt(REDUCE_OVERHEAD, block=64):
        _check_compiled_step(check, 64)
    with check.attempt("first step"):
        _check_that_a_first_step_is_refused(check)
    with check.attempt("streams"):
        _check_streams(check)


class Step:
    """Multiplies with several layers and updates their weights, always with the same inputs."""

    def __init__(self, check: Check, block: int) -> None:
        side, layers = check.size((SIDE, LAYERS), (32, 1))
        case = Case(side, side, block, check.size(TOKENS, 16))
        self._layers = [Layer(case, check.device) for _ in range(layers)]
        torch.manual_seed(0)
        self.model = _layers(check, side, layers, block)
        self.optimizer = smet.ActiveAdamW(self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)

    def __call__(self) -> list[Tensor]:
        products = [layer.product(part) for layer in self._layers for part in PRODUCTS]
        self.optimizer.step()
        return products


def _layers(check: Check, side: int, layers: int, block: int) -> nn.Sequential:
    with check.device:
        model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    smet.sparsify(model, DENSITY, block_shape=block)
    return model


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _all_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(same_bits(*pair) for pair in zip(first, second, strict=True))


def _check_captured_step(check: Check, block: int) -> None:
    """Compares a replayed step with one that is launched call by call, bit for bit, and their times."""
    eager, captured = Step(check, block), Step(check, block)
    if check.dry:
        check.record("graph", block=block, skipped="no GPU", passed=_all_same(eager(), captured()))
        return
    for step in (eager, captured):
        for _ in range(3):
            step()
    check.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products = captured()
    graph.replay()
    expected = eager()
    check.synchronize()
    same, same_weights = _all_same(products, expected), _all_same(_weights(captured.model), _weights(eager.model))
    times = {"eager_seconds": _wall_seconds(check, eager), "replay_seconds": _wall_seconds(check, graph.replay)}
    found = {"same_products": same, "same_weights": same_weights, "passed": same and same_weights}
    check.record("graph", block=block, **found, **times)


class _Training:
    """Trains a few layers by the compiled step, with topology updates and a rate that changes."""

    def __init__(self, check: Check, block: int, mode: str | None) -> None:
        side, layers = check.size((SIDE, TRAINED_LAYERS), (32, 2))
        torch.manual_seed(0)
        self._model = _layers(check, side, layers, check.size(block, 16)).bfloat16()
        self._optimizer = smet.ActiveAdamW(self._model, lr=1e-3, warmup_steps=2)
        self._manager = smet.TopologyManager(
            self._model, self._optimizer, total_steps=100, every=EVERY, schedule="cosine", auto_step=False
        )
        self._step = smet.compile_train_step(self._model, self._optimizer, lambda model, x: model(x).square().mean())
        self._step.compile(mode=mode)
        self._input = torch.randn(check.size(TOKENS, 16), side, device=check.device, dtype=torch.bfloat16)
        self.losses: list[Tensor] = []

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self._optimizer.param_groups[0]["lr"] *= 0.9
            self.losses.append(self._step(self._input))
            self._manager.step()

    def step_once(self) -> None:
        self._step(self._input)

    def results(self) -> list[Tensor]:
        return [torch.stack(self.losses), *_weights(self._model)]


def _check_compiled_step(check: Check, block: int) -> None:
    """Compares training in the two modes, bit for bit. No graph may be skipped, and each is recorded once.

    A recorded forward copies its input, a recorded backward the gradient of the loss; all else has to stay in place.
    """
    from torch._dynamo.utils import counters

    counters.clear()
    with torch.compiler.set_stance("force_eager" if check.dry else "default"):
        runs = [_Training(check, block, mode) for mode in (None, REDUCE_OVERHEAD)]
        for each in runs:
            each.train(STEPS)
        same = _all_same(*(each.results() for each in runs))
        seen = counters["inductor"]
        found = {"same": same, "skipped_graphs": seen["cudagraph_skips"], "copied_inputs": seen[_COPIED_INPUTS]}
        if check.dry:
            check.record(REDUCE_OVERHEAD, block=block, skipped="no GPU", passed=same)
            return
        eager, replayed = (_wall_seconds(check, each.step_once) for each in runs)
    passed = same and not found["skipped_graphs"] and 0 < found["copied_inputs"] <= 2
    check.record(REDUCE_OVERHEAD, block=block, **found, passed=passed, eager_seconds=eager, replay_seconds=replayed)


def _check_that_a_first_step_is_refused(check: Check) -> None:
    """A capture without a step before it raises, and leaves the weights alone."""
    step = Step(check, check.size(64, 16))
    if check.dry:
        check.record("first step", skipped="no GPU")
        return
    before, message = _weights(step.model), ""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step.optimizer.step()
    except RuntimeError as error:
        message = str(error)
    step()
    check.synchronize()
    refused = message.startswith("CUDA graph: expected")
    moved = not _all_same(before, _weights(step.model))
    check.record("first step", message=message[:200], passed=refused and moved)


def _check_streams(check: Check) -> None:
    """Two models that step on two streams at once end up as they do one after the other."""
    block, times = check.size(64, 16), check.size(10, 1)
    together, alone = [Step(check, block) for _ in range(2)], Step(check, block)
    for _ in range(times):
        alone()
    if check.dry:
        check.record("streams", skipped="no GPU")
        return
    streams = [torch.cuda.Stream() for _ in together]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(times):
        for step, stream in zip(together, streams, strict=True):
            with torch.cuda.stream(stream):
                step()
    check.synchronize()
    check.record("streams", passed=all(_all_same(_weights(s.model), _weights(alone.model)) for s in together))


def _wall_seconds(check: Check, work: Work, times: int = 20) -> float:
    check.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    check.synchronize()
    return (time.perf_counter() - start) / times
