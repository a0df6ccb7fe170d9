"""A plain torch.compile, without code generation, equals eager mode and is compiled once for all topologies."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import smet_compile as smet
from smet_compile.ops import direct
from tests.support.living_modules import living_modules_of
from tests.support.small_models import RaggedNet, ToyExperts
from tests.support.snapshots import same_bits


@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
def test_equal_to_eager_and_compiled_once(block_shape: Any) -> None:
    torch._dynamo.reset()
    model: nn.Module = smet.sparsify(RaggedNet(), density=0.5, block_shape=block_shape)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    runs = []
    for each in (model, eager):
        optimizer = smet.ActiveAdamW(each, lr=1e-2)
        runs.append((optimizer, smet.TopologyManager(each, optimizer, total_steps=100, every=2, schedule="cosine")))
    for _ in range(5):
        x = torch.randn(4, 50)
        compiled(x).square().sum().backward()
        with direct.unpacked():  # as a compiled graph does without the passes
            eager(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert same_bits(p.grad, q.grad), name
        for optimizer, manager in runs:
            optimizer.step()
            optimizer.zero_grad()
            manager.step()
    assert [len(manager.history) for _, manager in runs] == [2, 2]
    assert counter.frame_count == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class ExpertsBlock(nn.Module):
    """Reads its weights, which is done under hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = ToyExperts(3, 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts(x)


def blocks(number: int, kind: Callable[[], nn.Module] = Block) -> nn.Module:
    return nn.Sequential(*(kind() for _ in range(number)))


def half(model: nn.Module) -> nn.Module:
    return smet.sparsify(model, density=0.5)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", [Block, ExpertsBlock])
def test_equal_blocks_share_a_graph_as_dense_ones_do(kind: Callable[[], nn.Module], fullgraph: bool) -> None:
    num_graphs = []
    for make in (half, nn.Module.train):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = make(blocks(12, kind))
        eager = copy.deepcopy(model)
        for block in model:
            block.compile(backend=counter, fullgraph=fullgraph)
        x = torch.randn(3, 8)
        model(x).square().sum().backward()
        with direct.unpacked():
            eager(x).square().sum().backward()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert p.grad is not None and same_bits(p.grad, q.grad)
        num_graphs.append(counter.frame_count)
    assert num_graphs == [2, 2]  # the second is for inputs that need gradients


@pytest.mark.usefixtures("older_objects_stay")
@pytest.mark.parametrize("kind", [Block, ExpertsBlock])
def test_models_of_one_class_share_a_graph_and_are_freed_as_dense_ones_are(kind: Callable[[], nn.Module]) -> None:
    x = torch.randn(3, 8)
    found = []
    for make in (half, nn.Module.train):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        for _ in range(3):
            model = make(blocks(1, kind))
            num_living = living_modules_of(model)
            torch.compile(model, backend=counter, fullgraph=True)(x).sum().backward()
            assert num_living() > 1
            del model
            assert num_living() == 0
        found.append(counter.frame_count)
    assert found == [1, 1]
