"""In bfloat16 the update in backward rounds as the optimizer does: the same bits, under the same backend."""

from typing import Any

import pytest
import torch

import smet_compile as smet
from smet_compile.passes.capture import Capture
from tests.support.snapshots import assert_same
from tests.train_step.setting import batch_of, sparse, twice


@pytest.mark.parametrize(("state_dtype", "block_shape"), [(None, 1), (torch.bfloat16, 4)])
def test_the_same_bits(state_dtype: Any, block_shape: int) -> None:
    model = sparse(block_shape=block_shape).bfloat16()
    fused, kept = twice(model, lambda m: smet.ActiveAdamW(m, 1e-2, warmup_steps=3, state_dtype=state_dtype), every=3)
    batches = [batch_of(i, torch.bfloat16) for i in range(10)]
    fused.in_step(fused.compiled(), batches)
    kept.in_loop(batches, torch.compile(kept.model, backend=Capture(), fullgraph=True))
    assert fused.losses == kept.losses
    assert_same(fused.model.state_dict(), kept.model.state_dict())
    assert_same(fused.state(), kept.state())
    assert fused.history() == kept.history() and len(fused.history()) == 3
