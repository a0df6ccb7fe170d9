"""A plain torch.compile, without code generation, equals eager mode and is compiled once for all topologies."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import smet_compile as smet
from smet_compile.ops import direct
from tests.support.small_models import RaggedNet
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
