"""Every stage for a GPU runs at tiny size without one; one that fails or hangs stops no other; lines become tables."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import environment, report, runner, stages, tools
from benchmarks.gpu_check.cases import Case, Layer, error_of
from benchmarks.gpu_check.records import Check, Record
from benchmarks.gpu_check.report_tables import l2_bound
from benchmarks.gpu_check.results import Results
from benchmarks.gpu_check.stages import KERNELS, MODELS, PARTS, Plan, Stage
from benchmarks.layer import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from benchmarks.tables import AWAITS_GPU
from tests.support.fresh_process import ROOT, run_python

pytest.importorskip("triton")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_dry(part: str, folder: Path) -> list[dict[str, Any]]:
    out = folder / "lines.jsonl"
    printed = run_python("-m", "benchmarks.gpu_check", "--dry", f"--part={part}", f"--out={out}")
    assert sorted(printed.splitlines()) == sorted(out.read_text().splitlines())
    return lines_of(out)


@pytest.mark.parametrize("part", PARTS)
def test_every_stage_runs_without_a_gpu(part: str, tmp_path: Path) -> None:
    lines = run_dry(part, tmp_path)
    ended = {line["stage"]: line["status"] for line in lines if "status" in line}
    assert ended == {stage.name: "ok" for stage in PARTS[part]}
    assert not [line for line in lines if line.get("failed") or line.get("passed") is False]
    text = report.text(Results(lines))
    for stage in (*KERNELS, *MODELS):
        assert f"| {stage.name} | {'ok' if stage in PARTS[part] else AWAITS_GPU} |" in text


def test_limits_add_up() -> None:
    """A first call takes at most 430 seconds, and both together 840."""
    assert [stage.seconds for stage in KERNELS] == [40, 45, 70, 85, 35, 10, 75, 40, 10, 20]
    assert Plan("kernels").total_seconds() == 430
    assert Plan("kernels").total_seconds() + Plan("models").total_seconds() == 840
    assert len(Plan("models").groups()) == 1, "models are compiled side by side"


def test_the_tree_can_travel() -> None:
    assert 2**20 < environment.tree_bytes(ROOT) <= environment.LARGEST_TREE


def fails(check: Check) -> None:
    check.record("before", number=1)
    raise RuntimeError("no memory")


def hangs(check: Check) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    check.record("pid", pid=os.getpid())
    time.sleep(100)


def works(check: Check) -> None:
    with check.attempt("first", case="a"):
        raise ValueError("not this one")
    check.record("second", x=1 / 3)


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"fails": fails, "hangs": hangs, "works": works}
    made = [Stage(name, "", 20 if name != "hangs" else 1) for name in functions]
    monkeypatch.setattr(Stage, "run", lambda self, check: functions[self.name](check))
    monkeypatch.setitem(stages.PARTS, "kernels", made)
    monkeypatch.setattr(stages, "_DRY_SECONDS", 0)
    out = tmp_path / "lines.jsonl"
    assert runner.run(Plan("kernels", dry=True), out) == ["fails", "hangs"]
    results = Results.of([out])
    assert results.last("fails", "before") is not None
    failed, hung, ended = (results.last(name, "end") or {} for name in functions)
    assert failed["status"] == "failed" and failed["log"][-1] == "RuntimeError: no memory"
    assert hung["status"] == "timed out" and hung["seconds"] < 10
    pid = (results.last("hangs", "pid") or {})["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert ended["status"] == "ok"
    assert (results.last("works", "first", case="a") or {})["failed"] == "ValueError: not this one"
    assert (results.last("works", "second") or {})["x"] == 0.333333
    assert "RuntimeError: no memory" in out.with_suffix(".log").read_text()


def test_stages_of_a_group_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that wait half a second take less than a second together, but measure one after another."""

    def waits(self: Stage, check: Check) -> None:
        time.sleep(0.5)
        with check.alone():
            start = time.monotonic()
            time.sleep(0.1)
            check.record("measured", start=int(start * 1e6), end=int(time.monotonic() * 1e6))

    monkeypatch.setattr(Stage, "run", waits)
    monkeypatch.setitem(stages.PARTS, "kernels", [Stage(name, "", 20, group="both") for name in "ab"])
    out = tmp_path / "lines.jsonl"
    assert runner.run(Plan("kernels"), out) == []
    first, second = sorted((line for line in lines_of(out) if line["what"] == "measured"), key=lambda line: line["end"])
    assert first["end"] <= second["start"]
    assert second["start"] - first["start"] < 500_000


def test_an_unknown_stage() -> None:
    with pytest.raises(AssertionError, match=r"--only: expected one of environment, .*, got speed"):
        run_python("-m", "benchmarks.gpu_check", "--only=speed")


def layer_of(case: Case) -> Layer:
    return Layer(case, torch.device("cpu"))


@pytest.mark.parametrize("block", [16, 1])
def test_references_are_the_products(block: int) -> None:
    """They are computed here from the dense weight in fp64, and by the stage in fp32."""
    layer = layer_of(Case(40, 56, block, 24))
    dense = torch.zeros(layer.topology.layout.num_blocks, block, block, dtype=torch.float64)
    dense[layer.topology.mask()] = layer.values.double().view(-1, block, block)
    rows, cols = layer.topology.layout.block_rows, layer.topology.layout.block_cols
    weight = dense.view(rows, cols, block, block).transpose(1, 2).reshape(rows * block, cols * block)[:40, :56]
    found, assured = layer.references(), layer.bias
    assert assured is not None
    input, grad = layer.input.double(), layer.grad.double()
    assert error_of(found[FORWARD], input @ weight.T + assured.double()) < 1e-6
    assert error_of(found[INPUT_GRADIENT], grad @ weight) < 1e-6
    assert found[WEIGHT_GRADIENT].shape == layer.values.shape
    sums = (grad.T @ input)[(weight != 0)].sum()
    assert found[WEIGHT_GRADIENT].double().sum() == pytest.approx(float(sums), rel=1e-5)


def test_experts_have_uneven_tokens() -> None:
    layer = layer_of(Case(32, 16, 16, 24, matrices=4, grouped=True))
    assert layer.ends is not None and layer.offsets is not None
    assert layer.ends == layer.offsets.tolist() == sorted(layer.ends)
    assert layer.ends[0] == layer.ends[1] and layer.ends[-1] == 24
    found = layer.references()
    assert found[FORWARD].shape == (24, 32) and found[INPUT_GRADIENT].shape == (24, 16)


def test_a_missing_output_shows_in_the_error() -> None:
    expected = torch.ones(4)
    assert not error_of(torch.tensor([1.0, 1.0, 1.0, float("nan")]), expected) <= 1
    assert error_of(torch.tensor([1.0, 1.0, 1.0, 3.0]), expected) == pytest.approx(1.0)


def test_a_check_that_is_wrong_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import correctness

    check = Check(Record(tmp_path / "lines.jsonl", "correctness"), True, tmp_path, time.monotonic() + 100)
    product = Layer.product
    monkeypatch.setattr(correctness, "cases", lambda _: [Case(40, 32, 16, 24)])
    monkeypatch.setattr(correctness, "kinds", lambda _: [])
    monkeypatch.setattr(correctness.large_stack, "run", lambda _: None)
    monkeypatch.setattr(Layer, "product", lambda self, part, kernel: product(self, part, kernel) * 1.01)
    correctness.run(check)
    lines = lines_of(tmp_path / "lines.jsonl")
    assert [line["passed"] for line in lines if line["what"] == "product"] == [False] * 3
    assert lines[0]["what"] == "new memory" and lines[0]["passed"]
    assert "correctness, product: 16 tiles, 32→40, 24 tokens, forward" in report.text(Results(lines))


def test_the_tests_exist_and_ask_for_the_gpu() -> None:
    for name in tools.TESTS:
        assert (ROOT / name).exists()
    folder = ROOT / "tests" / "ops" / "kernels"
    on_device = {
        path.name for path in folder.glob("test_*.py") if re.search("pytestmark = .*on_device", path.read_text())
    }
    assert len(on_device) >= 5 and on_device <= {Path(name).name for name in tools.TESTS}


def test_outcomes_of_pytest() -> None:
    alone = ["tests/a.py::test_x[fp32, codes] PASSED      [ 50%]", "tests/a.py::test_y SKIPPED (no GPU) [100%]"]
    assert tools.outcomes(alone)[0] == {"tests/a.py::test_x[fp32, codes]": "PASSED", "tests/a.py::test_y": "SKIPPED"}
    both = ["[gw3] [ 50%] FAILED tests/a.py::test_x[a - b] ", "FAILED tests/a.py::test_x[a - b] - assert 1 == 2"]
    statuses, messages = tools.outcomes(both)
    assert statuses == {"tests/a.py::test_x[a - b]": "FAILED"}
    assert messages == {"tests/a.py::test_x[a - b]": "assert 1 == 2"}


def test_counters_of_ncu() -> None:
    lines = [
        "==PROF== Profiling",
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
        '"0","_masked_tiles","Duration","us","812.3"',
        '"0","_masked_tiles","Registers Per Thread","register/thread","168"',
        '"1","update","Duration","us","90.1"',
    ]
    found = tools.counters(lines)
    assert found[0] == ("_masked_tiles", {"Duration": "812.3 us", "Registers Per Thread": "168 register/thread"})
    assert found[1] == ("update", {"Duration": "90.1 us"})


def test_bound_of_l2() -> None:
    """A step over k of 256 by 64 outputs reads 320 k numbers of two bytes for 2 · 256 · 64 k operations."""
    assert l2_bound(64, bandwidth=640.0) == pytest.approx(2 * 256 * 64)
