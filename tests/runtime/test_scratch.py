"""An update works on one weight at a time: its scratch memory does not grow with their number."""

from typing import Any

import pytest
from torch import nn

import smet_compile as smet
from tests.support.scratch import Scratch


def peak_of_an_update(num_layers: int, block_shape: Any, grow: str) -> int:
    model = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(num_layers)])
    smet.sparsify(model, density=0.5, block_shape=block_shape)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(
        model, optimizer, auto_step=False, total_steps=100, every=2, grow=grow, schedule="cosine"
    )
    peak_bytes = 0
    for _ in range(4):
        model(model[0].weight.detach()).square().mean().backward()
        optimizer.step()
        with Scratch() as scratch:
            event = manager.step()
        if event:  # the step before makes the buffers for gradients, which stay for one step
            peak_bytes = max(peak_bytes, scratch.peak_bytes)
    assert len(manager.history) == 2
    return peak_bytes


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
def test_six_layers_need_no_more_than_one(block_shape: Any, grow: str) -> None:
    one, six = (peak_of_an_update(num_layers, block_shape, grow) for num_layers in (1, 6))
    assert 0 < six <= 1.2 * one, f"{six} bytes for six layers, {one} for one"


@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
def test_buffers_for_gradients_hold_twice_what_may_grow(block_shape: Any) -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(128, 128)), density=0.5, block_shape=block_shape)
    options: Any = {"total_steps": 100, "every": 1, "grow": "gradient", "schedule": "cosine"}
    manager = smet.TopologyManager(model, smet.ActiveAdamW(model), **options)
    site = manager.sites["0.weight"]
    assert site.compact.collected is not None
    num_kept = 2 * (int(0.2 * site.num_active) + 1)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in site.compact.collected)
    assert num_bytes == num_kept * (8 + 4 * site.values[0].numel())
