"""In bfloat16 the update in backward rounds as the optimizer does: the same bits, under the same backend."""

import torch
from torch import nn
from torch.optim import Optimizer

import smet_compile as smet
from smet_compile.passes.capture import Capture
from tests.support.snapshots import assert_same
from tests.train_step.setting import batch_of, sparse, twice


def bf16_moments(model: nn.Module) -> Optimizer:
    return smet.ActiveAdamW(model, 1e-2, warmup_steps=3, state_dtype=torch.bfloat16)


def test_the_same_bits() -> None:
    fused, kept = twice(sparse(block_shape=4).bfloat16(), bf16_moments, every=3)
    batches = [batch_of(i, torch.bfloat16) for i in range(10)]
    fused.in_step(fused.compiled(), batches)
    kept.in_loop(batches, torch.compile(kept.model, backend=Capture(), fullgraph=True))
    assert fused.losses == kept.losses
    assert_same(fused.model.state_dict(), kept.model.state_dict())
    assert_same(fused.state(), kept.state())
    assert fused.history() == kept.history() and len(fused.history()) == 3
