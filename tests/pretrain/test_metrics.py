"""Bad lines of metrics.jsonl are named, a log behind its checkpoint is mended, and any records make a report."""

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.metrics import (
    MetricsLog,
    cut_back,
    mend_metrics,
    of_kind,
    ranges_text,
    read_metrics,
    steps_without_record,
    write_metrics,
)
from smet_compile.pretrain.report import summarize, write_report
from tests.pretrain.runs import CHECKPOINT, SMALL_MODEL, StopAfter, losses, moves, small_config

pytestmark = SMALL_MODEL
GOOD = b'{"kind": "train", "step": 1, "loss": 2.5, "lr": 0.1, "seconds": 0.2}'


def in_report(folder: Path, row: str) -> str | None:
    found = re.search(rf"^\| {row} \| (.*) \|$", (folder / "report.md").read_text(), re.MULTILINE)
    return found and found[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes runs of twelve steps: "whole", and "parts", stopped at step 8 with its checkpoint."""
    root = tmp_path_factory.mktemp("mend")
    pretrain(small_config(root), root / "whole", console=Console(file=io.StringIO()))
    pretrain(small_config(root), root / "parts", StopAfter(8), Console(file=io.StringIO()))
    return root


@pytest.fixture
def stopped(root: Path, tmp_path: Path) -> Path:
    """Returns a copy of the run that stopped at step 8."""
    (tmp_path / "run").mkdir()
    for path in (root / "parts").iterdir():
        (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "run"


def keep(folder: Path, *steps: int) -> None:
    records = read_metrics(folder / "metrics.jsonl")
    write_metrics(folder / "metrics.jsonl", [record for record in records if record["step"] in steps])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\0" * 50, "expected a record as JSON, got "),
        (b"", "expected a record as JSON, got "),
        (b'{"kind": "tra\xe9n"}', "expected a record as JSON, got 'utf-8' codec"),
        (GOOD[:30], "expected a record as JSON, got "),
        (GOOD + GOOD, "expected a record as JSON, got Extra data"),
        (b"[" * 100_000, "expected a record as JSON, got "),
        (b"[]", r"expected a JSON object with kind and step, got \[\]"),
        (b"null", "expected a JSON object with kind and step, got None"),
        (b"3", "expected a JSON object with kind and step, got 3"),
        (b'"train"', "expected a JSON object with kind and step, got 'train'"),
        (b"{}", "expected a text called kind, got None"),
        (b'{"kind": 3, "step": 1}', "expected a text called kind, got 3"),
        (b'{"kind": ["train"], "step": 1}', r"expected a text called kind, got \['train'\]"),
        (b'{"kind": "train", "loss": 1}', "train: expected step, got a record without it"),
        (b'{"kind": "train", "step": "1", "loss": 1}', "train.step: expected a whole number of at least 0, got '1'"),
        (b'{"kind": "train", "step": 1.0, "loss": 1}', "train.step: expected a whole number of at least 0, got 1.0"),
        (b'{"kind": "train", "step": true, "loss": 1}', "train.step: expected a whole number of at least 0, got True"),
        (b'{"kind": "train", "step": -1, "loss": 1}', "train.step: expected a whole number of at least 0, got -1"),
        (b'{"kind": "train", "step": 1}', "train: expected loss, got a record without it"),
        (b'{"kind": "train", "step": 1, "loss": null}', "train.loss: expected a number, got None"),
        (b'{"kind": "train", "step": 1, "loss": 1, "seconds": "1"}', "train.seconds: expected a number, got '1'"),
        (b'{"kind": "eval", "step": 1, "loss": [1]}', r"eval.loss: expected a number, got \[1\]"),
        (b'{"kind": "topology", "step": 1, "event": 5}', "topology.event: expected a JSON object, got 5"),
        (b'{"kind": "topology", "step": 1, "event": {}}', "topology.event: expected step, got a record without it"),
        (b'{"kind": "bytes", "step": 1, "sparse": {}}', "bytes.sparse: expected num_weights, got a record without it"),
        (b'{"kind": "gap", "step": 1}', "gap: expected first_step, got a record without it"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD, b""]))
    with pytest.raises(
        ValueError, match=rf"metrics\.jsonl, line 3: {message}.*; restore the file, or take the line out"
    ):
        read_metrics(path)
    path.write_bytes(b"\n".join([GOOD, GOOD, line]))  # torn: the process was killed while it wrote
    assert len(read_metrics(path)) == 2


def test_each_part_of_a_topology_or_bytes_record_is_looked_at(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for kind in ("topology", "bytes"):
        record = of_kind(read_metrics(root / "whole" / "metrics.jsonl"), kind)[0]
        for altered in alterations(record):
            path.write_text(json.dumps(altered) + "\n")
            try:
                read_metrics(path)
            except ValueError as error:
                assert f"{path}, line 1: " in str(error)
            else:
                (tmp_path / "config.json").write_bytes((root / "whole" / "config.json").read_bytes())
                write_report(RunFolder(tmp_path)) if kind == "bytes" else None


def alterations(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns `value` with one thing at a time taken out, or made a text."""
    found = []
    for key, inner in value.items():
        found.append({name: other for name, other in value.items() if name != key})
        found.append(value | {key: "x"})
        if isinstance(inner, dict):
            found += [value | {key: changed} for changed in alterations(inner)]
    return found


def test_a_record_of_a_loss_that_is_not_finite_is_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("train", 1, loss=float("nan"), lr=1e30, seconds=0.1)
        log.write("eval", 1, loss=float("inf"))
        log.write("of a newer version", 1)
    assert [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        "train",
        "eval",
        "of a newer version",
    ]


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        ((), "8 of 8 steps have no record (1 to 8)"),
        ((2, 3, 5, 7), "4 of 8 steps have no record (1, 4, 6 and 1 more)"),
    ],
)
def test_a_log_behind_its_checkpoint_is_reported_and_mended(
    kept: tuple[int, ...], missing: str, stopped: Path, root: Path
) -> None:
    keep(stopped, *kept)
    output = io.StringIO()
    assert not resume(stopped, StopAfter(1), Console(file=output))
    assert f"warning: {stopped}/metrics.jsonl: the log is behind the checkpoint" in output.getvalue()
    assert missing in output.getvalue()
    output = io.StringIO()
    assert resume(stopped, console=Console(file=output))
    assert "the log is behind" not in output.getvalue()
    whole = [entry for entry in losses(root / "whole") if entry[1] in kept or entry[1] > 8]
    assert losses(stopped) == whole
    assert moves(stopped) == moves(root / "whole")
    records = read_metrics(stopped / "metrics.jsonl")
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
    trained = {r["step"] for r in of_kind(records, "train")}
    marked = {step for r in of_kind(records, "gap") for step in range(r["first_step"], r["step"] + 1)}
    assert trained | marked == set(range(1, 13)) and not trained & marked
    assert in_report(stopped, "steps and tokens") == "12 steps, 768 tokens"
    assert (in_report(stopped, "steps without a record") or "").startswith(f"{8 - len(kept)} (")
    assert len(of_kind(records, "bytes")) == 1 and "| gradients |" in (stopped / "report.md").read_text()


def test_a_log_that_lost_everything_after_the_last_step_is_mended(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", CHECKPOINT):
        (run / name).write_bytes((root / "whole" / name).read_bytes())
    assert resume(run, console=Console(file=io.StringIO()))
    (last,) = of_kind(read_metrics(run / "metrics.jsonl"), "eval")
    assert ("eval", last["step"], last["loss"]) == losses(root / "whole")[-1]
    assert moves(run) == moves(root / "whole")
    assert in_report(run, "steps and tokens") == "12 steps, 768 tokens"
    assert in_report(run, "training loss, first and last step") == "not recorded"
    assert in_report(run, "validation perplexity .*") == in_report(root / "whole", "validation perplexity .*")


def test_an_undisturbed_report_has_no_gap(root: Path) -> None:
    assert in_report(root / "whole", "steps and tokens") == "12 steps, 768 tokens"
    assert in_report(root / "whole", "steps without a record") is None


def test_any_kinds_of_records_make_a_report(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    save, saved = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: saved.append(path.name))
    records = read_metrics(root / "whole" / "metrics.jsonl")
    (tmp_path / "config.json").write_bytes((root / "whole" / "config.json").read_bytes())
    kinds = sorted({record["kind"] for record in records})
    assert kinds == ["bytes", "end", "eval", "topology", "train"]
    for count in (0, 1, 4, 5):
        for left in itertools.combinations(kinds, count):
            write_metrics(tmp_path / "metrics.jsonl", [record for record in records if record["kind"] in left])
            saved.clear()
            write_report(RunFolder(tmp_path))
            assert saved == [
                name
                for name, kind in (("loss.png", "train"), ("churn.png", "topology"), ("bytes.png", "bytes"))
                if kind in left
            ]
            steps = "0 steps, 0 tokens" if not left else "1 steps, 64 tokens" if left == ("bytes",) else None
            assert in_report(tmp_path, "steps and tokens") == (steps or in_report(tmp_path, "steps and tokens"))
            expected = "validation perplexity " + ("" if "eval" in left else "not recorded")
            assert summarize(RunFolder(tmp_path)).startswith(expected)
    monkeypatch.setattr(Figure, "savefig", save)
    write_metrics(tmp_path / "metrics.jsonl", [record for record in records if record["kind"] != "eval"][:3])
    write_report(RunFolder(tmp_path))


def test_ranges_of_steps() -> None:
    records = [{"kind": "train", "step": step} for step in (2, 3, 5, 9, 9, 12)]
    ranges = steps_without_record(records, 10)
    assert ranges == [(1, 1), (4, 4), (6, 8), (10, 10)]
    assert ranges_text(ranges) == "1, 4, 6 to 8 and 1 more" and ranges_text(ranges[:2]) == "1, 4"
    assert steps_without_record([], 0) == [] and steps_without_record([], 10**15) == [(1, 10**15)]


def test_nothing_is_mended_where_nothing_is_missing(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((root / "whole" / "metrics.jsonl").read_bytes())
    assert mend_metrics(path, 12) is None
    assert read_metrics(path) == read_metrics(root / "whole" / "metrics.jsonl")[:-1]
    assert mend_metrics(path, 3) is None and max(r["step"] for r in read_metrics(path)) == 3


def write_steps(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path)
    for step in range(first, last + 1):
        log.write("train", step, loss=1 / step)
        log.write("eval", step, loss=step / 3)
    log.close()


def test_records_after_a_checkpoint_are_cut_and_written_once_more(tmp_path: Path) -> None:
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    write_steps(path, 1, 9)
    cut_back(path, 4)
    write_steps(path, 5, 9)
    write_steps(whole, 1, 9)
    assert path.read_text() == whole.read_text()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(path)] == [1, 1, 2, 2]
    cut_back(path, 2)
    assert path.read_text().endswith("}\n")


def test_no_room_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="No space left"):
        MetricsLog(Path("/dev/full")).write("train", 1, loss=1.0)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
