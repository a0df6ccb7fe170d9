"""Measures the host time of launches on the card, and whether a step can be captured in a CUDA graph and replayed."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks.gpu_check.cases import Case, Layer, same_bits
from benchmarks.gpu_check.records import Check
from benchmarks.host_cost import NUM_PARAMETERS, ops_of, step_of_many
from benchmarks.layer import DENSITY, PRODUCTS
from benchmarks.ratios import Work
from smet_compile.ops import find_sites

CALLS, CALLS_OF_STEP = 200, 20
SIDE = 1024
LAYERS = 8


def run(check: Check) -> None:
    with torch.no_grad():
        for block in check.size((16, 1), (16,)):
            _measure_ops(check, block)
    with check.attempt("call", case="optimizer step"):
        step = step_of_many(check.size(NUM_PARAMETERS, 4), check.device)
        seconds = host_seconds(check, step, CALLS_OF_STEP)
        check.record("call", case="optimizer step", parameters=check.size(NUM_PARAMETERS, 4), seconds=seconds)
    for block in check.size((64, 1), (16,)):
        with check.attempt("graph", block=block):
            _check_graph(check, block)


def _measure_ops(check: Check, block: int) -> None:
    layer = smet.sparsify(nn.Linear(64, 64, bias=False, device=check.device), 0.5, block_shape=block)
    (site,) = find_sites(layer).values()
    with torch.device(check.device):
        calls = ops_of(site)
    for name, call in calls.items():
        with check.attempt("call", case=name, block=block):
            check.record("call", case=name, block=block, seconds=host_seconds(check, call, CALLS))


def host_seconds(check: Check, call: Work, calls: int) -> float:
    """Returns the median time that a call keeps Python. The queue of launches is emptied now and then."""
    found = []
    for number in range(check.size(calls, 1)):
        if number % 50 == 0 and not check.dry:
            call()
            check.synchronize()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    check.synchronize()
    return statistics.median(found)


class _Step:
    """Multiplies with several layers and updates their weights, always with the same inputs."""

    def __init__(self, check: Check, block: int) -> None:
        side, layers = check.size((SIDE, LAYERS), (32, 1))
        case = Case(side, side, block, check.size(2048, 16))
        self._layers = [Layer(case, check.device) for _ in range(layers)]
        torch.manual_seed(0)
        with check.device:
            model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
        smet.sparsify(model, DENSITY, block_shape=block)
        self.optimizer = smet.ActiveAdamW(model)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)

    def __call__(self) -> list[Tensor]:
        products = [layer.product(part) for layer in self._layers for part in PRODUCTS]
        self.optimizer.step()
        return products

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for group in self.optimizer.param_groups for p in group["params"]]


def _check_graph(check: Check, block: int) -> None:
    """Compares a replayed step with one that is launched call by call, bit for bit, and their times."""
    eager, captured = _Step(check, block), _Step(check, block)
    if check.dry:
        same = all(same_bits(*pair) for pair in zip(eager(), captured(), strict=True))
        check.record("graph", block=block, skipped="no GPU", passed=same)
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
    same = all(same_bits(*pair) for pair in zip(products, expected, strict=True))
    same_weights = all(same_bits(*pair) for pair in zip(captured.weights(), eager.weights(), strict=True))
    times = {"eager_seconds": _wall_seconds(check, eager), "replay_seconds": _wall_seconds(check, graph.replay)}
    found = {"same_products": same, "same_weights": same_weights, "passed": same and same_weights}
    check.record("graph", block=block, **found, **times)


def _wall_seconds(check: Check, work: Work, times: int = 20) -> float:
    check.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    check.synchronize()
    return (time.perf_counter() - start) / times
