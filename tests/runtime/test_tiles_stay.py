"""Tiles keep their topology unless a schedule is asked for; single weights and runs move by default."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import loss_on, train

TILES = [(4, 4), (2, 3)]
SINGLE, TILED = "0.weight", "3.weight"
MIXED = "cosine, tiles stay"
Run = tuple[nn.Module, smet.ActiveAdamW, smet.TopologyManager]


def stay(num_tiles: int, num_weights: int) -> Any:
    """Expects the warning that tiles stay where they are, which names both ways out."""
    text = rf"TopologyManager: {num_tiles} of {num_weights} compact weights consist of tiles, which stay where they are"
    return pytest.warns(UserWarning, match=text + r'.*schedule="cosine".*schedule="none"')


def tiled(block_shape: tuple[int, int] = (4, 4), density: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(two_layers(), density, block_shape=block_shape)


def mixed() -> nn.Module:
    """Returns a model whose first layer has single weights and whose last has tiles."""
    torch.manual_seed(0)
    model = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # each call sees the weights of the other left dense
        smet.sparsify(model, 0.5, include=SINGLE)
        smet.sparsify(model, 0.5, include=TILED, block_shape=(2, 3))
    return model


def managed(model: nn.Module, **options: Any) -> Run:
    """Returns a run whose manager has the default schedule unless ``options`` hold one, and would soon move."""
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3)
    given = {"total_steps": 100, "every": 1, "drop_fraction": 0.3, "auto_step": False} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)


def silently(model: nn.Module, **options: Any) -> Run:
    """Does the same, and fails where the manager warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return managed(model, **options)


def mixed_run(**options: Any) -> Run:
    if "schedule" in options:
        return silently(mixed(), every=2, **options)
    with stay(1, 2):
        return managed(mixed(), every=2, **options)


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: site.mask() for name, site in find_sites(model).items()}


def steps_of_moves(run: Run, steps: int) -> dict[str, list[int]]:
    """Trains, and returns the steps after which the active blocks of each weight were others than before."""
    model, optimizer, manager = run
    found: dict[str, list[int]] = {name: [] for name in manager.sites}
    for step in range(steps):
        before = masks(model)
        train(model, optimizer, manager, first=step)
        for name, mask in masks(model).items():
            if not torch.equal(mask, before[name]):
                found[name].append(step + 1)
    return found


@pytest.mark.parametrize("grow", ["random", "gradient", "momentum"])
@pytest.mark.parametrize("block_shape", TILES, ids=str)
def test_tiles_stay_by_default(block_shape: tuple[int, int], grow: Any) -> None:
    twin = tiled(block_shape)
    twin_optimizer = smet.ActiveAdamW(twin, lr=1e-2, warmup_steps=3)
    with stay(2, 2):
        model, optimizer, manager = managed(tiled(block_shape), grow=grow, drop="saliency")
    assert manager.next_update is None and manager.settings["schedule"] == "none"
    before = masks(model)
    for step in range(6):
        loss_on(model, step).backward()
        assert [site.compact.collected for site in manager.sites.values()] == [None, None]
        optimizer.step()
        optimizer.zero_grad()
        assert manager.step() is None
    assert manager.num_steps == 6 and manager.history == [] and manager.next_update is None
    assert_same(masks(model), before)
    train(twin, twin_optimizer, steps=6)
    assert_same(snapshot(model, optimizer), snapshot(twin, twin_optimizer))


def test_the_warning_points_at_the_call() -> None:
    model = tiled()
    optimizer = smet.ActiveAdamW(model)
    with stay(2, 2) as caught:
        smet.TopologyManager(model, optimizer, total_steps=100)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", lambda step: 0.3])
@pytest.mark.parametrize("block_shape", TILES, ids=str)
def test_a_schedule_moves_them(block_shape: tuple[int, int], schedule: Any) -> None:
    run = silently(tiled(block_shape), schedule=schedule, every=2)
    assert run[2].next_update == 2
    assert steps_of_moves(run, 7) == {SINGLE: [2, 4, 6], TILED: [2, 4, 6]}
    assert [list(event.sites) for event in run[2].history] == [[SINGLE, TILED]] * 3


@pytest.mark.parametrize("model", [tiled, mixed])
def test_none_keeps_everything_without_a_word(model: Any) -> None:
    run = silently(model(), schedule="none")
    assert run[2].next_update is None and run[2].settings["schedule"] == "none"
    assert steps_of_moves(run, 4) == {SINGLE: [], TILED: []}
    assert run[2].history == []


@pytest.mark.parametrize("block_shape", [1, (1, 4), (4, 1)], ids=str)
def test_single_weights_and_runs_move_by_cosine(block_shape: Any) -> None:
    runs = []
    for options in ({}, {"schedule": "cosine"}):
        torch.manual_seed(0)
        runs.append(silently(smet.sparsify(two_layers(), 0.5, block_shape=block_shape), every=2, **options))
        assert steps_of_moves(runs[-1], 5) == {SINGLE: [2, 4], TILED: [2, 4]}
    assert runs[0][2].settings == runs[1][2].settings and runs[0][2].settings["schedule"] == "cosine"
    assert_same(snapshot(*runs[0]), snapshot(*runs[1]))


def test_a_dense_model_has_no_tiles_to_warn_of() -> None:
    *_, manager = silently(smet.sparsify(two_layers(), 1.0, block_shape=4))
    assert manager.next_update is None and manager.sites == {}


def test_only_single_weights_move_beside_tiles() -> None:
    run, all_moving = mixed_run(), mixed_run(schedule="cosine")
    assert run[2].settings["schedule"] == MIXED and run[2].next_update == 2
    assert steps_of_moves(run, 2) == {SINGLE: [2], TILED: []}
    assert steps_of_moves(all_moving, 2) == {SINGLE: [2], TILED: [2]}
    (event,), (other,) = run[2].history, all_moving[2].history
    assert list(event.sites) == [SINGLE] and event.sites[SINGLE] == other.sites[SINGLE]
    assert event.drop_fraction == other.drop_fraction and event.sites[SINGLE].num_dropped == 35
    assert torch.equal(masks(run[0])[SINGLE], masks(all_moving[0])[SINGLE])
    assert steps_of_moves(run, 7) == {SINGLE: [2, 4, 6], TILED: []}


def test_gradients_are_collected_for_what_moves() -> None:
    model, optimizer, manager = mixed_run(grow="gradient")
    for step in range(6):
        loss_on(model, step).backward()
        collected = {name: site.compact.collected is not None for name, site in manager.sites.items()}
        assert collected == {SINGLE: step % 2 == 1, TILED: False}
        optimizer.step()
        optimizer.zero_grad()
        event = manager.step()
        assert (event is not None) == (step % 2 == 1)
        assert event is None or list(event.sites) == [SINGLE]


def test_an_update_does_not_wait_for_tiles_without_a_gradient() -> None:
    model, optimizer, manager = mixed_run()
    manager.sites[TILED].values.requires_grad_(False)
    assert steps_of_moves((model, optimizer, manager), 4) == {SINGLE: [2, 4], TILED: []}


def test_tiles_may_be_too_dense_to_move() -> None:
    with stay(2, 2):
        managed(tiled(density=0.9))
    with pytest.raises(ValueError, match=r"a drop fraction of 0.3 needs . inactive blocks"):
        managed(tiled(density=0.9), schedule="cosine")


@pytest.mark.filterwarnings("ignore:TopologyManager. . of 2 compact weights consist of tiles")
@pytest.mark.parametrize(("way", "grow"), [("checkpoint", "momentum"), ("deepcopy", "gradient")])
def test_a_copy_goes_on_as_the_mixed_run(way: str, grow: Any, tmp_path: Path) -> None:
    run = mixed_run(grow=grow)
    train(*run, steps=5)
    if way == "checkpoint":
        other = mixed_run(grow=grow)
        smet.save_checkpoint(tmp_path / "a", *run)
        smet.load_checkpoint(tmp_path / "a", *other)
    else:
        other = copy.deepcopy(run)
    assert other[2].state_dict()["settings"]["schedule"] == MIXED
    for each in (run, other):
        train(*each, first=5, steps=5)
    assert_same(snapshot(*other), snapshot(*run))
    assert [event.step for event in other[2].history] == [2, 4, 6, 8, 10]
    assert all(list(event.sites) == [SINGLE] for event in other[2].history)


@pytest.mark.parametrize(("schedule", "name"), [({"schedule": "cosine"}, "cosine"), ({"schedule": "none"}, "none")])
def test_a_state_of_another_schedule_is_refused(schedule: dict[str, Any], name: str) -> None:
    run, other = mixed_run(), mixed_run(**schedule)
    train(*run, steps=3)
    train(*other, steps=3)
    for ours, theirs, names in ((other, run, (name, MIXED)), (run, other, (MIXED, name))):
        state = theirs[2].state_dict()
        message = f"schedule: expected '{names[0]}' as in this manager, got '{names[1]}' in the saved run"
        for call in (ours[2].check_state_dict, ours[2].load_state_dict):
            with Unchanged(*ours), pytest.raises(ValueError, match=message):
                call(state)
        ours[2].check_state_dict(state, override=("schedule",))
    with pytest.raises(ValueError, match=f"schedule: expected .* got '{MIXED}'; .*leave it out: tiles then stay"):
        mixed_run(schedule=MIXED)


@pytest.mark.parametrize("grow", ["random", "momentum"])
def test_a_run_whose_tiles_moved_goes_on_without_moves(grow: Any) -> None:
    """Neither what was collected for its next update nor an update that had to wait is carried on."""
    model, optimizer, moving = silently(tiled(), schedule="cosine", every=3, grow=grow)
    train(model, optimizer, moving, steps=5)
    state = copy.deepcopy(moving.state_dict()) | {"num_postponed": 2}
    assert set(state["collected"]) == (set(moving.sites) if grow == "momentum" else set())
    del moving
    with stay(2, 2):
        manager = smet.TopologyManager(model, optimizer, total_steps=100, every=3, drop_fraction=0.3, grow=grow)
    with pytest.raises(ValueError, match="schedule: expected 'none' as in this manager, got 'cosine' in the saved run"):
        manager.load_state_dict(state)
    manager.load_state_dict(state, override=("schedule",))
    assert manager.next_update is None and manager.num_steps == 5
    assert steps_of_moves((model, optimizer, manager), 4) == {SINGLE: [], TILED: []}
    assert [event.step for event in manager.history] == [3]


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("block_shape", TILES, ids=str)
def test_tiles_enter_density_stages_and_rest_between(block_shape: tuple[int, int], grow: Any) -> None:
    stages = [(3, 0.4), (6, 0.8)]
    options = {"density_schedule": stages, "grow": grow}
    with stay(2, 2):
        run = managed(tiled(block_shape), **options)
    assert run[2].next_update == 3
    assert steps_of_moves(run, 9) == {SINGLE: [3, 6], TILED: [3, 6]}
    assert [(event.step, event.density) for event in run[2].history] == stages
    assert run[2].next_update is None
    for site in run[2].sites.values():
        assert abs(site.num_active - 0.8 * site.layout.num_blocks) < 1
    static = silently(tiled(block_shape), schedule="none", **options)
    train(*static, steps=9)
    assert_same(snapshot(*run), snapshot(*static))


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_stages_resize_tiles_beside_single_weights_that_move(grow: Any) -> None:
    run = mixed_run(density_schedule=[(3, 0.3), (6, 0.6)], grow=grow)
    assert steps_of_moves(run, 9) == {SINGLE: [2, 3, 4, 6, 8], TILED: [3, 6]}
    assert [event.density for event in run[2].history] == [None, 0.3, None, 0.6, None]
    assert [list(event.sites) for event in run[2].history if event.density is None] == [[SINGLE]] * 3
