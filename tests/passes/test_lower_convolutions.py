"""1x1 convolutions become products over channels: fires, near misses, values and gradients, and no dense gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.passes.graph import MASKED, SAMPLED, UNPACK, calls
from smet_compile.passes.lower_convolutions import BACKWARD, CONVOLUTION, lower_convolutions
from smet_compile.passes.recompute_unpack import recompute_unpack
from smet_compile.tracing import Captured
from tests.passes.compiled import (
    ALL_FUSED,
    FORWARD,
    INPUT,
    WEIGHT,
    assert_idempotent,
    capture,
    matched,
    parts,
    randn,
    targets,
)
from tests.passes.steps import capture_step

W = (20, 12, 1, 1)
Call = Callable[[Tensor, Tensor], Tensor]


def last(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()


FUSED: dict[str, tuple[tuple[int, ...], Call, Callable[[], Tensor]]] = {
    "channels first": (W, lambda x, w: F.conv2d(x, w), lambda: randn(3, 12, 5, 4)),
    "channels last": (W, lambda x, w: F.conv2d(x, w), lambda: last(3, 12, 5, 4)),
    "stride": (W, lambda x, w: F.conv2d(x, w, stride=2), lambda: randn(3, 12, 5, 4)),
    "strides": (W, lambda x, w: F.conv2d(x, w, stride=(3, 1)), lambda: randn(3, 12, 7, 4)),
    "other strides": (W, lambda x, w: F.conv2d(x, w, stride=(1, 3)), lambda: randn(3, 12, 7, 4)),
    "channels last, stride": (W, lambda x, w: F.conv2d(x, w, stride=2), lambda: last(3, 12, 5, 4)),
    "dilation": (W, lambda x, w: F.conv2d(x, w, dilation=2), lambda: randn(3, 12, 5, 4)),
    "one position": (W, lambda x, w: F.conv2d(x, w), lambda: randn(3, 12, 1, 1)),
    "one image": (W, lambda x, w: F.conv2d(x, w), lambda: randn(1, 12, 5, 4)),
    "unbatched": (W, lambda x, w: F.conv2d(x, w), lambda: randn(12, 5, 4)),
    "one dimension": ((20, 12, 1), lambda x, w: F.conv1d(x, w, stride=2), lambda: randn(3, 12, 5)),
    "three dimensions": (
        (20, 12, 1, 1, 1),
        lambda x, w: F.conv3d(x, w, stride=(1, 2, 1)),
        lambda: randn(2, 12, 3, 5, 4),
    ),
    "square": ((12, 12, 1, 1), lambda x, w: F.conv2d(x, w), lambda: randn(3, 12, 5, 4)),
    "twice": ((12, 12, 1, 1), lambda x, w: F.conv2d(torch.tanh(F.conv2d(x, w)), w), lambda: randn(3, 12, 5, 4)),
    "flattened afterwards": (W, lambda x, w: F.conv2d(x, w).flatten(1) ** 2, lambda: randn(3, 12, 5, 4)),
    "a view of all": (W, lambda x, w: F.conv2d(x, w).view(3, -1) ** 2, lambda: randn(3, 12, 5, 4)),
    "some rows": (W, lambda x, w: F.conv2d(x, w[8:16], stride=2), lambda: randn(3, 12, 5, 4)),
    "in two parts": (
        (16, 12, 1, 1),
        lambda x, w: torch.tanh(F.conv2d(x, w.chunk(2)[0])) * F.conv2d(x, w.chunk(2)[1]),
        lambda: randn(3, 12, 5, 4),
    ),
    "as a matrix": (W, lambda x, w: F.linear(x, w.flatten(1)), lambda: randn(3, 12)),
}
KEPT: dict[str, tuple[tuple[int, ...], Call, tuple[int, ...], str]] = {
    "3x3": ((20, 12, 3, 3), lambda x, w: F.conv2d(x, w), (3, 12, 5, 4), "a convolution of kernel 3x3"),
    "padding": (W, lambda x, w: F.conv2d(x, w, padding=1), (3, 12, 5, 4), "a 1x1 convolution with padding"),
    "groups": (W, lambda x, w: F.conv2d(x, w, groups=2), (3, 24, 5, 4), "a grouped convolution"),
    "transposed": (W, lambda x, w: F.conv_transpose2d(x, w), (3, 20, 5, 4), "a transposed convolution"),
    "one channel": ((20, 1, 1, 1), lambda x, w: F.conv2d(x, w), (3, 1, 5, 4), "a convolution with one channel"),
}


def of_convolution(captured: Captured) -> list[Any]:
    assert captured.joint is not None
    return calls(captured.joint.graph, CONVOLUTION, BACKWARD)


def convolution(shape: tuple[int, ...], apply: Call, block: Any) -> nn.Module:
    """Returns a module whose weight is that of a convolution, cut into tiles over channels."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 2]

    class Layer(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return apply(x, self.weight)

    layer = Layer(shape[1], shape[0], shape[2:], bias=False).double()
    return smet.sparsify(layer, 0.5, block_shape=block, include=["*"])


@pytest.mark.parametrize("block", [1, 4, (1, 4)], ids=str)
@pytest.mark.parametrize("form", list(FUSED))
def test_fuses(form: str, block: Any) -> None:
    shape, apply, make = FUSED[form]
    model = convolution(shape, apply, block)
    graph = capture(model, make())
    (found,) = parts(graph)
    assert found == ALL_FUSED and not of_convolution(graph)
    assert graph.joint is not None
    assert not calls(graph.joint.graph, UNPACK)
    if form != "as a matrix":
        assert matched(graph, "lower_convolutions") == (4 if form in ("twice", "in two parts") else 2)


@pytest.mark.parametrize("form", list(KEPT))
def test_near_misses(form: str) -> None:
    shape, apply, x_shape, reason = KEPT[form]
    if form == "transposed":
        layer = nn.ConvTranspose2d(20, 12, 1).double()
        model = smet.sparsify(layer, 0.5, include=["*"])
    else:
        model = convolution(shape, apply, 1)
    graph = capture(model, randn(*x_shape))
    (found,) = parts(graph)
    assert found[FORWARD] == [f"read by {reason}"] == found[INPUT], found
    assert found[WEIGHT] == ["the gradient comes from convolution_backward, which is not a matrix product"]
    assert len(of_convolution(graph)) == 2 and matched(graph, "lower_convolutions") == 0


def test_bias_is_fused_and_has_its_gradient() -> None:
    model = smet.sparsify(nn.Conv2d(12, 20, 1).double(), 0.5, include=["*"])
    graph = capture(model, randn(3, 12, 5, 4))
    assert graph.joint is not None
    (product,) = [node for node in calls(graph.joint.graph, MASKED) if node.args[6] is not None]
    assert not of_convolution(graph) and product is not None


def test_inputs_that_need_no_gradient_and_frozen_weights() -> None:
    model = smet.sparsify(nn.Conv2d(12, 20, 1).double(), 0.5, include=["*"])
    graph = capture(model, randn(3, 12, 5, 4).detach())
    (found,) = parts(graph)
    assert found == {FORWARD: ["fused"], WEIGHT: ["fused"]}
    for site in find_sites(model).values():
        site.values.requires_grad_(False)
    (found,) = parts(capture(model, randn(3, 12, 5, 4)))
    assert found == {FORWARD: ["fused"], INPUT: ["fused"]}


def test_autocast() -> None:
    def check(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for name, want in expected.items():
            error = (actual[name].double() - want.double()).norm() / want.double().norm()
            assert error < 0.02, f"{name}: {error}"

    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    model = smet.sparsify(nn.Conv2d(12, 20, 1), 0.5, include=["*"])
    graph = capture(model, randn(3, 12, 5, 4, dtype=torch.float32), call=call, check=check)
    (found,) = parts(graph)
    assert found == ALL_FUSED and not of_convolution(graph)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dynamic_sizes(memory_format: torch.memory_format) -> None:
    model = smet.sparsify(nn.Conv2d(12, 20, 1, stride=2).double(), 0.5, include=["*"])
    x = randn(3, 12, 5, 6).detach().to(memory_format=memory_format).requires_grad_()
    graph = capture(model, x, dynamic=True)
    assert parts(graph) == [ALL_FUSED] and not of_convolution(graph)


def test_results_have_the_strides_of_the_convolution() -> None:
    model = smet.sparsify(nn.Conv2d(12, 20, 1, bias=False).double(), 0.5, include=["*"])
    for x in (randn(3, 12, 5, 4), last(3, 12, 5, 4)):
        graph = capture(model, x)
        assert graph.joint is not None
        (output,) = graph.joint.graph.find_nodes(op="output")
        images = [node.meta["val"] for node in output.args[0] if node is not None and node.meta["val"].dim() == 4]
        assert [image.stride() for image in images] == [model(x).stride(), x.stride()]


class Block(nn.Module):
    """Is a bottleneck: 1x1, 3x3, 1x1 with a shortcut, and batch norm after each."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.middle, self.norm2 = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.norm3 = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.shortcut, self.norm4 = nn.Conv2d(24, 32, 1, 2, bias=False), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm1(self.reduce(x)))
        y = torch.tanh(self.norm2(self.middle(y)))
        return torch.tanh(self.norm3(self.expand(y)) + self.norm4(self.shortcut(x)))


POINTWISE = {"reduce.weight", "expand.weight", "shortcut.weight"}


@pytest.mark.parametrize("block", [1, 4], ids=str)
def test_no_dense_gradient_of_a_pointwise_site_is_in_the_step(block: Any) -> None:
    model = smet.sparsify(Block().double(), 0.4, block_shape=block, include=["reduce", "middle", "expand", "shortcut"])
    optimizer: list[Any] = []

    def make(each: nn.Module) -> Any:
        made = smet.ActiveSGD(each, lr=0.1)
        optimizer.append(smet.correct_gradients(each, made, torch.randn(3, 24, 6, 6, dtype=torch.float64)))
        return made

    graph = capture_step(model, torch.randn(3, 24, 6, 6, dtype=torch.float64), make, tolerance=1e-10)
    assert all(set(result.corrected) == {*POINTWISE, "middle.weight"} for result in optimizer)
    assert graph.joint is not None
    matrices = {site.layout.matrix for name, site in find_sites(model).items() if name in POINTWISE}
    for half in (graph.joint, graph.forward, graph.backward):
        assert half is not None
        shapes = [node.meta["val"].shape for node in half.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        assert not [shape for shape in shapes if shape[:2] in matrices and set(shape[2:]) <= {1}]
    assert len(calls(graph.joint.graph, SAMPLED)) == 3


def test_idempotent() -> None:
    graph = capture(
        convolution(W, FUSED["stride"][1], 1), randn(3, 12, 5, 4), passes=(recompute_unpack, lower_convolutions)
    )
    assert_idempotent(lower_convolutions, graph)
    assert CONVOLUTION not in targets(graph.joint.graph)  # type: ignore[union-attr]


def test_a_forward_alone() -> None:
    model = smet.sparsify(nn.Conv2d(12, 20, 1), 0.5, include=["*"]).eval()
    (row,) = smet.explain(model, torch.randn(3, 12, 5, 4)).sites
    assert row.forward == "fused"
