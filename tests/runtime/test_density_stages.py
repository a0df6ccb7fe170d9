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
from tests.runtime.stages import BLOCKS, DIRECTIONS, DOWN, OPTIMIZERS, staged
from tests.support.dense_twin import DenseTwin, Rule, SgdMomentum, SmetAdamW, TwinSite
from tests.support.living_bytes import living_bytes
from tests.support.masked import dense_weight, fill_masked, grids_of, masks_of
from tests.support.rows import rows_of
from tests.support.small_models import RaggedNet, batch, two_layers
from tests.support.snapshots import same_bits
from tests.support.training import loss_on, train
from tests.support.wrappers import SAM, step_in_two


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
