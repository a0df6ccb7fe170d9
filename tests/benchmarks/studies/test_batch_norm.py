"""The study of batch norm sweeps rates until the best lies inside, compares fresh seeds, and writes what it found."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.batch_norm import runs, skew
from benchmarks.studies.batch_norm.runs import FRESH_SEEDS, SWEEP_SEEDS, Run
from benchmarks.studies.records import Records
from benchmarks.studies.reports import batch_norm as page

BEST = {("RigL", False): 0.4, ("RigL", True): 0.8, ("SET", False): 0.05, ("SET", True): 0.2, (None, False): 0.1}


def made_up(run: Run) -> dict[str, Any]:
    """Returns a record as ``train`` does: best at the rate of its side, and two points better with the correction."""
    distance = abs(math.log2(run.rate / BEST[run.growth, run.corrects]))
    end = 0.6 - 0.05 * distance + 0.02 * run.corrects + 0.001 * (run.seed % 3)
    accuracies = [end - 0.01 * (run.epochs - epoch) for epoch in range(1, run.epochs + 1)]
    return {"key": run.key, "accuracies": accuracies, "losses": [1.0], "itop": 0.2, "seconds": 36.0}


def filled(folder: Path) -> Records:
    records = Records(folder / "studies/batch_norm.jsonl")
    for case in skew.cases():
        each = {part: [0.1, 0.2, 0.3] for part in ("exponents", "outgoing", "output", "apart")}
        records.add({"key": case.key, **each})
    for run in runs.all_runs(records):
        if run.key not in records:
            records.add(made_up(run))
    return records


def test_the_best_rates_lie_inside_their_sweeps(tmp_path: Path) -> None:
    records = filled(tmp_path)
    assert runs.tuned(records) == BEST
    assert runs.tried_rates(records, 0.1, "RigL", True) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    assert runs.tried_rates(records, 0.1, "SET", False) == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert not set(SWEEP_SEEDS) & set(FRESH_SEEDS)
    assert {run.seed for run in runs.pairs(records, 0.1, FRESH_SEEDS)} == set(FRESH_SEEDS)


def test_the_page_holds_paired_intervals(tmp_path: Path) -> None:
    page.write(filled(tmp_path), tmp_path)
    text = (tmp_path / "batch_norm.md").read_text()
    assert "| 0.1 | RigL | 12 | 55.1, +2.0 ± 0.0 |" in text
    assert "| layer norm | dense fan-in | +0.20 (+0.10 to +0.30) | +0.20 (+0.10 to +0.30) |" in text
    assert "| RigL, corrected |  | 42.1 (42.0-42.2) |" in text and "| twice the width | 1 | 372 |" in text


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "train", made_up)
    records = Records(tmp_path / "records.jsonl")
    runs.run_missing(records, math.inf)
    num_runs = len(list(records))
    runs.run_missing(again := Records(tmp_path / "records.jsonl"), math.inf)
    assert len(list(again)) == num_runs == len({record["key"] for record in records})
    runs.run_missing(none := Records(tmp_path / "none.jsonl"), -1)
    assert not list(none)


@pytest.mark.filterwarnings("ignore:TopologyManager")
def test_a_small_run_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "held_out", lambda: runs.made_images(500, seed=2))
    small = [Run(0.1, growth, True, 0.1, 0, epochs=2, num_images=1024, width=8) for growth in runs.GROWTHS]
    never_moved = runs.train(replace(small[0], epochs=1, num_images=640))["itop"]  # 10 steps
    for run in (*small, Run(1.0, None, False, 0.1, 0, epochs=1, num_images=1024, width=8)):
        record = runs.train(run)
        assert record == runs.train(run) | {"seconds": record["seconds"]}
        assert 0 <= record["accuracies"][0] <= 1 and math.isfinite(record["losses"][0])
        assert record["itop"] > never_moved if run.growth else record["itop"] == 0


def test_skew_of_rows() -> None:
    fan_in = torch.arange(1, 50)
    assert skew.exponent(fan_in, 3 * fan_in.double() ** -0.5) == pytest.approx(-0.5)
    data = torch.randn(200, 768), torch.randint(24, (200,))
    found = skew.measure(skew.Case("batch norm", "dense fan-in", 0), 0, data)
    assert skew.exponent(found.fan_in, found.gradient) == pytest.approx(-0.5, abs=0.1)
    held = skew.Case("layer norm", "dense fan-in", 3, "the layer after it")
    start, end = (skew.measure(case, 0, data) for case in (skew.Case("layer norm", "dense fan-in", 0), held))
    assert torch.equal(start.outgoing, end.outgoing) and not torch.equal(start.output, end.output)
