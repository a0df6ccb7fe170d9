"""2N steps equal N steps, a new process, N steps: every loss bit for bit.

N = 11 stops right before an update (every 4 steps), when growth by gradient has its flag already raised.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fresh_process import run_python
from tests.support.resume_cases import CASES

N = 11


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses and histories of the second half, from one new process that loads every case's checkpoint."""
    folder: Path = tmp_path_factory.mktemp("resume")
    for name, case in CASES.items():
        run = case.make()
        run.train(0, N)
        run.save(folder / f"{name}.ckpt")
    output = run_python("-m", "tests.support.resume_cases", str(folder), str(N), str(N))
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", list(CASES))
def test_a_resumed_run_is_the_undisturbed_one(name: str, resumed: dict[str, Any]) -> None:
    run = CASES[name].make()
    losses = run.train(0, 2 * N)
    assert resumed[name]["losses"] == losses[N:]
    assert resumed[name]["history"] == json.loads(json.dumps(run.history()))
    assert len(run.history()) == CASES[name].num_events


def test_saving_does_not_disturb_the_run(tmp_path: Path) -> None:
    case = CASES["active_adamw_gradient"]
    losses = case.make().train(0, 8)
    run, seen = case.make(), []
    for step in range(8):
        seen += run.train(step, 1)
        run.save(tmp_path / "checkpoint")
    assert seen == losses
