"""Code that a compiled model leaves to eager mode, between two graphs, is not compiled, and computes the same."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import input_codes

import smet_compile as smet
from smet_compile.ops import saved_weights

WIDTH, NUM_STEPS = 32, 6


class Broken(nn.Module):
    """Breaks the graph between two uses of a weight, and between others."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        middle = self.twice(input)
        read = self.once.weight
        torch._dynamo.graph_break()
        return self.rest(middle, read)

    def rest(self, middle: Tensor, read: Tensor) -> Tensor:
        return self.twice(torch.relu(middle)).square().mean() + 0.01 * (read * self.once.weight).sum()

    def backward_in_parts(self, input: Tensor) -> Tensor:
        """Goes back through the second part, then through the first, as two compiled graphs do."""
        passed = self.twice(input), self.once.weight
        cut = [tensor.detach().requires_grad_() for tensor in passed]
        loss = self.rest(*cut)
        loss.backward()
        torch.autograd.backward(passed, [tensor.grad for tensor in cut])
        return loss


def compiled_by_themselves() -> list[str]:
    """Names the functions of the package at which Dynamo started a graph."""
    codes = [code for reference in input_codes.seen if (code := reference()) is not None]
    ours = [code for code in codes if "smet_compile/" in code.co_filename]
    allowed = [function.__code__ for function in saved_weights.MAY_BE_COMPILED]
    return [f"{code.co_name} of {code.co_filename}" for code in ours if code not in allowed]


def train(grow: str, backend: str | None, active: bool) -> tuple[list[float], nn.Module]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = smet.sparsify(Broken().double(), 0.4)
    optimizer = smet.ActiveAdamW(model, lr=1e-2) if active else torch.optim.AdamW(model.parameters(), lr=1e-2)
    smet.TopologyManager(model, optimizer, total_steps=20, every=2, grow=grow, drop_fraction=0.1)
    called = torch.compile(model, backend=backend or "eager")
    losses = []
    for _ in range(NUM_STEPS):
        input = torch.randn(5, WIDTH, dtype=torch.float64)
        if backend is None:
            loss = model.backward_in_parts(input)
        else:
            loss = called(input)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.filterwarnings("ignore:smet_compile. a compiled graph runs without the passes")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("grow", "active"), [("random", True), ("gradient", True), ("gradient", False)])
def test_training_is_that_of_eager_mode(grow: str, active: bool, backend: str) -> None:
    losses, model = train(grow, backend, active)
    assert compiled_by_themselves() == []
    wanted, eager = train(grow, None, active)
    assert losses == pytest.approx(wanted, rel=1e-9)
    for name, value in eager.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)], ids=["linear", "convolution"])
def test_a_lone_layer_is_one_graph(layer: nn.Module) -> None:
    torch._dynamo.reset()
    model, input = smet.sparsify(layer, 0.4, include="*"), torch.randn(2, WIDTH, 3, WIDTH)
    input = input if isinstance(layer, nn.Linear) else input.permute(0, 1, 3, 2)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(input), model(input))
