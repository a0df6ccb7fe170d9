"""Files of a run that go while it goes on end it with a clean error, and nothing is left where it does not belong."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import smet_compile as smet
from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.training import rate_fraction
from tests.pretrain.runs import CHECKPOINT, SMALL_MODEL, StopAfter, edit_config, losses, small_config, write_text

pytestmark = SMALL_MODEL
GONE = "expected the run's folder to stay as it is, but its metrics.jsonl was removed, moved or replaced"


def remove(run: Path) -> None:
    shutil.rmtree(run)


def move_away(run: Path) -> None:
    run.rename(run.parent / "elsewhere")


def replace(run: Path) -> None:
    run.rename(run.parent / "elsewhere")
    run.mkdir()
    (run / "mine").write_text("mine")


def put_a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("mine")


def remove_the_log(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


WAYS = [remove, move_away, replace, put_a_file, remove_the_log]


def left_in(run: Path) -> list[str] | str | None:
    return run.read_text() if run.is_file() else sorted(os.listdir(run)) if run.exists() else None


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_run_whose_folder_goes_ends_at_the_next_write(way: Any, tmp_path: Path) -> None:
    run, after = tmp_path / "run", []

    def stop() -> bool:
        if not after:
            way(run)
        after.append(left_in(run))
        return False

    with pytest.raises(ValueError, match=f"{run}: {GONE}"):
        pretrain(small_config(tmp_path, save_every=100), run, stop, Console(file=io.StringIO()))
    expected = ["config.json"] if way is remove_the_log else after[0]
    assert len(after) == 1 and left_in(run) == expected
    if way is move_away:
        assert sorted(os.listdir(tmp_path / "elsewhere")) == ["config.json", "lock", "metrics.jsonl"]
        assert not resume(tmp_path / "elsewhere", StopAfter(1), Console(file=io.StringIO()))


@pytest.mark.parametrize("way", [remove, replace, put_a_file], ids=lambda way: way.__name__)
@pytest.mark.parametrize("before", [True, False])
def test_a_folder_that_goes_while_it_is_saved_is_not_made_again(
    way: Any, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save, after = tmp_path / "run", smet.save_checkpoint, []

    def save_when_gone(*arguments: Any, **options: Any) -> None:
        if not before:
            save(*arguments, **options)
        way(run)
        after.append(left_in(run))
        if before:
            save(*arguments, **options)

    monkeypatch.setattr(smet, "save_checkpoint", save_when_gone)
    with pytest.raises(ValueError, match=f"{run}: {GONE}"):
        pretrain(small_config(tmp_path, save_every=1), run, console=Console(file=io.StringIO()))
    own = {"lock", CHECKPOINT}
    if isinstance(after[0], list):
        assert set(left_in(run) or []) - own == set(after[0]) - own
    else:
        assert left_in(run) == after[0]


def test_a_lock_that_somebody_removes_is_taken_again(tmp_path: Path) -> None:
    seen = []

    def stop() -> bool:
        seen.append((tmp_path / "run" / "lock").exists())
        (tmp_path / "run" / "lock").unlink(missing_ok=True)
        return len(seen) == 3

    assert not pretrain(small_config(tmp_path, save_every=1), tmp_path / "run", stop, Console(file=io.StringIO()))
    assert seen == [True, True, True]


@pytest.mark.parametrize("name", ["metrics.jsonl", CHECKPOINT])
def test_a_folder_in_place_of_a_file_is_an_error_at_once(name: str, tmp_path: Path) -> None:
    pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(2), Console(file=io.StringIO()))
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    result = CliRunner().invoke(make_app(), ["pretrain", "--resume", str(tmp_path / "run")])
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {tmp_path}/run/{name}: expected a ")
    assert not (tmp_path / "run" / "lock").exists()


def test_a_report_that_cannot_be_written_can_be_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smet_compile.pretrain.report.draw_plots", lambda *_: [])

    def stop() -> bool:
        (tmp_path / "run" / "report.md").mkdir(exist_ok=True)
        return False

    with pytest.raises(
        ValueError, match=r"the report could not be written \(Is a directory\); the run itself is saved"
    ):
        pretrain(small_config(tmp_path, steps=2), tmp_path / "run", stop, Console(file=io.StringIO()))
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run" / "lock").exists()
    (tmp_path / "run" / "report.md").rmdir()
    assert resume(tmp_path / "run") and (tmp_path / "run" / "report.md").read_text().startswith("# smet")


def test_a_disk_that_is_full_leaves_nothing_of_a_run_that_did_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    config = small_config(tmp_path)
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(ValueError, match=r"run: could not be written \(No space left on device\); .* free some space"):
        pretrain(config, tmp_path / "deep" / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "deep").exists()


def test_a_log_is_on_disk_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, save, sync = tmp_path / "run", smet.save_checkpoint, os.fsync
    on_disk: dict[int, int] = {}
    saved = []

    def note(handle: int) -> None:
        sync(handle)
        on_disk[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def check(*arguments: Any, **options: Any) -> None:
        log, config, folder = ((run / name).stat() for name in ("metrics.jsonl", "config.json", ""))
        assert on_disk[log.st_ino] == log.st_size and on_disk[config.st_ino] == config.st_size
        assert folder.st_ino in on_disk
        saved.append(options["extra"]["step"])
        save(*arguments, **options)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(smet, "save_checkpoint", check)
    monkeypatch.setattr("smet_compile.pretrain.report.draw_plots", lambda *_: [])
    pretrain(small_config(tmp_path), run, console=Console(file=io.StringIO()))
    assert saved == [4, 8, 12]
    log = (run / "metrics.jsonl").stat()
    assert on_disk[log.st_ino] == log.st_size


def test_a_lack_of_memory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import smet_compile.pretrain.loop as loop

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(loop, "train_step", fail)
        with pytest.raises(
            ValueError, match=r"there is not enough memory \((MemoryError|Default.*)\); take a smaller --b"
        ):
            pretrain(small_config(tmp_path), tmp_path / type(error).__name__, console=Console(file=io.StringIO()))


def test_a_corpus_that_vanished_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(2), Console(file=io.StringIO()))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(ValueError, match=r"--data: expected files that match .*, got none; check the path"):
        resume(tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_checkpoint_that_is_not_of_this_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, save = tmp_path / "run", smet.save_checkpoint
    pretrain(small_config(tmp_path), run, StopAfter(2), Console(file=io.StringIO()))
    edit_config(run, steps=1)
    with pytest.raises(ValueError, match=r"expected a checkpoint of a step from 1 to 1 \(--steps\), got 2|total_steps"):
        resume(run)
    for extra in (None, {"step": 1, "data": {}}):
        shutil.rmtree(run)
        monkeypatch.setattr(smet, "save_checkpoint", lambda *parts, extra: save(*parts, extra=given))  # noqa: B023
        given = extra
        pretrain(small_config(tmp_path), run, StopAfter(2), Console(file=io.StringIO()))
        with pytest.raises(ValueError, match=r"safetensors: expected a checkpoint that pretrain saved, got one with"):
            resume(run)


@pytest.mark.parametrize("name", ["[/1] [red]x :smile: two  spaces", os.fsdecode(b"-a|b\nc caf\xe9")])
def test_names_are_printed_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smet_compile.pretrain.report.draw_plots", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "[text]" / name, num_files=2)
    data = f"text:*text*/{name.replace('[', '[[]')}/*.txt" if "[" in name else f"text:*text*/{name}/*.txt"
    small = ["--preset", "nano", "--steps", "2", "--device", "cpu", "--eager", "--eval-windows", "2"]
    result = CliRunner().invoke(make_app(), ["pretrain", *small, "--data", data, f"--out={name}"])
    assert result.exit_code == 0, (result.output, result.exception)
    shown = name.encode(errors="backslashreplace").decode()
    assert f"{data.encode(errors='backslashreplace').decode()}, from the beginning, in {shown}\n" in result.stdout
    assert result.stdout.endswith(f"Report: {shown}/report.md\n")
    row = " ".join(data.splitlines()).replace("|", "\\|").encode(errors="backslashreplace")
    assert b"| data | " + row + b" |\n" in (tmp_path / name / "report.md").read_bytes()
    result = CliRunner().invoke(make_app(), ["pretrain", *small, "--data", data, f"--out={name}"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_a_run_that_diverges_goes_on_to_its_report(tmp_path: Path) -> None:
    config = small_config(tmp_path, lr=1e30, steps=2)
    assert config.lr * rate_fraction(config, 0) == 1e30
    assert pretrain(config, tmp_path / "run", console=Console(file=io.StringIO()))
    assert [loss for *_, loss in losses(tmp_path / "run")][-1] != 0
    assert "nan" in (tmp_path / "run" / "report.md").read_text()
