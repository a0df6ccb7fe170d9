"""Measures how long the steps of several runs take beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from benchmarks.ratios import Clock, in_turns
from benchmarks.studies.case import Case
from benchmarks.studies.products import fast_products
from benchmarks.studies.trainer import build, compiled, two_calls

_REPEATS = 15


def step_costs(cases: Sequence[Case], eager: bool) -> list[float]:
    """Returns the median time of a step of each case over the first one's, in one thread, by turns.

    ``eager``: without the compiler.
    """
    torch.set_num_threads(1)
    works = []
    for case in cases:
        trainee = build(case)
        step = two_calls(trainee.model, trainee.optimizer) if eager else compiled(trainee)
        tokens = torch.randint(256, (case.shape.batch, case.shape.sequence), device=case.shape.device)
        works.append(lambda step=step, tokens=tokens: step({"input_ids": tokens, "labels": tokens}))
    device = cases[0].shape.device
    with fast_products(device):
        pairs = in_turns(works[0], works[1:], _REPEATS, Clock(torch.device(device)), warmup=3)
    return [1.0, *(statistics.median(pair.costs) for pair in pairs)]
