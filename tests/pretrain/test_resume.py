import errno
import resource
from pathlib import Path
from typing import Any

import pytest

import smet_compile as smet
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.loop import pretrain, resume
from tests.pretrain.runs import (
    CHECKPOINT,
    SMALL_MODEL,
    StopAfter,
    edit_config,
    finish,
    in_new_process,
    kill_own_process,
    losses,
    moves,
    small_config,
    write_text,
)

pytestmark = SMALL_MODEL

WAYS = [
    {"method": "smet"},
    {"method": "smet-rigl", "block": "16", "schedule": "cosine"},
    {"method": "set-naive"},
    {"method": "static"},
    {"method": "dense"},
    {"method": "smet", "dtype": "bfloat16", "accumulate": 2},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_stopped_and_resumed_in_a_new_process_equals_undisturbed(way: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(tmp_path, **way)
    assert pretrain(config, tmp_path / "whole")
    assert not pretrain(config, tmp_path / "parts", StopAfter(5))
    assert finish(in_new_process(resume, tmp_path / "parts")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert moves(tmp_path / "parts") == moves(tmp_path / "whole")


def test_a_stream_resumes_where_it_was(tmp_path: Path) -> None:
    write_text(tmp_path / "stream")
    config = small_config(tmp_path, data=f"hf:{tmp_path}/stream")
    assert pretrain(config, tmp_path / "whole")
    assert not pretrain(config, tmp_path / "parts", StopAfter(7))
    assert resume(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_stopped_at_every_step(tmp_path: Path) -> None:
    config = small_config(tmp_path, method="smet-rigl", steps=8, every=2)
    pretrain(config, tmp_path / "whole")
    finished = pretrain(config, tmp_path / "parts", StopAfter(1))
    while not finished:
        finished = resume(tmp_path / "parts", StopAfter(1))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def die_while_renaming(config: RunConfig, folder: Path) -> None:
    import os

    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(CHECKPOINT):
            kill_own_process()
        rename(source, target)

    os.replace = replace
    os.rename = replace
    pretrain(config, folder)


def die_after_saving(config: RunConfig, folder: Path) -> None:
    save = smet.save_checkpoint

    def save_and_die(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        if options["extra"]["step"] == config.steps:
            kill_own_process()

    smet.save_checkpoint = save_and_die
    pretrain(config, folder)


def die_before_saving(config: RunConfig, folder: Path) -> None:
    smet.save_checkpoint = kill_own_process
    pretrain(config, folder)


def die_in_the_report(config: RunConfig, folder: Path) -> None:
    import smet_compile.pretrain.loop as loop

    loop.write_report = kill_own_process
    pretrain(config, folder)


@pytest.mark.parametrize(
    "die",
    [die_before_saving, die_while_renaming, die_after_saving, die_in_the_report],
    ids=lambda die: die.__name__,
)
def test_killed_at_a_delicate_moment(die: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=6, every=2)
    pretrain(config, tmp_path / "whole")
    assert finish(in_new_process(die, config, tmp_path / "killed")) == -9
    assert resume(tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed" / "report.md").exists()


def test_a_finished_run_only_gets_its_report_again(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path, steps=2), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "run" / "report.md").unlink()
    (tmp_path / "run" / CHECKPOINT).unlink()
    assert resume(tmp_path / "run")
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert after["report.md"] == before["report.md"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume: expected the folder of a run .*, got no such folder"):
        resume(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"--resume: expected the folder of a run .*, got a folder without"):
        resume(tmp_path)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    pretrain(config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--out: expected a folder without a run.*--resume .*another folder"):
        pretrain(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_text_that_changed_is_refused(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(2))
    (tmp_path / "text" / "0.txt").write_text("other words " * 500)
    with pytest.raises(ValueError, match="--resume: expected the text this run began with"):
        resume(tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(2))
    edit_config(tmp_path / "run", density=0.5)
    with pytest.raises(ValueError, match="another model, density or dtype"):
        resume(tmp_path / "run")


def fill_the_disk_after_a_checkpoint(config: RunConfig, folder: Path) -> None:
    save = smet.save_checkpoint

    def save_then_fill(path: Path, *arguments: Any, **options: Any) -> None:
        save(path, *arguments, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, resource.RLIM_INFINITY))

    smet.save_checkpoint = save_then_fill
    message = r"could not save .*File too large.* the checkpoint saved before is whole.* then .*--resume"
    with pytest.raises(ValueError, match=message):
        pretrain(config, folder)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    pretrain(config, tmp_path / "whole")
    folder = tmp_path / "full"
    assert finish(in_new_process(fill_the_disk_after_a_checkpoint, config, folder, output=tmp_path / "out")) == 0, (
        tmp_path / "out"
    ).read_text()
    assert [path.name for path in folder.iterdir() if path.name.startswith("checkpoint")] == [CHECKPOINT]
    assert resume(folder)
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smet, "save_checkpoint", no_space)
    with pytest.raises(ValueError, match=r"could not be written \(No space left on device\)"):
        pretrain(small_config(tmp_path), tmp_path / "run")
