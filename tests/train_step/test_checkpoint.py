"""A run that is saved, loaded into fresh objects and continued is the undisturbed one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import smet_compile as smet
from tests.support.snapshots import assert_same
from tests.train_step.setting import Fault, Run, active, batch_of, faulty, sparse, twice

OPTIMIZERS: dict[str, Any] = {
    "active": active,
    "adamw": lambda model: AdamW(model.parameters(), 1e-2),
    "sgd": lambda model: SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.3),
}


def scheduled(run: Run) -> Run:
    run.scheduler = CosineAnnealingLR(run.optimizer, T_max=40)
    return run


@pytest.mark.parametrize(("name", "num_before"), [("active", 7), ("sgd", 1)])
def test_continues_bit_for_bit(name: str, num_before: int, tmp_path: Path) -> None:
    """After 7 steps the next one changes the topology by its gradients."""
    first, undisturbed = map(scheduled, twice(sparse(), OPTIMIZERS[name], grow="gradient"))
    first.in_step(first.compiled(), map(batch_of, range(num_before)))
    extra = {"scheduler": first.scheduler.state_dict()}
    smet.save_checkpoint(tmp_path / "run", first.model, first.optimizer, first.manager, extra=extra)
    resumed = scheduled(twice(sparse(), OPTIMIZERS[name], grow="gradient")[0])
    loaded = smet.load_checkpoint(tmp_path / "run", resumed.model, resumed.optimizer, resumed.manager)
    resumed.scheduler.load_state_dict(loaded["scheduler"])
    resumed.losses = first.losses
    resumed.in_step(resumed.compiled(), map(batch_of, range(num_before, 14)))
    undisturbed.in_step(undisturbed.compiled(), map(batch_of, range(14)))
    assert resumed.losses == undisturbed.losses
    assert_same(resumed.model.state_dict(), undisturbed.model.state_dict())
    assert_same(resumed.state(), undisturbed.state())
    assert resumed.history() == undisturbed.history() and len(resumed.history()) == 3


@pytest.mark.usefixtures("uncompiled")
def test_what_was_skipped_before_is_no_reason_to_wait(tmp_path: Path) -> None:
    """A run is loaded right before a step with a topology update, where nobody has read counts yet."""
    first, resumed = (twice(sparse(Fault), every=3)[0] for _ in range(2))
    first.in_step(first.compiled(), [faulty(i, bad_weight=True) for i in range(2)])
    smet.save_checkpoint(tmp_path / "run", first.model, first.optimizer, first.manager)
    smet.load_checkpoint(tmp_path / "run", resumed.model, resumed.optimizer, resumed.manager)
    for run in (first, resumed):
        run.in_step(run.compiled(), [faulty(2)])
        assert [event["step"] for event in run.history()] == [3]
    assert_same(resumed.state(), first.state())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_back_to_an_earlier_step(name: str, tmp_path: Path) -> None:
    """The same objects go on from older checkpoints: what was counted since then is no news."""
    run, _ = twice(sparse(), OPTIMIZERS[name], every=3)
    step = run.compiled()
    for first in (0, 2):
        smet.save_checkpoint(tmp_path / str(first), run.model, run.optimizer, run.manager)
        run.in_step(step, map(batch_of, range(first, first + 2)))
    run.in_step(step, map(batch_of, range(4, 8)))
    losses, history = run.losses, run.history()
    assert len(losses) == 8 and len(history) == 2
    for first in (2, 0):
        run.losses = []
        smet.load_checkpoint(tmp_path / str(first), run.model, run.optimizer, run.manager)
        run.in_step(step, map(batch_of, range(first, 8)))
        assert run.losses == losses[first:] and run.history() == history
