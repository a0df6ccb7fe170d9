"""A density stage keeps survivors bit for bit, in new and smaller or larger memory; the rest of the run follows."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.runtime import update as update_module
from tests.runtime.setting import make
from tests.support.dense_twin import DenseTwin, Rule, SgdMomentum, SmetAdamW, TwinSite
from tests.support.living_bytes import living_bytes
from tests.support.masked import dense_weight, fill_masked, grids_of, masks_of
from tests.support.rows import rows_of
from tests.support.small_models import RaggedNet, batch, two_layers
from tests.support.snapshots import same_bits
from tests.support.training import loss_on, train
from tests.support.wrappers import SAM, Lookahead, LookaheadInside, step_in_two

BLOCKS = (1, (1, 4), (4, 4))
DOWN, UP = [(2, 0.5), (4, 0.2)], [(2, 0.5), (4, 1.0)]
DIRECTIONS = {"down": (1.0, DOWN), "up": (0.2, UP)}
OPTIMIZERS = {
    "active": lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5),
    "bf16": lambda model: smet.ActiveAdamW(model, lr=1e-2, moment_dtype=torch.bfloat16),
    "int8": lambda model: smet.ActiveAdamW(model, lr=1e-2, moment_dtype="int8"),
    "lion": lambda model: smet.ActiveLion(model, lr=1e-3),
    "scale": lambda model: smet.ActiveScale(model, lr=1e-2),
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "inside": lambda model: LookaheadInside(smet.ActiveAdamW(model, lr=1e-2), k=1),
    "lookahead": lambda model: Lookahead(smet.ActiveAdamW(model, lr=1e-2), k=2),
}


def staged(density: float, stages: Any, block_shape: Any = 1, **options: Any) -> tuple[Any, Any, Any]:
    model = smet.sparsify(two_layers(), density, block_shape=block_shape, dense_as_compact=True)
    optimizer = options.pop("optimizer", OPTIMIZERS["active"])(model)
    given = {"total_steps": 100, "schedule": "none", "density_schedule": stages, "auto_step": False} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)


def state_of(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Returns values, ages, and each state with a row for every block, by weight."""
    seen = {}
    for name, site in find_sites(model).items():
        rows = {"values": site.values.detach().clone()}
        for key, state in optimizer.state[site.values].items():
            if isinstance(state, Tensor) and state.shape == site.values.shape:
                rows[key] = state.clone()
        if rows.pop("generation", None) is not None:
            inner = getattr(optimizer, "_base_optimizer", optimizer)
            rows["age"] = inner.block_ages(site.values).clone()
        seen[name] = rows
    return seen


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.parametrize("direction", list(DIRECTIONS))
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_survivors_keep_everything_and_newcomers_are_new(name: str, direction: str, block_shape: Any) -> None:
    density, schedule = DIRECTIONS[direction]
    model, optimizer, manager = staged(density, schedule, block_shape, optimizer=OPTIMIZERS[name])
    for stage in range(2):
        train(model, optimizer, manager, first=2 * stage)
        loss_on(model, 2 * stage + 1).backward()
        optimizer.step()
        before, old_masks = state_of(model, optimizer), masks_of(model)
        event = manager.step()
        assert event is not None and (event.step, event.density) == schedule[stage]
        masks = masks_of(model)
        for weight, site in find_sites(model).items():
            assert site.num_active == site.layout.num_active(event.density) == int(masks[weight].sum())
            assert site.values.grad is None
        for weight, rows in state_of(model, optimizer).items():
            assert rows.keys() == before[weight].keys() and (len(rows) > 1 or name == "scale")
            old_mask, mask = old_masks[weight], masks[weight]
            assert not bool((mask & ~old_mask if direction == "down" else old_mask & ~mask).any())
            for key, tensor in rows.items():
                fresh = optimizer.param_groups[0]["lr"] if key == "step_size" else 0
                old = before[weight][key]
                kept = same_bits(tensor[rows_of(mask, mask & old_mask)], old[rows_of(old_mask, mask & old_mask)])
                assert kept, f"{weight} {key}: a survivor changed"
                assert bool((tensor[rows_of(mask, mask & ~old_mask)] == fresh).all()), f"{weight} {key}"
        optimizer.zero_grad()
    assert len(train(model, optimizer, manager, first=4, steps=3)) == 3


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_the_smallest_go_and_newcomers_stay(block_shape: Any) -> None:
    """At step 3 an update grows blocks, which are zero and protected; at step 4 a stage keeps them."""
    model, optimizer, manager = staged(0.6, [(4, 0.4)], block_shape, schedule="constant", every=3, drop_fraction=0.2)
    train(model, optimizer, manager, steps=2)
    before = masks_of(model)
    train(model, optimizer, manager, first=2)
    newcomers = {name: mask & ~before[name] for name, mask in masks_of(model).items()}
    loss_on(model, 3).backward()
    optimizer.step()
    old, grids = masks_of(model), grids_of(model)
    weights = {name: dense_weight(model, name).clone() for name in old}
    manager.step()
    for name, mask in masks_of(model).items():
        assert int(newcomers[name].sum()) > 0 and bool(mask[newcomers[name]].all())
        scores = grids[name].mean(weights[name].abs())
        judged = old[name] & ~newcomers[name]
        assert scores[judged & mask].min() >= scores[judged & ~mask].max()


TWINS: dict[str, tuple[Rule, Any]] = {
    "sgd": (SgdMomentum(0.05, 0.9), lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)),
    "active_adamw": (
        SmetAdamW(2e-3, weight_decay=0.1, warmup_steps=10, exponent=1.0),
        lambda model: smet.ActiveAdamW(model, lr=2e-3, weight_decay=0.1, warmup_steps=10),
    ),
}


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("rule", list(TWINS))
def test_the_run_is_that_of_a_masked_dense_model(rule: str, direction: str, block_shape: tuple[int, int]) -> None:
    """The rate d^(-p) follows the density, the warm-up the ages."""
    density, schedule = (1.0, [(8, 0.6), (16, 0.3)]) if direction == "down" else (0.3, [(8, 0.6), (16, 1.0)])
    model = RaggedNet().double()
    plain = copy.deepcopy(model)
    smet.sparsify(model, density, block_shape=block_shape, dense_as_compact=True)
    fill_masked(plain, model)
    masks, grids = masks_of(model), grids_of(model)
    twin = DenseTwin(plain, {name: TwinSite(grids[name], masks[name]) for name in masks}, TWINS[rule][0])
    optimizer = TWINS[rule][1](model)
    manager = smet.TopologyManager(model, optimizer, total_steps=30, schedule="none", density_schedule=schedule)
    for step in range(25):
        inputs, target = batch(step, 50, 41, torch.float64)
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - twin.step(inputs, target)) <= 1e-10
        if manager.step() is not None:
            for name, mask in masks_of(model).items():
                twin.renew(name, mask, mask & twin.sites[name].mask)
    assert len(manager.history) == 2
    for name, weight in twin.weights.items():
        torch.testing.assert_close(dense_weight(model, name), weight, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["active", "int8", "torch", "lookahead"])
def test_the_memory_of_what_goes_is_freed(name: str) -> None:
    """At density 0.1, 0.9 of the bytes of values and their state are gone."""
    model = smet.sparsify(nn.Linear(400, 300, bias=False), 1.0, dense_as_compact=True)
    optimizer = OPTIMIZERS[name](model)
    manager = smet.TopologyManager(
        model,
        optimizer,
        auto_step=False,
        total_steps=9,
        every=2,
        density_schedule=[(3, 0.1)],
        grow="gradient",
        drop="saliency",
    )
    for step in range(4):
        model(torch.randn(4, 400)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            gc.collect()
            full = living_bytes()
            states = [optimizer.state, optimizer.base.state] if name == "lookahead" else [optimizer.state]
            rows = [t for state in states for e in state.values() for t in e.values() if isinstance(t, Tensor)]
            per_block = 4 + sum(t.element_size() for t in rows if t.numel() == 120_000)
            assert per_block > 4
            del rows, states
        manager.step()
    assert full - living_bytes() >= 0.9 * 120_000 * per_block


def test_a_copy_that_became_the_weight_stays_the_weight() -> None:
    """SAM's state holds the memory of the values, which is replaced in both."""
    model = smet.sparsify(two_layers(), 1.0, dense_as_compact=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=9, schedule="none", density_schedule=[(1, 0.5), (2, 0.2)]
    )
    for step in range(3):
        step_in_two(optimizer, lambda step=step: loss_on(model, step))
        manager.step()
        for site in find_sites(model).values():
            assert optimizer.state[site.values]["old_p"].data_ptr() == site.values.data_ptr()
            assert optimizer.state[site.values]["climb"].shape == site.values.shape
    assert len(manager.history) == 2


def test_a_graph_that_is_still_alive_does_not_disturb_the_next_step() -> None:
    """The loss of the step before holds the node that accumulates gradients of the old shape."""
    model, optimizer, manager = staged(1.0, DOWN)
    for step in range(6):
        loss = loss_on(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert len(manager.history) == 2 and loss.isfinite()


def test_a_weight_read_before_the_stage_cannot_be_written_after_it() -> None:
    model, optimizer, manager = staged(1.0, [(1, 0.5)])
    read = model[0].weight
    train(model, optimizer, manager, steps=1)
    with torch.no_grad():
        read.add_(1)
    with pytest.raises(ValueError, match="after its values had moved on"):
        model(torch.zeros(1, 12))


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


def test_the_history_tells_stages_from_updates() -> None:
    model, optimizer, manager = staged(1.0, [(3, 0.5), (5, 0.7)], schedule="constant", every=3, total_steps=20)
    assert manager.next_update == 3
    train(model, optimizer, manager, steps=7)
    assert [(event.step, event.density) for event in manager.history] == [(3, 0.5), (5, 0.7), (6, None)]
    stage, growth, update = (event.total for event in manager.history)
    assert (stage.num_before, stage.num_active, stage.num_dropped, stage.num_added) == (380, 190, 190, 0)
    assert (growth.num_before, growth.num_active, growth.num_dropped, growth.num_added) == (190, 266, 0, 76)
    assert update.num_before == update.num_active == 266 and update.num_added == update.num_dropped > 0
    assert update.num_grown == 76, "the growth of a stage counts as that of an update"
    assert manager.next_update == 9


def test_steps_between_two_calls_go_to_the_last_stage() -> None:
    model, optimizer, manager = staged(1.0, DOWN)
    train(model, optimizer, steps=5)
    event = manager.step()
    assert event is not None and (event.step, event.density) == (5, 0.2) and manager.next_update is None
    assert smet.report(model).density == pytest.approx(0.2, abs=0.01)


def test_an_error_of_a_policy_leaves_the_model_as_it_was() -> None:
    def broken(site: Any, context: Any) -> Tensor:
        return torch.zeros(3)

    model, optimizer, manager = staged(1.0, DOWN, drop=broken)
    train(model, optimizer, manager, steps=1)
    loss_on(model, 1).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"scores of shape"):
        manager.step()
    assert [site.density for site in find_sites(model).values()] == [1.0, 1.0] and manager.num_steps == 1


def test_a_stage_that_is_interrupted_goes_on_at_the_next_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, optimizer, manager = staged(1.0, [(1, 0.5)])
    make_move, calls = update_module.make_move, iter(range(9))

    def breaking(*arguments: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        make_move(*arguments)

    monkeypatch.setattr(update_module, "make_move", breaking)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, manager, steps=1)
    assert [site.density for site in find_sites(model).values()] == [0.5, 1.0]
    monkeypatch.undo()
    train(model, optimizer, manager, first=1)
    assert [site.density for site in find_sites(model).values()] == [0.5, 0.5]
    assert [(event.step, list(event.sites)) for event in manager.history] == [(1, ["0.weight"]), (2, ["3.weight"])]
    smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    smet.load_checkpoint(tmp_path / "a", *staged(1.0, [(1, 0.5)]))


def test_without_a_schedule_nothing_is_resized() -> None:
    model, optimizer, manager = make(density=0.5, every=2)
    train(model, optimizer, manager, steps=5)
    assert all(event.density is None and event.total.num_before == event.num_active for event in manager.history)
