"""The update in backward rounds as the optimizer does: the same bits, under the same backend."""

from typing import Any

import pytest
import torch

import smet_compile as smet
from smet_compile.passes.fuse_update import SAMPLED_UPDATE, updates
from smet_compile.tracing import Capture
from tests.support.pairs import pairwise
from tests.support.snapshots import assert_same
from tests.train_step.setting import batch_of, sparse, twice


@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "block_shape"),
    pairwise([torch.bfloat16, torch.float32], [torch.bfloat16, "int8"], [1, (1, 4), 4]),
    ids=str,
)
def test_the_same_bits(dtype: torch.dtype, moment_dtype: Any, block_shape: Any) -> None:
    torch._dynamo.reset()
    fused, kept = twice(
        sparse(block_shape=block_shape).to(dtype),
        lambda model: smet.ActiveAdamW(model, 1e-2, warmup_steps=3, moment_dtype=moment_dtype),
        every=3,
    )
    batches = [batch_of(i, dtype) for i in range(10)]
    backend = Capture()
    fused.in_step(fused.compiled(backend), batches)
    kept.in_loop(batches, torch.compile(kept.model, backend=Capture(), fullgraph=True))
    (graph,) = backend.graphs
    assert graph.joint is not None and len(updates(graph.joint.graph, SAMPLED_UPDATE)) == 2
    assert fused.losses == kept.losses
    assert_same(fused.model.state_dict(), kept.model.state_dict())
    assert_same(fused.state(), kept.state())
    assert fused.history() == kept.history() and len(fused.history()) == 3
