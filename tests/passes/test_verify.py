"""The pass verify reports for each site what was fused, and why something was not; it changes nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smet_compile as smet
from smet_compile.passes.graph import PassReport
from smet_compile.passes.verify import outcomes, verify
from smet_compile.tracing import Captured
from tests.passes.compiled import ALL_FUSED, FORWARD, INPUT, WEIGHT, capture, code, parts, randn, reads
from tests.passes.steps import capture_step

W = (24, 16)


def report(captured: Captured) -> PassReport:
    (found,) = (each for each in captured.reports if each.name == "verify")
    return found


def two_sites() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(40, 24)).double()
    return smet.sparsify(model, 0.5, include="*.weight")


def test_counts_fused_sites_and_names_the_others() -> None:
    graph = capture(two_sites(), randn(2, 4, 7))
    assert report(graph).matched == 1
    assert graph.joint is not None
    (name,) = {name for name, _ in report(graph).skipped}
    assert name in [node.name for node in graph.joint.graph.find_nodes(op="placeholder")]
    assert len(report(graph).skipped) == 3 and any("convolution" in reason for _, reason in report(graph).skipped)


def test_says_fused_of_each_part_that_there_is() -> None:
    graph = capture(reads(W, lambda x, w: F.linear(x, w)), randn(5, 16))
    assert parts(graph) == [ALL_FUSED]
    assert graph.joint is not None
    assert [outcome.reasons for outcome in outcomes(graph.joint.graph).values()] == [[]]


def test_says_fused_of_an_update() -> None:
    graph = capture_step(reads(W, lambda x, w: F.linear(x, w)), torch.randn(5, 16, dtype=torch.float64))
    assert parts(graph) == [{FORWARD: ["fused"], WEIGHT: ["fused"], "update": ["fused"]}]


REASONS: dict[str, tuple[Any, list[Any], str, str]] = {
    "scaled sum": (
        lambda b, x, w: torch.addmm(b, x, w.t(), beta=2),
        [(24,), (5, 16)],
        FORWARD,
        "multiplied by addmm in a form that is not known, or added to what it multiplies",
    ),
    "returned": (lambda w: w, [], FORWARD, "the dense weight is returned or crosses a graph break"),
    "elementwise": (lambda x, w: x * w, [(24, 16)], FORWARD, "read by mul, which is not a matrix product"),
    "elementwise, backward": (lambda x, w: x * w, [(24, 16)], INPUT, "read by mul, which is not a matrix product"),
    "gradient read twice": (
        lambda x, d, w: F.linear(x, w) + F.linear(x, w + d),
        [(5, 16), (24, 16)],
        WEIGHT,
        "the gradient comes from add, which is not a matrix product",
    ),
    "gradient of others": (
        lambda d, w: w + d,
        [(24, 16)],
        WEIGHT,
        "the dense gradient is read by others too (growth by gradient reads it in the step before an update)",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_says_why_not(name: str) -> None:
    apply, inputs, part, reason = REASONS[name]
    (results,) = parts(capture(reads(W, apply), *(randn(*shape) for shape in inputs)))
    assert reason in results[part]


def test_changes_nothing() -> None:
    graph = capture(two_sites(), randn(2, 4, 7))
    before = code(graph)
    assert graph.joint is not None
    first, second = verify(graph.joint.graph), verify(graph.joint.graph)
    assert first == second == report(graph)
    assert code(graph) == before
