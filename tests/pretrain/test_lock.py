"""A run folder belongs to one process at a time."""

import errno
import fcntl
import io
import os
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.folder import RunLock
from smet_compile.pretrain.inspection import inspect_run
from smet_compile.pretrain.loop import pretrain, resume
from tests.pretrain.runs import SMALL_MODEL, StopAfter, finish, in_new_process, losses, small_config, write_text

pytestmark = SMALL_MODEL
HELD = (
    r"expected a run folder that no other process uses, got .*, held by smet_compile pretrain, process {} on \S+ since "
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def hold(folder: Path) -> None:
    with RunLock(folder, "--out"):
        time.sleep(60)


def test_a_folder_in_use_is_refused_with_its_holder_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smet_compile.pretrain.inspection.draw_inspection", lambda *_: [])
    pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(2), quiet())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with RunLock(tmp_path / "run", "--resume"):
        with pytest.raises(ValueError, match="^--resume: " + HELD.format(os.getpid())):
            resume(tmp_path / "run", console=quiet())
        result = CliRunner().invoke(make_app(), ["pretrain", "--resume", str(tmp_path / "run")])
        assert result.exit_code == 2 and re.match("error: --resume: " + HELD.format(os.getpid()), result.stderr)
        assert inspect_run(tmp_path / "run")[0].sites
        with RunLock(tmp_path / "new", "--out"), pytest.raises(ValueError, match="^--out: " + HELD.format(os.getpid())):
            pretrain(small_config(tmp_path), tmp_path / "new", console=quiet())
    assert not (tmp_path / "new").exists()
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    assert not (tmp_path / "run" / "lock").exists()
    assert not resume(tmp_path / "run", StopAfter(1), quiet())


def test_a_run_that_is_still_building_holds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import smet_compile.pretrain.loop as loop

    tried = []

    def build(*_: object) -> None:
        monkeypatch.undo()
        with pytest.raises(ValueError, match=HELD.format(os.getpid())):
            pretrain(small_config(tmp_path), tmp_path / "deep" / "run", console=quiet())
        tried.append(sorted(path.name for path in (tmp_path / "deep" / "run").iterdir()))
        raise KeyError("not ours")

    monkeypatch.setattr(loop, "build_run", build)
    with pytest.raises(KeyError, match="not ours"):
        pretrain(small_config(tmp_path), tmp_path / "deep" / "run", console=quiet())
    assert tried == [["lock"]] and not (tmp_path / "deep").exists()


def test_an_error_that_is_not_ours_frees_the_folder(tmp_path: Path) -> None:
    def stop() -> bool:
        raise ZeroDivisionError("in training")

    with pytest.raises(ZeroDivisionError):
        pretrain(small_config(tmp_path), tmp_path / "run", stop, quiet())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl"}
    assert not resume(tmp_path / "run", StopAfter(1), quiet())


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = in_new_process(hold, tmp_path / "run")
    while not (tmp_path / "run" / "lock").exists() or not (tmp_path / "run" / "lock").read_text():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=HELD.format(process.pid)):
        RunLock(tmp_path / "run", "--out").__enter__()
    process.kill()
    assert finish(process) == -9 and (tmp_path / "run" / "lock").exists()
    with RunLock(tmp_path / "run", "--out"):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / "lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_file_that_is_locked_is_the_one_in_the_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path, "--out") as first:
        first.path.unlink()
        first.renew()
        with pytest.raises(ValueError, match=HELD.format(os.getpid())):
            RunLock(tmp_path, "--out").__enter__()
        first.path.unlink()
        with RunLock(tmp_path, "--out") as second:
            with pytest.raises(ValueError, match=HELD.format(os.getpid())):
                first.renew()
            assert second.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"this file system has no locks \(No locks available\); see to it yourself"):
        assert not pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(1), quiet())


@pytest.mark.parametrize("content", ["a list of mine\n", None])
def test_a_file_of_that_name_that_is_not_ours_stays(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    path.write_text(content) if content else path.mkdir()
    with pytest.raises(ValueError, match=r"lock: expected no file of this name|--out: expected a folder that can be"):
        pretrain(small_config(tmp_path), tmp_path / "run", console=quiet())
    assert list((tmp_path / "run").iterdir()) == [path] and (path.is_dir() or path.read_text() == content)


def test_a_lock_that_a_power_cut_leaves_is_taken(tmp_path: Path) -> None:
    for left in (b"", b"\0" * 80, b"smet_compile pretrain, process 1"):
        (tmp_path / "lock").write_bytes(left)
        with RunLock(tmp_path, "--out"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=30, save_every=1)
    both = [in_new_process(pretrain, config, tmp_path / "run") for _ in range(2)]
    assert sorted(finish(process) or 0 for process in both) == [0, 1]
    assert [step for kind, step, _ in losses(tmp_path / "run") if kind == "train"] == list(range(1, 31))


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.safetensors", "report.md"])
def test_a_folder_with_parts_of_a_run_is_not_free(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"--out: expected a folder without a run, .* holds {name}; choose another"):
        pretrain(small_config(tmp_path), tmp_path / "run", console=quiet())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
