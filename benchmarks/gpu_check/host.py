"""Measures the host time of launches on the card."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import smet_compile as smet
from benchmarks.gpu_check.records import Check
from benchmarks.host_cost import NUM_PARAMETERS, ops_of, step_of_many
from benchmarks.ratios import Work
from smet_compile.ops import find_sites

CALLS, CALLS_OF_STEP = 200, 20


def run(check: Check) -> None:
    with torch.no_grad():
        for block in check.size((16, 1), (16,)):
            _measure_ops(check, block)
    with check.attempt("call", case="optimizer step"):
        step = step_of_many(check.size(NUM_PARAMETERS, 4), check.device)
        seconds = host_seconds(check, step, CALLS_OF_STEP)
        check.record("call", case="optimizer step", parameters=check.size(NUM_PARAMETERS, 4), seconds=seconds)


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
