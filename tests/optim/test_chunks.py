"""The step works in chunks: what it computes does not depend on their size, and it makes little on the side."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites, plain
from tests.support.masked import grids_of, masks_of
from tests.support.scratch import Scratch
from tests.support.slope import Slope, step_on
from tests.support.snapshots import assert_same, snapshot


class Mixture(nn.Module):
    """Has single weights, ragged tiles, and plain parameters of awkward shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Linear(61, 67, bias=False)
        self.tiles = nn.Linear(11, 13, bias=False)
        self.matrix = nn.Parameter(torch.randn(5, 9))
        self.scalar = nn.Parameter(torch.randn(()))
        self.transposed = nn.Parameter(torch.randn(9, 5).t())

    def forward(self, x: Tensor) -> Tensor:
        weights = [p for name, p in self.named_parameters() if "parametrizations" not in name]
        return torch.stack([w.cos().sum() for w in [self.single.weight, self.tiles.weight, *weights]]).sum() * x


def make(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Mixture().to(dtype)
    smet.sparsify(model, density=0.5, include="single.weight")
    return smet.sparsify(model, density=0.5, include="tiles.weight", block_shape=(4, 3))


def spoil(*parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.grad.view(-1)[20] = torch.nan


def run(dtype: torch.dtype, moment_dtype: Any) -> list[Any]:
    model = make(dtype)
    assert not model.transposed.is_contiguous()
    optimizer = smet.ActiveAdamW(model, lr=1e-2, weight_decay=0.1, warmup_steps=3, moment_dtype=moment_dtype)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=2, drop_fraction=0.3, schedule="cosine")
    for step in range(5):
        model(torch.tensor(1.0 + step, dtype=dtype)).backward()
        if step == 4:
            spoil(find_sites(model)["single.weight"].values, find_sites(model)["tiles.weight"].values, model.matrix)
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert len(manager.history) == 2 and optimizer.num_skipped_blocks == 3
    return snapshot(model, optimizer)


@pytest.mark.filterwarnings("ignore:sparsify. the model")
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_chunk_or_many(dtype: torch.dtype, moment_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
    results = []
    for weights_at_once in (7, 10**9):
        monkeypatch.setattr(plain, "_WEIGHTS_AT_ONCE", weights_at_once)
        monkeypatch.setattr(plain, "_WEIGHTS_IN_CACHE", weights_at_once)
        results.append(run(dtype, moment_dtype))
    assert_same(results[0], results[1])


def test_the_step_of_fp32_weights_makes_no_list_of_positions() -> None:
    model = smet.sparsify(Slope(64, 64), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    model().backward()
    with Scratch() as scratch:
        optimizer.step()
    num_active = find_sites(model)["weight"].num_active
    assert (torch.float32, num_active) in scratch.made
    assert not [n for dtype, n in scratch.made if dtype == torch.int64 and n >= num_active]


@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_eps_what_hangs_over_the_edge_stays_zero(dtype: torch.dtype, moment_dtype: Any) -> None:
    """Its gradient is always 0, and 0 / 0 is no number."""
    model = smet.sparsify(Slope(7, 10, torch.randn(7, 10)).to(dtype), density=0.5, block_shape=(4, 4))
    site = find_sites(model)["weight"]
    optimizer = smet.ActiveAdamW(model, lr=1e-2, eps=0.0, weight_decay=0.1, warmup_steps=0, moment_dtype=moment_dtype)
    outside = grids_of(model)["weight"].gather(torch.ones(7, 10), masks_of(model)["weight"]) == 0
    before = site.values.detach().clone()
    for _ in range(20):
        step_on(model, optimizer)
        state = optimizer.state[site.values]
        assert all(bool((t[outside] == 0).all()) for t in (site.values, state["exp_avg"], state["exp_avg_sq"]))
    assert bool(outside.any()) and bool((site.values != before)[~outside].all())
    assert bool(site.values.isfinite().all())
