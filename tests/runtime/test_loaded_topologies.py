"""Weights that are loaded in the middle of a run, alone or with the optimizer's state, in either order."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.format import unpack_bits
from smet_compile.ops import find_sites
from tests.runtime.setting import make
from tests.support.kept_state import kept
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on, train
from tests.support.wrappers import Lookahead

Run = tuple[Any, Any, Any]


def active(**options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5, **options)


def of_torch(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


OPTIMIZERS = {"active": active(), "int8": active(moment_dtype="int8"), "torch": of_torch}


def assert_stays_with_its_weights(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> None:
    for name, states in before.items():
        for key, old in states.items():
            new = after[name][key]
            was, is_now = (~each.isnan().view(len(each), -1).any(1) for each in (old, new))
            assert (was & ~is_now).any() and (is_now & ~was).any(), "the topology has to move for this test"
            assert torch.equal(new[was & is_now], old[was & is_now]), f"{name}: {key}"
            assert not new[is_now & ~was].any(), f"{name}: {key}"


def in_memory(best: Run, _: Path) -> Callable[[nn.Module], None]:
    state = copy.deepcopy(best[0].state_dict())
    return lambda model: model.load_state_dict(state) and None


def in_file(best: Run, folder: Path) -> Callable[[nn.Module], None]:
    smet.save_checkpoint(folder / "best", *best)
    return lambda model: smet.load_checkpoint(folder / "best", model)


@pytest.mark.parametrize("block_shape", [1, (2, 2)], ids=str)
@pytest.mark.parametrize("auto_step", [True, False])
@pytest.mark.parametrize("way", [in_memory, in_file])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_stays_with_its_weights(
    kind: str, way: Callable[..., Any], auto_step: bool, block_shape: Any, tmp_path: Path
) -> None:
    run = make(optimizer=OPTIMIZERS[kind], block_shape=block_shape, auto_step=auto_step)
    train(*run, steps=4)
    load, best = way(run, tmp_path), snapshot(run[0])
    train(*run, first=4, steps=12)
    before, addresses = kept(run), [site.values.data_ptr() for site in find_sites(run[0]).values()]
    load(run[0])
    assert_same(snapshot(run[0]), best)
    assert_stays_with_its_weights(before, kept(run))
    assert addresses == [site.values.data_ptr() for site in find_sites(run[0]).values()]
    load(run[0])  # once more: nothing moves
    assert_same(snapshot(run[0]), best)
    assert_stays_with_its_weights(before, kept(run))
    train(*run, first=16, steps=7)
    assert len(run[2].history) == 23 // 3


def test_state_follows_twice_without_a_step_between() -> None:
    run = make()
    train(*run, steps=4)
    first = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=12)
    second = copy.deepcopy(run[0].state_dict())
    before = kept(run)
    run[0].load_state_dict(first)
    run[0].load_state_dict(second)
    after = kept(run)
    for name, states in before.items():
        for key, old in states.items():
            was_active_throughout = ~torch.isnan(old) & unpack_bits(
                first[f"{name.split('.')[0]}.parametrizations.weight.0.topology"], len(old)
            )
            assert torch.equal(after[name][key][was_active_throughout], old[was_active_throughout])


@pytest.mark.parametrize("kind", ["active", "int8"])
def test_an_active_optimizer_needs_no_manager(kind: str) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    run = model, OPTIMIZERS[kind](model), None
    train(*run, steps=5)
    before = kept(run)
    model.load_state_dict(smet.sparsify(two_layers(), density=0.5, seed=3).state_dict())
    assert_stays_with_its_weights(before, kept(run))
    train(*run, first=5, steps=2)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_slow_weights_stay_with_their_weights(kind: str) -> None:
    run = make(optimizer=lambda model: Lookahead(OPTIMIZERS[kind](model)))
    train(*run, steps=4)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=12)
    site = find_sites(run[0])["0.weight"]
    state, mask, before = run[1].state[site.values], site.mask(), torch.zeros(site.layout.num_blocks)
    before[mask] = state["slow"]
    run[0].load_state_dict(best)
    assert torch.equal(state["slow"], torch.where(mask, before, 0)[site.mask()])
    assert not torch.equal(mask, site.mask())
    train(*run, first=16, steps=4)


def test_gradients_stay_with_their_weights() -> None:
    run = make()
    train(*run, steps=4)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=12)
    loss_on(run[0], 16).backward()
    sites = find_sites(run[0])
    masks, before = (
        {n: s.mask() for n, s in sites.items()},
        {n: torch.zeros(s.layout.num_blocks) for n, s in sites.items()},
    )
    for name, site in sites.items():
        before[name][masks[name]] = site.values.grad
    run[0].load_state_dict(best)
    for name, site in sites.items():
        expected = torch.where(masks[name], before[name], 0)[site.mask()]
        assert torch.equal(site.values.grad, expected) and not torch.equal(site.mask(), masks[name])


def model_first(run: Run, states: dict[str, Any]) -> None:
    run[0].load_state_dict(states["model"])
    run[1].load_state_dict(states["optimizer"])


def optimizer_first(run: Run, states: dict[str, Any]) -> None:
    run[1].load_state_dict(states["optimizer"])
    run[0].load_state_dict(states["model"])


def manager_first(run: Run, states: dict[str, Any]) -> None:
    run[2].load_state_dict(states["manager"])
    optimizer_first(run, states)


@pytest.mark.parametrize("steps_since", [0, 12], ids=["fresh", "in the run"])
@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("order", [model_first, optimizer_first, manager_first])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_full_resume_is_exact_in_any_order(
    kind: str, order: Callable[..., None], grow: str, steps_since: int
) -> None:
    options = {"optimizer": OPTIMIZERS[kind], "grow": grow, "auto_step": True}
    run = make(**options)
    train(*run, steps=7)
    names = ("model", "optimizer", "manager")
    states = {name: copy.deepcopy(part.state_dict()) for name, part in zip(names, run, strict=True)}
    expected = train(*run, first=7, steps=8)
    other = make(**options)
    train(*other, first=50, steps=steps_since)
    for _ in range(2):  # also where the first resume made no step
        order(other, states)
    assert train(*other, first=7, steps=8) == expected
    assert_same(snapshot(*other), snapshot(*run))


def test_loading_a_file_whole_and_weights_right_after_it(tmp_path: Path) -> None:
    run = make()
    train(*run, steps=4)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=12)
    smet.save_checkpoint(tmp_path / "last", *run)
    other = make()
    smet.load_checkpoint(tmp_path / "last", *other)
    before = kept(other)
    other[0].load_state_dict(best)
    assert_stays_with_its_weights(before, kept(other))


def test_where_it_is_not_known_whose_state_was_loaded_a_warning_says_so() -> None:
    run = make()
    train(*run, steps=4)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=12)
    model, optimizer, _ = make()
    model_first((model, optimizer, None), {"model": run[0].state_dict(), "optimizer": run[1].state_dict()})
    with pytest.warns(UserWarning, match=r"0.weight: two topologies were loaded, and the optimizer's state in between"):
        model.load_state_dict(best)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_state_that_cannot_follow_is_refused_at_the_next_step(is_loaded: bool) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = of_torch(model)
    train(model, optimizer, steps=3)
    states = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(model.state_dict())
    train(model, optimizer, first=3)
    other = smet.sparsify(two_layers(), density=0.5, seed=3)
    model.load_state_dict(other.state_dict())
    if is_loaded:
        optimizer.load_state_dict(states)
        train(model, optimizer, first=4, steps=2)
        return
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"0.weight: expected state of AdamW for the blocks that are active, got that"):
        train(model, optimizer, first=4)
    assert_same(snapshot(model, optimizer), before)


def test_an_optimizer_without_state_for_each_weight_goes_on() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(model, optimizer, steps=3)
    model.load_state_dict(smet.sparsify(two_layers(), density=0.5, seed=3).state_dict())
    train(model, optimizer, first=3, steps=2)


def test_bits_that_were_written_in_place_before_the_load() -> None:
    run = make()
    train(*run, steps=5)
    other = smet.sparsify(two_layers(), density=0.5, seed=3).state_dict()
    own = run[0].state_dict()
    for name, tensor in other.items():  # as torch.distributed.checkpoint does
        own[name].copy_(tensor)
    run[0].load_state_dict(own)
    with pytest.raises(ValueError, match=r"0.weight: expected state of ActiveAdamW for the blocks that are active"):
        train(*run, first=5)
    run[1].load_state_dict(run[1].state_dict())
    train(*run, first=5)


class Breaks(nn.Module):
    """Fails to load, after the modules before it were loaded."""

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        raise KeyError("late")


def test_a_load_that_is_taken_back_moves_no_state(tmp_path: Path) -> None:
    run = make()
    train(*run, steps=4)
    smet.save_checkpoint(tmp_path / "best", *run)
    train(*run, first=4, steps=12)
    before = snapshot(*run)
    run[0].add_module("last", Breaks())
    with pytest.raises(ValueError, match="everything is as it was before"):
        smet.load_checkpoint(tmp_path / "best", run[0])
    assert_same(snapshot(*run), before)
    with pytest.raises(ValueError, match="everything is as it was before"):
        smet.load_checkpoint(tmp_path / "best", *run)
    del run[0].last
    state_before = kept(run)
    smet.load_checkpoint(tmp_path / "best", run[0])
    assert_stays_with_its_weights(state_before, kept(run))


def test_the_manager_records_what_was_loaded() -> None:
    run = make(min_age=3)
    train(*run, steps=4)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=12)
    before = run[2].state_dict()["trace"]
    run[0].load_state_dict(best)
    saved = run[2].state_dict()
    run[2].check_state_dict(saved)
    for name, site in find_sites(run[0]).items():
        bits, trace = site.compact.topology, saved["trace"]
        assert torch.equal(trace["initial"][name], before["initial"][name])
        assert torch.equal(trace["explored"][name] & bits, bits)
        assert not any((grown & ~bits).any() for _, grown in trace["grown"][name])
        assert all((grown & ~bits).any() for _, grown in before["grown"][name][-1:])
    train(*run, first=16, steps=2)
    site_event = run[2].history[-1].sites["0.weight"]
    assert site_event.num_surviving == site_event.num_grown - site_event.num_newcomers_dropped


def test_weights_that_are_loaded_before_the_first_step_are_the_start() -> None:
    run = make()
    run[0].load_state_dict(smet.sparsify(two_layers(), density=0.5, seed=3).state_dict())
    start = {name: site.compact.topology.clone() for name, site in find_sites(run[0]).items()}
    train(*run, steps=3)
    for name, event in run[2].history[0].sites.items():
        assert event.num_moved == event.num_dropped
        assert torch.equal(run[2].state_dict()["trace"]["initial"][name], start[name])
