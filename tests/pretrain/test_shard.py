"""pretrain on several ranks: losses are those of one process, and any number of ranks goes on with a run."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from typer.testing import CliRunner, Result

from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.config import RunConfig, resolve
from smet_compile.pretrain.folder import RunLock, read_config
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.metrics import MetricsLog, of_kind, read_metrics
from smet_compile.pretrain.world import World, is_reporter
from tests.pretrain.runs import PRELOADED, SMALL_MODEL, StopAfter, losses, moves, small_config, write_text
from tests.support.ranks import processes

pytestmark = SMALL_MODEL
processes.preload(PRELOADED)
TOLERANCE = 1e-5
UNLIMITED = 10**9


def config_of(folder: Path, **changes: Any) -> RunConfig:
    """Returns a run of six steps with updates after 2 and 4, in which 1, 2, 3 and 4 ranks may share a micro-batch."""
    return small_config(
        folder, **{"steps": 6, "every": 2, "batch": 12, "eval_every": 3, "eval_windows": 7, "shard": "fsdp"} | changes
    )


def begin(rank: int, world: int, config: RunConfig, folder: Path, steps: int = UNLIMITED) -> bool:
    return pretrain(config, folder, StopAfter(steps))


def go_on(rank: int, world: int, folder: Path, shard: str | None = None, steps: int = UNLIMITED) -> bool:
    return resume(folder, StopAfter(steps), shard=shard)


def expect_same_run(folder: Path, reference: Path) -> None:
    """Compares losses within rounding; steps, topology updates and bytes exactly."""
    got, wanted = losses(folder), losses(reference)
    assert [entry[:2] for entry in got] == [entry[:2] for entry in wanted]
    assert [loss for *_, loss in got] == pytest.approx([loss for *_, loss in wanted], rel=0, abs=TOLERANCE)
    assert moves(folder) == moves(reference)
    sizes, reference_sizes = (of_kind(read_metrics(run / "metrics.jsonl"), "bytes") for run in (folder, reference))
    assert len(sizes) == 1
    if read_config(reference / "config.json").slabs > 1:  # each part of a weight has an index of its own
        for scope in ("sparse", "all"):
            index, reference_index = (each[0][scope]["run"].pop("index") for each in (sizes, reference_sizes))
            assert index == pytest.approx(reference_index, rel=0.2)
    assert sizes == reference_sizes


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks, uneven validation": (2, {}),
    "3 ranks, one without a window; gradients grow": (3, {"eval_windows": 2, "method": "smet-rigl"}),
    "a mesh of one": (1, {"steps": 3, "every": 1}),
    "HSDP, accumulation, tiles": (
        4,
        {"shard": "hsdp=2", "accumulate": 3, "batch": 4, "block": "4", "schedule": "cosine"},
    ),
    "naive": (2, {"shard": "hsdp=2", "method": "rigl-naive"}),
    "layers cut in two": (2, {"shard": "tp=2", "method": "smet-rigl"}),
    "layers cut in two, tiles, twice": (4, {"shard": "tp=2", "block": "4", "schedule": "cosine", "accumulate": 2}),
    "dense, layers cut in two": (2, {"method": "dense", "shard": "tp=2"}),
    "dense": (2, {"method": "dense"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_is_that_of_one_process(name: str, tmp_path: Path) -> None:
    world, changes = CASES[name]
    config = config_of(tmp_path, **changes)
    assert pretrain(config, tmp_path / "one")
    assert processes.run(world, begin, config, tmp_path / "many") == [True] * world
    expect_same_run(tmp_path / "many", tmp_path / "one")
    assert len(moves(tmp_path / "one")) == (0 if changes.get("method") == "dense" else 2)
    files, wanted_files = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("many", "one"))
    assert files == wanted_files


def test_bf16_is_reduced_in_fp32(tmp_path: Path) -> None:
    config = config_of(tmp_path, dtype="bfloat16", accumulate=2)
    assert pretrain(config, tmp_path / "one")
    assert all(processes.run(3, begin, config, tmp_path / "many"))
    got, wanted = ([loss for *_, loss in losses(tmp_path / name)] for name in ("many", "one"))
    assert got == pytest.approx(wanted, rel=0, abs=5e-3)


@pytest.mark.parametrize("kind", ["text", "hf"])
def test_any_number_of_ranks_goes_on(kind: str, tmp_path: Path) -> None:
    """Two ranks begin, one process goes on, and three ranks end, all at steps that are no topology updates."""
    write_text(tmp_path / "text")
    config = config_of(tmp_path, **({} if kind == "text" else {"data": f"hf:{tmp_path}/text"}))
    assert pretrain(config, tmp_path / "whole")
    run = tmp_path / "parts"
    assert processes.run(2, begin, config, run, 1) == [False] * 2
    assert not resume(run, StopAfter(2))
    assert processes.run(3, go_on, run) == [True] * 3
    expect_same_run(run, tmp_path / "whole")


def test_a_run_of_one_process_goes_on_sharded(tmp_path: Path) -> None:
    config = config_of(tmp_path, shard="none")
    assert pretrain(config, tmp_path / "whole")
    run = tmp_path / "parts"
    assert not pretrain(config, run, StopAfter(3))
    assert processes.run(2, go_on, run, "fsdp") == [True] * 2
    expect_same_run(run, tmp_path / "whole")
    assert read_config(run / "config.json") == replace(config, shard="fsdp")
    (run / "report.md").unlink()
    assert processes.run(2, go_on, run) == [True] * 2
    assert "| shard | fsdp |" in (run / "report.md").read_text()


def test_a_run_of_two_parts_goes_on_with_any_ranks(tmp_path: Path) -> None:
    """Four ranks begin, two go on, then one process, and last two that shard each layer whole."""
    config = config_of(tmp_path, shard="tp=2")
    assert pretrain(config, tmp_path / "whole")
    run = tmp_path / "parts"
    assert processes.run(4, begin, config, run, 1) == [False] * 4
    assert processes.run(2, go_on, run, None, 1) == [False] * 2
    assert not resume(run, StopAfter(1))
    assert processes.run(2, go_on, run, "fsdp") == [True] * 2
    expect_same_run(run, tmp_path / "whole")


def test_a_stop_of_one_rank_stops_all_and_saves(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert processes.run(2, stop_last_rank, config, tmp_path / "run") == [False] * 2
    assert [step for kind, step, _ in losses(tmp_path / "run") if kind == "train"] == [1, 2]
    assert resume(tmp_path / "run")
    assert pretrain(config, tmp_path / "whole")
    expect_same_run(tmp_path / "run", tmp_path / "whole")


def stop_last_rank(rank: int, world: int, config: RunConfig, folder: Path) -> bool:
    return pretrain(config, folder, StopAfter(2 if rank == world - 1 else UNLIMITED))


def error_of(function: Callable[..., object], *arguments: Any) -> tuple[str, bool]:
    """Returns the message of the ValueError that the call raises, and whether this process would print it."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error), is_reporter(error)
    return "no error", False


def begin_in_vain(rank: int, world: int, config: RunConfig, folder: Path) -> tuple[str, bool]:
    return error_of(pretrain, config, folder)


def begin_with_other_text(rank: int, world: int, config: RunConfig, folder: Path) -> tuple[str, bool]:
    data = write_text(folder.parent / f"text{rank}", num_words=800 + rank)
    return error_of(pretrain, replace(config, data=data), folder)


def begin_without_text(rank: int, world: int, config: RunConfig, folder: Path) -> tuple[str, bool]:
    missing = {"data": f"text:{folder}/nothing"} if rank else {}
    return error_of(pretrain, replace(config, **missing), folder)


def begin_on_a_full_disk(rank: int, world: int, config: RunConfig, folder: Path) -> tuple[str, bool]:
    write = MetricsLog.write

    def fail(log: MetricsLog, kind: str, step: int, **values: Any) -> None:
        if step == 2:
            raise OSError("No space left on device")
        write(log, kind, step, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", fail)
        return error_of(pretrain, config, folder)


def begin_where_the_folder_is_taken_over(rank: int, world: int, config: RunConfig, folder: Path) -> tuple[str, bool]:
    def fail(lock: RunLock) -> None:
        raise ValueError("--out: another process was faster")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLock, "renew", fail)
        return error_of(pretrain, config, folder)


FAILURES: dict[Callable[..., Any], tuple[int, str]] = {
    begin_in_vain: (0, "--out: expected a run folder that no other process uses"),
    begin_with_other_text: (1, "--data .*: its text: expected .* as on the first rank, got .* on rank 1"),
    begin_without_text: (1, "--data: expected files that match"),
    begin_on_a_full_disk: (0, "No space left on device"),
    begin_where_the_folder_is_taken_over: (0, "another process was faster"),
}


@pytest.mark.parametrize("function", FAILURES, ids=lambda function: function.__name__)
def test_an_error_of_one_rank_ends_all_and_is_reported_once(function: Callable[..., Any], tmp_path: Path) -> None:
    config, folder = config_of(tmp_path, steps=2, every=1), tmp_path / "run"
    if function is begin_in_vain:
        with RunLock(folder, "--out"):
            found = processes.run(2, function, config, folder)
    else:
        found = processes.run(2, function, config, folder)
    reporter, message = FAILURES[function]
    assert [reports for _, reports in found] == [rank == reporter for rank in range(2)], found
    assert all(re.search(message, text) for text, _ in found), found
    assert found[1 - reporter][0].startswith(f"rank {reporter}: ")


def test_an_error_on_all_ranks_is_reported_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, density=0.95)
    found = processes.run(2, begin_in_vain, config, tmp_path / "run")
    assert [reports for _, reports in found] == [True, False] and "drop" in found[0][0]
    assert not (tmp_path / "run").exists()


def test_means_sums_and_shares() -> None:
    expected = [(2.0, 6.0, [[2 * rank, 2 * rank + 1]], [7 + rank] if rank < 2 else []) for rank in range(3)]
    assert processes.run(3, numbers_of) == expected


def numbers_of(rank: int, world: int) -> Any:
    here, own = World(rank, world, 1), torch.tensor(rank + 1.0)
    rows, share = here.rows_of(torch.arange(6).view(1, 6)), here.share_of(torch.tensor([7, 8]))
    return here.mean(own).item(), here.sum(own).item(), rows.tolist(), share.tolist()


REFUSALS = [
    (
        ["--batch", "4"],
        2,
        r"--shard: expected fsdp, hsdp=R or tp=N for 2 processes, got none; start them with torchrun",
    ),
    (
        ["--shard", "tp=3", "--batch", "4"],
        4,
        r"--shard: expected tp=N with an N that divides 4 \(the number of ranks\)",
    ),
    (["--shard", "tp=2", "--slabs", "3"], None, r"--shard: expected tp=N with an N that divides the run's 3 slabs"),
    (["--shard", "tp=2", "--batch", "5"], 4, r"--batch: expected a multiple of 2 \(the number of ranks over 2, which"),
    (["--slabs", "3"], None, r"--slabs: expected a number that divides the 2 heads of keys of preset nano, got 3"),
    (["--shard", "hsdp"], None, r"--shard: expected none, fsdp, hsdp=R such as hsdp=2 \(2 replicas\), or tp=N"),
    (["--shard", "tp=0"], None, r"--shard: expected none, fsdp, hsdp=R such as hsdp=2 \(2 replicas\), or tp=N"),
    (["--shard", "hsdp=3", "--batch", "4"], 4, r"--shard: expected a number of replicas that divides 4"),
    (["--shard", "fsdp", "--batch", "5"], 2, r"--batch: expected a multiple of 2 .*, got 5; pass another --batch"),
    (["--shard", "fsdp", "--device", "cuda:1"], 2, r"--device: expected cpu or cuda \(a card for each rank\)"),
    (
        ["--shard", "fsdp", "--device", "cuda", "--batch", "64"],
        64,
        r"--device: expected a card for each of the 64 ranks",
    ),
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["pretrain", *map(str, arguments)])


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Sets what torchrun sets, for one machine."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(("options", "world", "message"), REFUSALS, ids=lambda case: str(case)[:30])
def test_a_wrong_option_is_refused_by_every_rank_and_printed_by_one(
    options: list[str], world: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--preset", "nano", "--device", "cpu", "--eager", "--data", write_text(tmp_path / "text"), *options]
    for rank in range(1 if world is None else 2):
        if world is not None:
            launch(monkeypatch, rank, world)
        result = call(*given, "--out", tmp_path / "run")
        assert result.exit_code == 2 and not distributed.is_initialized()
        assert bool(re.match(f"error: {message}" if rank == 0 else "$", result.stderr)), result.stderr
    assert not (tmp_path / "run").exists()


def test_a_refused_resume_leaves_the_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config_of(tmp_path), tmp_path / "run", StopAfter(2))
    before = (tmp_path / "run" / "config.json").read_text()
    launch(monkeypatch, 0, 5)
    result = call("--resume", tmp_path / "run", "--shard", "hsdp=5")
    assert result.exit_code == 2 and "--batch: expected a multiple of 5" in result.stderr
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_without_torchrun_one_process_trains_alone(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    options = ["--preset", "nano", "--steps", "4", "--every", "2", "--device", "cpu", "--eager", "--data", data]
    for name, extra in (("plain", []), ("sharded", ["--shard", "hsdp=2"])):
        result = call(*options, "--batch", "3", *extra, "--out", tmp_path / name)
        assert result.exit_code == 0 and " rank" not in result.output, result.output
    assert losses(tmp_path / "sharded") == losses(tmp_path / "plain")
    assert resolve().shard == "none"


def test_torchrun(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    options = ["--preset", "nano", "--steps", "4", "--every", "2", "--device", "cpu", "--data", data]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "smet_compile", "pretrain"]
    command = [*launcher, *program, *options, "--shard", "fsdp", "--out", str(tmp_path / "many")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert [result.stdout.count(text) for text in ("fsdp on 2 ranks", "step 4/4", "Done: ", "not compile")] == [1] * 4
    assert result.stderr.count("sparsify: the model's matrices as a whole") == 1
    assert call(*options, "--eager", "--out", tmp_path / "one").exit_code == 0
    expect_same_run(tmp_path / "many", tmp_path / "one")
