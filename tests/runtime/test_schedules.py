"""Updates come when the schedule says so, and are as large as it says."""

import itertools
from typing import Any

import pytest
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.runtime.setting import make
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train


def events_of(steps: int, **options) -> list[smet.TopologyEvent]:
    model, optimizer, manager = make(total_steps=steps, **options)
    train(model, optimizer, manager, steps=steps)
    assert manager.num_steps == steps
    return manager.history


def test_updates_come_every_n_steps_and_stop_in_the_last_quarter() -> None:
    assert [e.step for e in events_of(100, every=10)] == [10, 20, 30, 40, 50, 60, 70]


def test_the_stop_itself_is_no_update() -> None:
    """As in RigL: t < T_end."""
    assert [e.step for e in events_of(100, every=25)] == [25, 50]


def test_stop_fraction() -> None:
    assert [e.step for e in events_of(100, every=10, stop_fraction=0.35)] == [10, 20, 30]


def test_cosine_goes_from_the_first_fraction_to_the_last() -> None:
    fractions = [e.drop_fraction for e in events_of(200, every=1, drop_fraction=0.2, final_drop_fraction=0.005)]
    assert all(a > b for a, b in itertools.pairwise(fractions))
    assert 0.199 < fractions[0] <= 0.2
    assert 0.005 <= fractions[-1] < 0.006
    middle = len(fractions) // 2
    assert fractions[middle] == pytest.approx(0.1025, abs=0.003)
    assert fractions[len(fractions) // 4] == pytest.approx(0.1025 + 0.0975 * 0.5**0.5, abs=0.003)


def test_linear() -> None:
    fractions = [
        e.drop_fraction for e in events_of(200, every=1, drop_fraction=0.2, final_drop_fraction=0.1, schedule="linear")
    ]
    differences = [b - a for a, b in itertools.pairwise(fractions)]
    assert max(differences) - min(differences) < 1e-12 and max(differences) < 0
    assert fractions[0] == pytest.approx(0.2, abs=1e-3) and fractions[-1] == pytest.approx(0.1, abs=1e-3)


def test_constant() -> None:
    assert {e.drop_fraction for e in events_of(100, every=5, drop_fraction=0.15, schedule="constant")} == {0.15}


def test_none_is_static_sparsity() -> None:
    model, optimizer, manager = make(schedule="none", every=2, total_steps=40)
    topologies = {k: v.clone() for k, v in model.state_dict().items() if "topology" in k}
    assert manager.next_update is None
    train(model, optimizer, manager, steps=20)
    assert manager.history == [] and manager.next_update is None
    assert_same({k: v for k, v in model.state_dict().items() if "topology" in k}, topologies)


def test_next_update() -> None:
    model, optimizer, manager = make(every=3, total_steps=10)
    seen = []
    for step in range(10):
        seen.append(manager.next_update)
        train(model, optimizer, manager, first=step)
    assert seen == [3, 3, 3, 6, 6, 6, None, None, None, None]


def test_step_returns_the_event_it_recorded() -> None:
    model, optimizer, manager = make(every=2)
    train(model, optimizer, steps=1)
    assert manager.step() is None
    train(model, optimizer, steps=1)
    event = manager.step()
    assert isinstance(event, smet.TopologyEvent) and manager.history == [event] and event.step == 2


def test_parts_of_a_block_are_carried_over() -> None:
    model, optimizer, manager = make(drop_fraction=0.17, every=4, total_steps=200)
    train(model, optimizer, manager, steps=150)
    asked = dict.fromkeys(("0.weight", "3.weight"), 0.0)
    dropped = dict.fromkeys(asked, 0)
    for event in manager.history:
        for name, num_active in (("0.weight", 120), ("3.weight", 70)):
            site = event.sites[name]
            assert site.num_active == num_active
            asked[name] += event.drop_fraction * num_active
            dropped[name] += site.num_dropped
            assert dropped[name] == int(asked[name])


def test_a_weight_too_small_for_one_block_an_update_moves_now_and_then() -> None:
    with pytest.warns(UserWarning, match=r"3\.weight \(5 active blocks\).*less than one block an update"):
        model, optimizer, manager = make(block_shape=4, drop_fraction=0.1, schedule="constant")
    train(model, optimizer, manager, steps=36)
    assert [event.sites["3.weight"].num_dropped for event in manager.history] == [0, 1] * 6


def test_a_schedule_of_ones_own() -> None:
    asked = []

    def halves(step: int) -> float:
        asked.append(step)
        return 0.2 if step < 50 else 0.1

    assert [e.drop_fraction for e in events_of(100, every=20, schedule=halves)] == [0.2, 0.2, 0.1]
    assert set(asked) == {20, 40, 60}
    with pytest.raises(ValueError, match=r"schedule\(3\): expected a number in \[0, 1\), got 1.5"):
        make(schedule=lambda step: 1.5)


@pytest.mark.parametrize("options", [{"every": 100}, {"every": 75}, {"every": 20, "stop_fraction": 0.2}], ids=str)
def test_no_update_that_fits_brings_a_warning(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=rf"no topology update fits.*due after step {options['every']}"):
        make(total_steps=100, **options)


def test_an_empty_drop_set_is_a_no_op() -> None:
    model, optimizer, manager = make(density=0.05, drop_fraction=0.05, every=1)
    train(model, optimizer, steps=1)
    before = everything(model, optimizer)
    event = manager.step()
    assert event is None or event.num_dropped == 0
    assert_same(everything(model, optimizer), before)


def everything(model: nn.Module, optimizer: smet.ActiveAdamW) -> list[Any]:
    """Weights, topology, moments and ages; not how the ages are stored."""
    seen = snapshot(model)
    for site in find_sites(model).values():
        state = optimizer.state[site.values]
        seen += [
            state["exp_avg"].clone(),
            state["exp_avg_sq"].clone(),
            optimizer.block_ages(site.values).clone(),
        ]
    return seen
