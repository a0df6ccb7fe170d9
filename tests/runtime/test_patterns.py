"""Updates keep the budgets of patterns, whatever policy chooses, and leave survivors bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import Site, find_sites
from tests.support.blocks import Grid
from tests.support.training import loss_on

KINDS = [("fan_in", 1), ("fan_in", (1, 4)), ("fan_in", 4), ("2:4", 1), ("1:4", 1), ("3:4", 1)]


def make_model(pattern: str, block_shape: Any, density: float | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))
    density = None if ":" in pattern else density
    return smet.sparsify(model, density, block_shape=block_shape, pattern=pattern)


def counts(site: Site, pattern: str) -> Tensor:
    """Returns the number of active blocks of each row, or of each M weights."""
    size = site.layout.block_cols if pattern == "fan_in" else int(pattern[2])
    return site.mask().view(-1, size).sum(1)


def any_scores(site: Site, context: smet.TopologyContext) -> Tensor:
    """Scores with many ties and infinities, as a policy of a user may."""
    chance = torch.rand(context.scores_shape, generator=context.generator)
    return torch.where(chance < 0.2, torch.inf, (chance * 3).round())


def train(model: nn.Module, steps: int, check: Callable[[], None], **options: Any) -> smet.TopologyManager:
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=0)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=1000, every=1, drop_fraction=0.3, schedule="constant", **options
    )
    for step in range(steps):
        loss_on(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: model.get_submodule(name[0]).weight.detach().clone() for name in manager.sites}
        masks = {name: site.mask() for name, site in manager.sites.items()}
        manager.step()
        for name, site in manager.sites.items():
            survived = (masks[name] & site.mask()).view(site.layout.block_rows, site.layout.block_cols)
            bm, bn = site.layout.block_shape
            inside = survived.repeat_interleave(bm, 0).repeat_interleave(bn, 1)[: site.layout.rows, : site.layout.cols]
            assert torch.equal(model.get_submodule(name[0]).weight * inside, before[name] * inside)
        check()
    return manager


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    drop=st.sampled_from(["magnitude", "random", any_scores]),
    grow=st.sampled_from(["random", "gradient", any_scores]),
    seed=st.integers(0, 5),
)
def test_budgets_hold_after_updates_by_any_policy(kind: tuple[str, Any], drop: Any, grow: Any, seed: int) -> None:
    pattern, block_shape = kind
    model = make_model(pattern, block_shape, 0.4)
    budgets = {name: counts(site, pattern) for name, site in find_sites(model).items()}

    def check() -> None:
        for name, site in find_sites(model).items():
            assert torch.equal(counts(site, pattern), budgets[name])

    manager = train(model, 4, check, drop=drop, grow=grow, seed=seed, min_age=0)
    assert manager.history[-1].num_dropped > 0
    for values in budgets.values():
        assert int(values.max()) - int(values.min()) <= (1 if pattern == "fan_in" else 0)


@pytest.mark.filterwarnings("ignore")
def test_rows_with_few_salient_blocks_are_ablated() -> None:
    """Rows 3 and 7 are all but zero, and the policy wants nothing to grow there."""

    def elsewhere(site: Site, context: smet.TopologyContext) -> Tensor:
        scores = torch.rand(context.scores_shape, generator=context.generator).view(site.layout.rows, -1)
        if site.name == "0.weight":
            scores[[3, 7]] = -1.0
        return scores.flatten()

    model = make_model("fan_in", 1, 0.5)
    with torch.no_grad():
        dense = model[0].weight.clone()
        dense[[3, 7]] *= 1e-4
        model[0].weight = dense
    site = find_sites(model)["0.weight"]
    num_active = site.num_active

    def check() -> None:
        rows = counts(site, "fan_in")
        alive = rows[rows > 0]
        assert int(rows.sum()) == num_active and int(alive.max()) - int(alive.min()) <= 1

    manager = train(model, 3, check, grow=elsewhere, ablation_threshold=0.3)
    assert (counts(site, "fan_in") == 0).nonzero().flatten().tolist() == [3, 7]
    assert manager.history[0].sites["0.weight"].num_moved <= manager.history[0].sites["0.weight"].num_dropped


def test_ablation_needs_equal_fan_in() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(12, 20)), 0.5)
    optimizer = smet.ActiveAdamW(model)
    with pytest.raises(ValueError, match='ablation_threshold: expected a weight with the pattern "fan_in"'):
        smet.TopologyManager(model, optimizer, total_steps=1000, ablation_threshold=0.3)
    model = make_model("fan_in", 1, 0.5)
    with pytest.raises(ValueError, match="ablation_threshold: expected"):
        smet.TopologyManager(model, smet.ActiveAdamW(model), total_steps=1000, ablation_threshold=1.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pattern", "block_shape"), KINDS, ids=str)
def test_each_group_grows_its_largest_gradients(pattern: str, block_shape: Any) -> None:
    """A row whose gradients are all small grows the best of them all the same."""
    model = make_model(pattern, block_shape, 0.4)
    plain = smet.export_dense(model)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=100, every=1, grow="gradient", schedule="constant", drop="random"
    )
    loss_on(plain, 0).backward()
    loss_on(model, 0).backward()
    optimizer.step()
    before = {name: site.mask() for name, site in manager.sites.items()}
    assert manager.step()
    for name, site in manager.sites.items():
        layout, after = site.layout, site.mask()
        grad = plain.get_parameter(name).grad
        assert grad is not None
        size = layout.block_cols if pattern == "fan_in" else int(pattern[2])
        scores = Grid(layout.shape, layout.block_shape).mean(grad.abs()).masked_fill(before[name], -1.0)
        grown = (after & ~before[name]).view(-1, size)
        for group, chosen in zip(scores.view(-1, size), grown, strict=True):
            num_grown = int(chosen.sum())
            if num_grown == 1:  # of more, only as many are kept as a group loses on average
                assert group[chosen] == group.max()
