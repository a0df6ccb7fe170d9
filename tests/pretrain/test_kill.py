"""A run that is killed at random moments always resumes, and its losses are those of an undisturbed run."""

import random
import time
from pathlib import Path

import pytest

from smet_compile.pretrain.config import RunConfig
from tests.pretrain.runs import finish, in_new_process, losses, moves, run_or_resume, small_config


def timed_run(config: RunConfig, folder: Path) -> float:
    """Returns the seconds that an undisturbed run takes in a new process of a server that is up."""
    assert finish(in_new_process(len, ())) == 0
    began = time.monotonic()
    assert finish(in_new_process(run_or_resume, config, folder)) == 0
    return time.monotonic() - began


def expect_undisturbed(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert moves(folder) == moves(whole)
    assert (folder / "report.md").read_text().startswith("# ")


def kill_and_resume(config: RunConfig, root: Path, num_kills: int, seed: int) -> None:
    """Kills `num_kills` times, each time after a random part of a run's time; a new run follows one that escapes."""
    seconds = timed_run(config, root / "whole")
    moments = random.Random(seed)
    num_hits, num_runs = 0, 0
    while num_hits < num_kills:
        folder = root / f"killed-{num_runs}"
        process = in_new_process(run_or_resume, config, folder)
        process.join(moments.uniform(0, seconds))
        process.kill()
        if finish(process) == -9:
            num_hits += 1
        else:
            assert process.exitcode == 0
            expect_undisturbed(folder, root / "whole")
            num_runs += 1
    assert finish(in_new_process(run_or_resume, config, folder)) == 0
    expect_undisturbed(folder, root / "whole")


def test_three_kills(tmp_path: Path) -> None:
    kill_and_resume(small_config(tmp_path, steps=30, save_every=3), tmp_path, num_kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["smet", "smet-rigl", "set-naive", "static", "dense"])
def test_fifty_kills(method: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, method=method, steps=60, save_every=4)
    kill_and_resume(config, tmp_path, num_kills=10, seed=1)
