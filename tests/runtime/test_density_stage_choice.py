"""A density stage drops and grows the blocks that its policies choose, of all weights and rows alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.runtime.stages import BLOCKS, DIRECTIONS, staged
from tests.support.masked import fill_masked, grids_of, masks_of
from tests.support.small_models import two_layers
from tests.support.snapshots import same_bits
from tests.support.training import loss_on, train


@pytest.mark.parametrize("direction", list(DIRECTIONS))
@pytest.mark.parametrize(
    "policies",
    [
        {"drop": "saliency", "grow": "gradient"},
        {"drop": "momentum", "grow": "momentum"},
        {"window": 3, "grow": "gradient"},
    ],
    ids=str,
)
def test_any_policy_chooses(policies: dict[str, Any], direction: str) -> None:
    density, schedule = DIRECTIONS[direction]
    model, optimizer, manager = staged(density, schedule, (1, 4), schedule="cosine", every=3, **policies)
    train(model, optimizer, manager, steps=10)
    assert [event.step for event in manager.history] == [2, 3, 4, 6, 9]
    assert [event.density is None for event in manager.history] == [False, True, False, True, True]


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_growth_by_gradient_takes_the_largest(block_shape: Any) -> None:
    model, optimizer, manager = staged(0.2, [(1, 0.7)], block_shape, grow="gradient")
    plain = fill_masked(two_layers(), model)
    loss_on(plain, 0).backward()
    before, grids = masks_of(model), grids_of(model)
    train(model, optimizer, manager, steps=1)
    for name, mask in masks_of(model).items():
        scores = grids[name].mean(plain.get_parameter(name).grad.abs())
        assert scores[mask & ~before[name]].min() >= scores[~mask].max() - 1e-7


def assert_grows_the_largest(run: tuple[Any, Any, Any], step: int) -> None:
    """Makes the step, in which a stage grows blocks; checks them against the gradient of the dense model."""
    model, optimizer, manager = run
    plain = fill_masked(two_layers(), model)
    loss_on(plain, step).backward()
    before, grids = masks_of(model), grids_of(model)
    train(model, optimizer, manager, first=step)
    assert manager.history[-1].step == step + 1 and manager.history[-1].density == 0.6
    for name, mask in masks_of(model).items():
        scores = grids[name].mean(plain.get_parameter(name).grad.abs())
        assert scores[mask & ~before[name]].min() >= scores[~mask].max() - 1e-7


@pytest.mark.parametrize("stages", [[(3, 0.6)], [(2, 0.3), (3, 0.6)], [(3, 0.3), (6, 0.6)]], ids=str)
def test_an_overdue_stage_grows_by_gradient_too(stages: Any, tmp_path: Path) -> None:
    """A schedule that replaces the saved one has a stage that should be over, or two that come in one step."""
    saved = staged(0.2, [(60, 0.6)], grow="gradient")
    train(*saved, steps=5)
    smet.save_checkpoint(tmp_path / "run", *saved)
    run = staged(0.2, stages, grow="gradient")
    smet.load_checkpoint(tmp_path / "run", *run, override=("density_schedule",))
    assert_grows_the_largest(run, 5)


def test_blocks_of_one_score_change_at_random() -> None:
    """A stage that broke ties by position would fill the last rows, and empty the first."""

    def equal(site: Any, context: Any) -> Tensor:
        return torch.zeros(context.scores_shape)

    for density, stages in DIRECTIONS.values():
        model, optimizer, manager = staged(density, [stages[0]], drop=equal, grow=equal)
        before = masks_of(model)["0.weight"]
        train(model, optimizer, manager, steps=2)
        changed = (masks_of(model)["0.weight"] ^ before).view(20, 12).sum(1)
        assert changed.sum() in (72, 120) and bool((changed > 0).all()) and bool((changed < 12).all())
        again = staged(density, [stages[0]], drop=equal, grow=equal)
        train(*again, steps=2)
        assert same_bits(masks_of(again[0])["0.weight"], masks_of(model)["0.weight"])


def test_a_weight_without_a_gradient_follows_too() -> None:
    model, optimizer, manager = staged(0.2, [(2, 0.5)], grow="gradient", drop="momentum")
    find_sites(model)["3.weight"].values.requires_grad_(False)
    train(model, optimizer, manager, steps=2)
    assert [site.density for site in find_sites(model).values()] == [0.5, 0.5]


def test_fan_in_stays_even() -> None:
    for density, schedule in ((1.0, [(1, 0.55), (2, 0.3)]), (0.2, [(1, 0.45), (2, 0.8)])):
        for grow in ("random", "gradient"):
            model = smet.sparsify(two_layers(), density, pattern="fan_in", dense_as_compact=True)
            optimizer = smet.ActiveAdamW(model)
            manager = smet.TopologyManager(
                model, optimizer, total_steps=9, every=3, grow=grow, density_schedule=schedule
            )
            for step in range(6):
                train(model, optimizer, manager, first=step)
                for site in find_sites(model).values():
                    rows = site.mask().view(site.layout.block_rows, -1).sum(1)
                    assert int(rows.max() - rows.min()) <= 1
            assert len(manager.history) == 4


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_rows_without_blocks_come_back_only_where_the_others_are_full(grow: str) -> None:
    mask = torch.zeros(20, 12, dtype=torch.bool)
    mask[:10, :6] = True
    model = smet.sparsify(two_layers(), masks={"0.weight": mask}, pattern="fan_in")
    optimizer = smet.ActiveAdamW(model)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=9, schedule="none", grow=grow, density_schedule=[(1, 0.4), (2, 0.7)]
    )
    train(model, optimizer, manager, steps=1)
    rows = find_sites(model)["0.weight"].mask().view(20, 12).sum(1)
    assert set(rows[:10].tolist()) <= {9, 10} and not bool(rows[10:].any())
    train(model, optimizer, manager, first=1)
    rows = find_sites(model)["0.weight"].mask().view(20, 12).sum(1)
    assert set(rows.tolist()) == {8, 9} and int(rows.sum()) == 168


def test_weights_of_different_densities_keep_their_shares() -> None:
    model = smet.sparsify(two_layers(), 0.4, rules={"0.weight": 0.2})
    first = {name: site.num_active for name, site in find_sites(model).items()}
    total, blocks = sum(first.values()), sum(site.layout.num_blocks for site in find_sites(model).values())
    optimizer = smet.ActiveAdamW(model)
    schedule = [(1, 0.12), (2, 0.6)]
    manager = smet.TopologyManager(model, optimizer, total_steps=9, schedule="none", density_schedule=schedule)
    for step, (_, density) in enumerate(schedule):
        train(model, optimizer, manager, first=step)
        counts = {name: site.num_active for name, site in find_sites(model).items()}
        assert sum(counts.values()) == round(density * blocks)
        for name, count in counts.items():
            assert abs(count - density * blocks * first[name] / total) <= 1
