"""For random models, compiled equals eager in outputs and every gradient, and the memory facts hold."""

from functools import partial
from typing import Any

import torch
from hypothesis import Phase, given, settings

from smet_compile.passes.pipeline import install
from tests.passes.compiled import (
    FORWARD,
    INPUT,
    WEIGHT,
    assert_close,
    assert_close_rms,
    capture,
    parts,
    train,
)
from tests.passes.memory_facts import makes_no_dense_gradient, saves_no_dense_weight
from tests.passes.random_models import Case, cases
from tests.passes.steps import capture_step

BFLOAT16_RMS = 2e-2
"""Products rounded to bfloat16 (2^-9 each), summed in another order, through several layers."""


def checked(case: Case) -> Any:
    if case.dtype == torch.float64:
        return assert_close
    return partial(assert_close_rms, tolerance=BFLOAT16_RMS) if case.autocast else assert_close_rms


UNSHRUNK = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
"""Cases are small, and each costs a compile."""


@settings(max_examples=12, phases=UNSHRUNK)
@given(case=cases())
def test_captured_equals_eager_and_keeps_the_memory_facts(case: Case) -> None:
    model = case.model()
    graph = capture(model, case.input(), check=checked(case))
    saves_no_dense_weight(graph, model)
    if case.all_fused:
        makes_no_dense_gradient(graph, model)
        for results in parts(graph):
            assert results in ({part: ["fused"] for part in (FORWARD, INPUT, WEIGHT)}, {FORWARD: ["fused"]})


@settings(max_examples=4, phases=UNSHRUNK)
@given(case=cases(max_layers=2).filter(lambda case: case.dtype == torch.float64))
def test_captured_step_equals_the_eager_loop(case: Case) -> None:
    model = case.model()
    saves_no_dense_weight(capture_step(model, case.input().detach()), model)


@settings(max_examples=2, phases=UNSHRUNK)
@given(case=cases(max_layers=2))
def test_inductor_equals_eager(case: Case) -> None:
    torch._dynamo.reset()
    install()
    model, x = case.model(), case.input()
    expected = train(model, model, (x,))
    checked(case)(train(torch.compile(model, fullgraph=True), model, (x,)), expected)
