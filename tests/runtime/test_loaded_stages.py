"""Weights of another density stage that are loaded in the middle of a run, without the optimizer's state."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.runtime import checkpoint_file
from tests.support.kept_state import kept
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import train
from tests.support.wrappers import Lookahead

STAGES = [(5, 0.4), (12, 0.2)]
Run = tuple[Any, Any, Any]


def active(model: nn.Module, **options: Any) -> Any:
    return smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5, **options)


def of_torch(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "active": active,
    "int8": lambda model: active(model, moment_dtype="int8"),
    "torch": of_torch,
    "lookahead": lambda model: Lookahead(of_torch(model), k=1),
}


def fresh(make: Callable[[nn.Module], Any] = active, density: float = 0.6, **options: Any) -> Run:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density, block_shape=(1, 4), dense_as_compact=True)
    optimizer = make(model)
    given = {"total_steps": 40, "every": 4, "schedule": "cosine", "density_schedule": STAGES} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)


def assert_stays_with_its_weights(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> None:
    for name, states in before.items():
        for key, old in states.items():
            new = after[name][key]
            was, is_now = (~each.isnan().view(len(each), -1).any(1) for each in (old, new))
            assert (was & is_now).any() and (is_now & ~was).any() and was.sum() != is_now.sum()
            assert torch.equal(new[was & is_now], old[was & is_now]) and old[was & is_now].any(), f"{name}: {key}"
            assert not new[is_now & ~was].any(), f"{name}: {key}"


def numbers(run: Run) -> dict[str, int]:
    return {name: site.num_active for name, site in find_sites(run[0]).items()}


@pytest.mark.parametrize("policies", [{}, {"grow": "gradient"}, {"grow": "momentum", "drop": "saliency"}], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("at", [7, 14, 16], ids=lambda at: f"loaded at {at}")
def test_an_earlier_stage(at: int, kind: str, policies: Any, tmp_path: Path) -> None:
    """Loaded in the second stage or the last; at step 16 right after an update. Then the run goes on."""
    run = fresh(OPTIMIZERS[kind], **policies)
    num_first = 4 if at == 7 else 9
    train(*run, steps=num_first)
    best, best_numbers = copy.deepcopy(run[0].state_dict()), numbers(run)
    train(*run, first=num_first, steps=at - num_first)
    before, stage_numbers = kept(run), numbers(run)
    run[0].load_state_dict(best)
    assert_same(dict(run[0].state_dict()), dict(best))
    assert_stays_with_its_weights(before, kept(run))
    event = run[2].history[-1]
    assert event.is_load and event.step == at and {n: e.num_active for n, e in event.sites.items()} == best_numbers
    assert run[2].next_update == at + 1
    smet.save_checkpoint(tmp_path / "loaded", *run)
    losses = train(*run, first=at, steps=1)
    assert numbers(run) == stage_numbers != best_numbers
    assert (run[2].history[-1].step, run[2].history[-1].is_load) == (at + 1, False)
    losses += train(*run, first=at + 1, steps=9)
    smet.save_checkpoint(tmp_path / "later", *run)
    expected = snapshot(*run)
    for steps_before in (0, 16):
        other = fresh(OPTIMIZERS[kind], **policies)
        train(*other, steps=steps_before)
        smet.load_checkpoint(tmp_path / "loaded", *other)
        assert train(*other, first=at, steps=10) == losses
        assert_same(snapshot(*other), expected)
        assert other[2].history == run[2].history
    smet.load_checkpoint(tmp_path / "later", *run)
    assert_same(snapshot(*run), expected)


def test_there_and_back(tmp_path: Path) -> None:
    """The later weights, loaded again, are those of the stage of this step, so that none is due."""
    run = fresh()
    train(*run, steps=4)
    first = copy.deepcopy(run[0].state_dict())
    train(*run, first=4, steps=10)
    last, upcoming = copy.deepcopy(run[0].state_dict()), run[2].next_update
    for state, due in ((first, 15), (last, upcoming), (first, 15)):
        run[0].load_state_dict(state)
        assert run[2].next_update == due
        smet.save_checkpoint(tmp_path / "a", *run)
        smet.load_checkpoint(tmp_path / "a", *fresh())
    assert [(event.step, event.is_load) for event in run[2].history[-3:]] == [(14, True)] * 3
    train(*run, first=14, steps=6)
    smet.save_checkpoint(tmp_path / "a", *run)
    smet.load_checkpoint(tmp_path / "a", *fresh())


@pytest.mark.parametrize("num_steps", [0, 1, 4, 7])
def test_weights_of_a_later_stage_before_or_after_the_first_step(num_steps: int, tmp_path: Path) -> None:
    """No stage is due yet at first, so that they keep their number until one begins."""
    other, run = fresh(), fresh()
    train(*other, steps=14)
    train(*run, steps=num_steps)
    before = kept(run) if num_steps else None
    run[0].load_state_dict(other[0].state_dict())
    assert numbers(run) == numbers(other)
    if before is not None:
        is_kept = kept(run)["0.weight"]["exp_avg"].nan_to_num() != 0
        assert torch.equal(is_kept, is_kept & (before["0.weight"]["exp_avg"].nan_to_num() != 0)) and is_kept.any()
    for step in range(num_steps, 16):
        smet.save_checkpoint(tmp_path / "a", *run)
        resumed = fresh()
        smet.load_checkpoint(tmp_path / "a", *resumed)
        assert train(*run, first=step, steps=1) == train(*resumed, first=step, steps=1)
        assert_same(snapshot(*run), snapshot(*resumed))
    stages = [
        (event.step, event.density) for event in run[2].history if event.density is not None and not event.is_load
    ]
    assert stages == ([(5, 0.4), (12, 0.2)] if num_steps < 5 else [(5, 0.4), (8, 0.4), (12, 0.2)])


def test_weights_loaded_right_after_a_full_resume() -> None:
    """The state that was loaded has as many rows as the weights it was loaded with, so it is theirs."""
    run = fresh()
    train(*run, steps=9)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=9, steps=5)
    resumed = fresh()
    resumed[0].load_state_dict(run[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    for each in (run, resumed):
        before = kept(each)
        each[0].load_state_dict(best)
        assert_stays_with_its_weights(before, kept(each))
    assert train(*run, first=14, steps=6) == train(*resumed, first=14, steps=6)
    assert_same(snapshot(*run), snapshot(*resumed))


def test_the_optimizer_loaded_before_the_model() -> None:
    """Its state has the rows of the weights that come after it."""
    expected = fresh(of_torch, auto_step=False)
    train(*expected, steps=9)
    states = [copy.deepcopy(part.state_dict()) for part in expected]
    losses = train(*expected, first=9, steps=8)
    run = fresh(of_torch, auto_step=False)
    train(*run, steps=14)
    for part in (1, 0, 2):
        run[part].load_state_dict(states[part])
    assert train(*run, first=9, steps=8) == losses
    assert_same(snapshot(*run), snapshot(*expected))


def test_state_that_no_manager_holds_is_refused_at_the_next_step() -> None:
    later, run = fresh(), fresh()
    train(*later, steps=7)
    other = of_torch(run[0])
    train(run[0], other, steps=2)
    states = copy.deepcopy(other.state_dict())
    run[0].load_state_dict(later[0].state_dict())
    with pytest.raises(
        ValueError, match=r"0\.weight: expected state of AdamW for the blocks that are active, got that"
    ):
        train(run[0], other, first=2)
    run[0].load_state_dict(fresh()[0].state_dict())
    other.load_state_dict(states)
    train(run[0], other, first=2)


def test_a_file_of_another_stage_is_refused_without_the_optimizer(tmp_path: Path) -> None:
    """A file is loaded whole, or its weights alone in the stage that it was saved in."""
    run = fresh()
    train(*run, steps=9)
    smet.save_checkpoint(tmp_path / "best", *run)
    train(*run, first=9, steps=5)
    with Unchanged(*run), pytest.raises(ValueError, match=r"0\.parametrizations\.weight\.original: expected"):
        smet.load_checkpoint(tmp_path / "best", run[0])
    with Unchanged(*run), pytest.raises(ValueError, match=r"0\.weight: expected the optimizer with a checkpoint"):
        smet.load_checkpoint(tmp_path / "best", run[0], manager=run[2])
    other = fresh()
    smet.load_checkpoint(tmp_path / "best", other[0], manager=other[2])
    assert other[2].num_steps == 9 and other[2].next_update == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda event: event.update(is_load=1), r"history\[\d\]\.is_load: expected True or False"),
        (lambda event: event.update(is_load=False), r"history\[\d\]\.step|after step 14 by this density_schedule"),
        (lambda event: event.update(density=None), r"history\[\d\]\.density: expected the density that was loaded"),
        (lambda event: event.update(step=13), r"history\[\d\]\.step|after step 14 by this density_schedule"),
        (lambda event: event["sites"].popitem(), r"active blocks|num_before"),
    ],
    ids=range(5),
)
def test_a_file_whose_load_was_altered_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    run = fresh()
    train(*run, steps=9)
    best = copy.deepcopy(run[0].state_dict())
    train(*run, first=9, steps=5)
    run[0].load_state_dict(best)
    smet.save_checkpoint(tmp_path / "a", *run)
    saved = checkpoint_file.read(tmp_path / "a")
    change(saved["manager"]["history"][-1])
    checkpoint_file.write(tmp_path / "a", saved)
    other = fresh()
    with Unchanged(*other), pytest.raises(ValueError, match=message):
        smet.load_checkpoint(tmp_path / "a", *other)
