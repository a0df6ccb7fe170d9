"""A run under torchrun changes its layout, takes one more process in, and goes on after processes were killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smet_compile.pretrain.config import resolve
from smet_compile.pretrain.elastic import address_of, switch_run
from smet_compile.pretrain.folder import RunFolder, write_config
from smet_compile.pretrain.loop import pretrain
from smet_compile.pretrain.mesh_text import MeshText, fitting_mesh, parse_mesh
from tests.pretrain.runs import StopAfter, losses
from tests.pretrain.test_shard import call
from tests.pretrain.test_shard import write_text as text_in

SECONDS = 240
pytestmark = pytest.mark.timeout(900)  # processes are started several times, each of which imports all it needs
OPTIONS = ["--preset", "nano", "--every", "10", "--slabs", "2", "--device", "cpu", "--eager"]
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
SMET = [sys.executable, "-W", "ignore", "-m", "smet_compile"]


@contextmanager
def started(command: list[Any], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process, which is killed at the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and those that it started, which torchrun puts in groups of their own."""
    for number in [process.pid, *children_of(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def children_of(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [each["step"] for each in map(json.loads, lines) if each["kind"] == "train"]


def wait_for_step(run: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while max(steps_of(run), default=0) < step:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def train_losses(run: Path) -> list[float]:
    return [loss for kind, _, loss in losses(run) if kind == "train"]


def switch(run: Path, layout: str, ranks: list[int] | None = None) -> str:
    try:
        return switch_run(RunFolder(run), layout, ranks, SECONDS)
    except ValueError as error:
        return str(error)


def test_a_run_moves_and_takes_a_process_in(tmp_path: Path) -> None:
    run, log, data = tmp_path / "run", tmp_path / "log", text_in(tmp_path / "text")
    options = [*OPTIONS, "--steps", "5000", "--data", data]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "smet_compile", "pretrain"]
    with started([*command, *options, "--elastic", "--shard", "fsdp=1", "--out", run], log) as process:
        wait_for_step(run, 3, log)
        with started([*SMET, "join", run], tmp_path / "joined") as joined:
            command = [*SMET, "switch", run, "fsdp=2"]
            first = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
            refused = switch(run, "fsdp=2", [0, 9])
            answers = [switch(run, "tp=2", [1, 2])]
            while "expected ranks from 0 to 1" in answers[-1]:  # the third has not come
                answers.append(switch(run, "tp=2", [1, 2]))
            wait_for_step(run, max(steps_of(run)) + 5, log)
            process.terminate()
            process.wait(SECONDS)
            assert joined.wait(SECONDS) == 0, (tmp_path / "joined").read_text()
    assert re.match(r"switched after \d+ steps, in", first) and re.match(r"switched after \d+ steps", answers[-1])
    assert "expected ranks from 0 to" in refused
    text = log.read_text() + (tmp_path / "joined").read_text()
    assert "switched to fsdp=1,tp=2" in text
    count = len(steps_of(run))
    assert steps_of(run) == list(range(1, count + 1))
    config = replace(RunFolder(run).open(), elastic=False, shard="none")
    assert not pretrain(config, tmp_path / "one", StopAfter(count))
    found, wanted = train_losses(run), train_losses(tmp_path / "one")
    assert found == pytest.approx(wanted, abs=1e-2) and found[:20] == pytest.approx(wanted[:20], abs=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_was_killed(tmp_path: Path) -> None:
    run, log, data = tmp_path / "run", tmp_path / "log", text_in(tmp_path / "text")
    options = [*OPTIONS, "--steps", "150", "--save-every", "20", "--data", data]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "smet_compile"]
    with started([*command, "pretrain", *options, "--elastic", "--out", run], log) as process:
        wait_for_step(run, 45, log)
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
        assert process.wait(SECONDS) == 0, log.read_text()
    assert re.search(r"fsdp=2 on 2 of 2 ranks, from step [4-9]\d, in", log.read_text())
    assert call(*options, "--out", tmp_path / "one").exit_code == 0
    assert steps_of(run) == list(range(1, 151))
    assert train_losses(run) == pytest.approx(train_losses(tmp_path / "one"), abs=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_the_machines_that_are_left(tmp_path: Path) -> None:
    run, logs, data = tmp_path / "run", [tmp_path / "log 0", tmp_path / "log 1"], text_in(tmp_path / "text")
    options = [*OPTIONS, "--steps", "150", "--save-every", "20", "--data", data, "--elastic", "--out", run]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29481", "--rdzv-id", "test"]
    command = [*TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous]
    settings = [f"last_call_timeout=2,join_timeout=60,is_host={is_host}" for is_host in ("true", "false")]
    commands = [[*command, "--rdzv-conf", each, "-m", "smet_compile", "pretrain", *options] for each in settings]
    with started(commands[0], logs[0]) as first, started(commands[1], logs[1]) as second:
        wait_for_step(run, 45, logs[0])
        kill_all(second)
        assert first.wait(SECONDS) == 0, logs[0].read_text()
    text = logs[0].read_text()
    assert "fsdp=2 on 2 of 2 ranks, from step 0" in text
    assert re.search(r"fsdp=1 on 1 of 1 ranks, from step [4-9]\d, in", text), text
    (run / "report.md").unlink()
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "smet_compile", "pretrain", *options]
    with started([*command, "--shard", "fsdp=1"], logs[1]) as process:
        assert process.wait(SECONDS) == 0, logs[1].read_text()  # it is finished; the process that waits ends, too
    assert (run / "report.md").exists()
    assert call(*options[:-3], "--out", tmp_path / "one").exit_code == 0
    assert train_losses(run) == pytest.approx(train_losses(tmp_path / "one"), abs=1e-3)


LAYOUTS = [
    ("fsdp", 4, MeshText(shards=4)),
    ("fsdp=2", 4, MeshText(shards=2)),
    ("hsdp=2", 4, MeshText(replicas=2, shards=2)),
    ("tp=2", 4, MeshText(shards=2, tp=2)),
    ("hsdp=2,fsdp=1", 4, MeshText(replicas=2)),
    ("tp=2,fsdp=3", 6, MeshText(shards=3, tp=2)),
    ("hsdp=2,fsdp=2,tp=2", 8, MeshText(2, 2, 2)),
    ("fsdp=1", 4, MeshText()),
    ("tp=2", None, MeshText(tp=2)),
]


@pytest.mark.parametrize(("text", "size", "wanted"), LAYOUTS)
def test_layouts(text: str, size: int | None, wanted: MeshText) -> None:
    mesh = parse_mesh("--shard", text, size)
    assert mesh == wanted and parse_mesh("--shard", str(mesh), size) == wanted


def test_tables_of_ranks() -> None:
    assert MeshText(shards=2, tp=2).table([1, 3, 4, 6]) == [[1, 3], [4, 6]]
    assert MeshText(2, 2, 2).names == ("replicate", "shard", "tp") and MeshText().names == ("shard",)
    assert MeshText().table([5]) == [5] and MeshText(tp=2).names == ("tp",)


@pytest.mark.parametrize(
    "text", ["", "none", "fsdp=0", "fsdp=2,fsdp=2", "ddp=2", "fsdp:2", "fsdp=2,", "tp", "fsdp=", None]
)
def test_other_texts_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r'LAYOUT: expected a layout such as "fsdp"'):
        parse_mesh("LAYOUT", text, 8)


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a layout of at most 3 ranks, got fsdp=2,tp=2"):
        parse_mesh("LAYOUT", "fsdp=2,tp=2", 3)


def test_fewer_ranks_lie_as_they_can() -> None:
    config = resolve(preset="nano", elastic=True, shard="fsdp=2,tp=2", device="cpu")
    assert fitting_mesh(config, "fsdp=2,tp=2", 4) == (MeshText(shards=2, tp=2), "")
    mesh, why = fitting_mesh(config, "fsdp=2,tp=2", 3)
    assert mesh == MeshText(shards=2) and "at most 3 ranks" in why  # a batch of 4
    assert config.slabs == 2 and resolve(elastic=True).shard == "fsdp"


def test_mistakes_have_their_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="run that was begun with --elastic"):
        address_of(RunFolder(tmp_path))
    data = ["--data", text_in(tmp_path / "text"), "--out", tmp_path / "run"]
    dense = call(*OPTIONS, *data, "--elastic", "--method", "dense")
    assert dense.exit_code == 2 and "--elastic: expected a sparse method, got dense" in dense.stderr
    alone = call(*OPTIONS, *data, "--elastic")
    assert alone.exit_code == 2 and "--elastic: expected processes that torchrun started" in alone.stderr
    text = call(*OPTIONS, *data, "--elastic", "--shard", "fast")
    assert text.exit_code == 2 and "--shard: expected a layout such as" in text.stderr
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run" / "config.json", resolve(preset="nano", elastic=True, seed=3, device="cpu"))
    other = call(*OPTIONS, *data, "--elastic")
    assert other.exit_code == 2 and "which holds a run with other options" in other.stderr
