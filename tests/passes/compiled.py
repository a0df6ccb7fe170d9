"""Models captured with the passes, and compared with eager: outputs and every gradient, by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.passes.graph import PassReport
from smet_compile.passes.pipeline import PASSES, Pass
from smet_compile.passes.verify import outcomes, verify
from smet_compile.tracing import Capture, Captured

FORWARD, INPUT, WEIGHT = "forward", "input gradient", "weight gradient"
ALL_FUSED = {FORWARD: ["fused"], INPUT: ["fused"], WEIGHT: ["fused"]}
Results = dict[str, Tensor]


class Reads(nn.Module):
    """Has one weight, and computes ``apply(*inputs, weight)`` with it."""

    def __init__(self, shape: tuple[int, ...], apply: Callable[..., Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.num_experts = shape[0]
        self.apply_weight = apply

    def forward(self, *inputs: Any) -> Any:
        return self.apply_weight(*inputs, self.weight)


def reads(shape: tuple[int, ...], apply: Callable[..., Any], block: Any = 8, dtype: torch.dtype = torch.float64) -> Any:
    return smet.sparsify(Reads(shape, apply, dtype), 0.5, block_shape=block, include="*")


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def train(call: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...]) -> Results:
    """Returns outputs, and all gradients of a sum of the outputs with different weights."""
    leaves = {f"gradient of {name}": p for name, p in model.named_parameters()}
    leaves |= {f"gradient of input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    for leaf in leaves.values():
        leaf.grad = None
    outputs = [out for out in tree_leaves(call(*inputs)) if isinstance(out, Tensor)]
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    losses = [(out.double() * _slopes(out)).sum() for out in outputs if out.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    return found | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _slopes(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)


def assert_close(actual: Results, expected: Results, tolerance: float = 1e-12) -> None:
    """Compares by the largest difference, relative to the largest entry."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        got = actual[name]
        assert got.dtype == want.dtype and got.shape == want.shape, name
        if want.numel():
            scale = max(1.0, want.abs().max().item())
            error = (got.double() - want.double()).abs().max().item() / scale
            assert error <= tolerance, f"{name}: {error:.1e}"


def assert_close_rms(actual: Results, expected: Results, tolerance: float = 1e-5) -> None:
    """Compares by the root mean square of the difference, relative to that of the expected tensor."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        error = (actual[name].double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def capture(
    model: nn.Module,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    passes: tuple[Pass, ...] = PASSES,
    check: Callable[[Results, Results], None] = assert_close,
    **options: Any,
) -> Captured:
    """Returns the one graph that ``call`` (default: the model) is compiled to, and checks that it equals eager mode.

    Each pass runs twice, and must find nothing to do the second time.
    """
    torch._dynamo.reset()
    call = call or (lambda *args: model(*args))
    expected = train(call, model, inputs)
    backend = Capture(tuple(map(settled, passes)))
    actual = train(torch.compile(call, backend=backend, fullgraph=True, **options), model, inputs)
    check(actual, expected)
    (graph,) = backend.graphs
    return graph


def settled(each: Pass) -> Pass:
    def twice(graph: fx.Graph) -> PassReport:
        report = each(graph)
        before = str(graph)
        assert each(graph).matched == 0 or each is verify, f"{report.name} is not idempotent"
        assert str(graph) == before, f"{report.name} is not idempotent"
        return report

    return twice


def parts(captured: Captured) -> list[dict[str, list[str]]]:
    """Returns what verify reports for each site."""
    assert captured.joint is not None
    return [outcome.parts for outcome in outcomes(captured.joint.graph).values()]


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def code(captured: Captured) -> str:
    assert captured.joint is not None
    captured.joint.recompile()
    return captured.joint.code


def dense_sizes(model: nn.Module) -> set[int]:
    return {site.layout.num_weights for site in find_sites(model).values()}


def upto(last: Pass) -> tuple[Pass, ...]:
    """Returns the passes of the pipeline up to ``last``."""
    return PASSES[: PASSES.index(last) + 1]


def matched(captured: Captured, name: str) -> int:
    (report,) = (report for report in captured.reports if report.name == name)
    return report.matched


def assert_idempotent(each: Pass, captured: Captured) -> None:
    """Checks that ``each``, a pass that ``captured`` went through, finds nothing more to do."""
    assert captured.joint is not None
    before = code(captured)
    assert each(captured.joint.graph).matched == 0
    assert code(captured) == before
