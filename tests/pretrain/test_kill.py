"""SIGKILL at random moments: the run always resumes, and its losses are those of an undisturbed run."""

import random
import time
from pathlib import Path

import pytest

from smet_compile.pretrain.config import RunConfig
from tests.pretrain.runs import finish, in_new_process, losses, moves, run_or_resume, small_config


def timed_run(config: RunConfig, folder: Path) -> float:
    """Seconds that an undisturbed run takes in a new process."""
    began = time.monotonic()
    assert finish(in_new_process(run_or_resume, config, folder)) == 0
    return time.monotonic() - began


def kill_and_resume(config: RunConfig, folder: Path, num_kills: int, seconds: float, seed: int) -> int:
    """Kill as often, each time after a random part of `seconds`, then let it finish; how many kills hit."""
    moments = random.Random(seed)
    hits = 0
    for _ in range(num_kills):
        process = in_new_process(run_or_resume, config, folder)
        process.join(moments.uniform(0, seconds))
        process.kill()
        hits += finish(process) == -9
    assert finish(in_new_process(run_or_resume, config, folder)) == 0
    return hits


def check(config: RunConfig, root: Path, num_kills: int, seed: int) -> int:
    seconds = timed_run(config, root / "whole")
    hits = kill_and_resume(config, root / "killed", num_kills, seconds, seed)
    assert losses(root / "killed") == losses(root / "whole")
    assert moves(root / "killed") == moves(root / "whole")
    assert (root / "killed" / "report.md").read_text().startswith("# ")
    return hits


def test_three_kills(tmp_path: Path) -> None:
    assert check(small_config(tmp_path, steps=30, save_every=3), tmp_path, num_kills=3, seed=0) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_fifty_kills(seed: int, tmp_path: Path) -> None:
    method = ["smet", "smet-rigl", "set-naive", "static", "dense"][seed]
    config = small_config(tmp_path, method=method, steps=100, save_every=4)
    assert check(config, tmp_path, num_kills=10, seed=seed) >= 7
