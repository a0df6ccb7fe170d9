"""CUDA graphs on a GPU: steps that are captured by hand, and steps of two models on two streams, equal called ones.

Nothing here runs without a GPU; ``test_triton_adamw_captures.py`` and ``tests/train_step/test_cuda_graphs.py`` check
what can be checked on a CPU.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.format import TopologyChange, pack_bits
from smet_compile.ops import find_sites
from tests.ops.kernels.device import DEVICE, HAS_GPU

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no GPU")
SIDE, TOKENS, STEPS = 128, 64, 4
Loss = Callable[[nn.Module, Tensor], Tensor]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).float().square().mean()
    return loss


class Run:
    """Holds a model of tiles, single weights and biases, and its optimizer."""

    def __init__(self, lr: float | Tensor = 1e-2, rule: type = smet.ActiveAdamW) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE)
        self.model = nn.Sequential(*layers).to(DEVICE, torch.bfloat16)
        smet.sparsify(self.model, 0.5, block_shape=1, include=["0.weight"])
        smet.sparsify(self.model, 0.5, block_shape=32, include=["2.weight"])
        self.optimizer = rule(self.model, lr=lr, moment_dtype="int8")
        self.input = torch.randn(TOKENS, SIDE, device=DEVICE, dtype=torch.bfloat16)

    def backward(self) -> None:
        loss_of(self.model, self.input).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def capture(self) -> torch.cuda.CUDAGraph:
        """Captures a step, after some on a stream of their own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self.backward()
            self.optimizer.step()
        return graph

    def tensors(self) -> list[Tensor]:
        states = (tensor for p in self.model.parameters() for tensor in self.optimizer.state[p].values())
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *states)]


def assert_same(one: Run, other: Run) -> None:
    for first, second in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", [smet.ActiveAdamW, smet.ActiveLion])
def test_replays_equal_steps(rule: type) -> None:
    captured, called = Run(rule=rule), Run(rule=rule)
    graph = captured.capture()
    for _ in range(STEPS):
        graph.replay()
    for _ in range(2 * STEPS):
        called.step()
    assert_same(captured, called)


def test_a_rate_on_the_device_is_read_at_each_replay() -> None:
    rates = [torch.tensor(1e-2, device=DEVICE) for _ in range(2)]
    captured, called = (Run(rate) for rate in rates)
    graph = captured.capture()
    for _ in range(STEPS):
        called.step()
    for step in range(STEPS):
        for rate in rates:
            rate.fill_(1e-2 / (step + 2))
        graph.replay()
        called.step()
    assert_same(captured, called)


def test_eager_steps_go_on_between_replays() -> None:
    captured, called = Run(), Run()
    graph = captured.capture()
    for _ in range(STEPS):
        graph.replay()
        captured.step()
    for _ in range(3 * STEPS):
        called.step()
    assert_same(captured, called)


def test_a_topology_that_changes_between_replays() -> None:
    captured, called = Run(), Run()
    graph = captured.capture()
    for _ in range(STEPS):
        called.step()
    for run in (captured, called):
        for name, site in find_sites(run.model).items():
            generator = torch.Generator().manual_seed(len(name))
            shuffled = torch.randperm(site.layout.num_blocks, generator=generator)[: site.num_active].to(DEVICE)
            mask = torch.zeros_like(site.mask()).index_fill_(0, shuffled, True)
            change = TopologyChange.between(site.values, site.mask(), mask)
            with torch.no_grad():
                change.remap_(site.values)
                site.compact.set_bits(pack_bits(mask))
            run.optimizer.on_topology_change(change)
    for _ in range(STEPS):
        graph.replay()
        called.step()
    assert_same(captured, called)


def test_a_first_step_cannot_be_captured() -> None:
    run, other = Run(), Run()
    run.backward()
    expected = "CUDA graph: expected a step of the same parameters before the capture"
    with pytest.raises(RuntimeError, match=expected), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.optimizer.step()
    run.optimizer.step()
    other.step()
    assert_same(run, other)


def test_a_rate_on_the_host_cannot_be_captured() -> None:
    run = Run(torch.tensor(1e-2))
    with pytest.raises(RuntimeError, match="got lr on cpu; pass a number, or a tensor on cuda"):
        run.capture()


def test_two_models_on_two_streams() -> None:
    together, alone = [Run() for _ in range(2)], Run()
    streams = [torch.cuda.Stream() for _ in together]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5 * STEPS):
        for run, stream in zip(together, streams, strict=True):
            with torch.cuda.stream(stream):
                run.step()
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    for _ in range(5 * STEPS):
        alone.step()
    for run in together:
        assert_same(run, alone)


def compiled(run: Run, mode: str | None) -> list[Tensor]:
    """Trains by the compiled step with topology updates, and returns the losses."""
    own = smet.TopologyManager(run.model, run.optimizer, total_steps=100, every=4, schedule="cosine")
    step = smet.compile_train_step(run.model, run.optimizer, loss_of)
    step.compile(mode=mode)
    losses = []
    for number in range(3 * STEPS):
        run.optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
        losses.append(step(run.input))
        own.step()
    assert step.fused and len(own.history) == 3
    return losses


@pytest.mark.filterwarnings("ignore:TopologyManager")
@pytest.mark.parametrize("rule", [smet.ActiveAdamW, smet.ActiveLion])
def test_reduce_overhead_equals_the_default(rule: type) -> None:
    """The losses stay what they were, though a replay computes the next one in the same memory."""
    from torch._dynamo.utils import counters

    counters.clear()
    runs = [Run(rule=rule) for _ in range(2)]
    losses = [compiled(run, mode) for run, mode in zip(runs, (None, "reduce-overhead"), strict=True)]
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0, "no graph was recorded"
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert_same(*runs)
