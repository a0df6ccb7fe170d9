"""Studies go on where they stopped, and their pages say what the records say."""

import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.studies import __main__ as command
from benchmarks.studies import contestants, equal_memory, learning_rate, quality, spikes
from benchmarks.studies.case import Case
from benchmarks.studies.contestants import Fitted
from benchmarks.studies.probe import LENGTH
from benchmarks.studies.records import Records
from benchmarks.studies.reports.interval import interval
from benchmarks.studies.reports.learning_rate import best_rate, parts
from benchmarks.studies.reports.quality import excess
from benchmarks.studies.reports.spikes import seen
from benchmarks.studies.runner import run
from benchmarks.studies.scale import SCALES

SCALE = SCALES["quick"]

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices:UserWarning")


def made_up(case: Case, loss: float) -> dict:
    """A record as `train` returns it."""
    flat = (LENGTH + 1) * [loss]
    jump = 0.5 if not case.local_age else 0.0
    windows = [
        {"step": step, "is_null": False, "without": flat, "after_drop": loss,
         "losses": [loss, loss + jump + 1e-3 * (step + case.seed), *flat[2:]]} for step in (40, 60)
    ] + [{"step": 50, "is_null": True, "without": flat, "after_drop": None, "losses": flat}]  # fmt: skip
    return {
        "key": case.key, "case": asdict(case), "loss": loss, "curve": [[case.steps, loss]], "train": [],
        "density": case.density, "seconds": 1.0, "torch": "2.13.0",
        "windows": windows if case.probe and case.every else [],
        "movement": {"dropped": 40, "grown": 40, "judged": 30, "dropped_at_first": 10, "newly_active": 20,
                     "active": 100, "explored": 150, "blocks": 400},
    }  # fmt: skip


def loss_of(case: Case) -> float:
    """Best at a rate of 1e-3 / √d; every seed a little different."""
    effective = case.rate * case.density ** (0.5 - case.exponent)
    return 2 + 0.1 * math.log(effective / 1e-3) ** 2 + 0.3 * (1 - case.density) + 0.01 * case.seed


def fill(name: str, folder: Path) -> Records:
    study = command.STUDIES[name]
    records = Records(folder / "studies" / f"{name}.jsonl")
    if name == equal_memory.NAME:
        make_up_models(records.path.parent)
    while missing := [case for case in study.cases(SCALE, records.path.parent) if case.key not in records]:
        for case in missing:
            records.add(made_up(case, loss_of(case)))
    return records


def make_up_models(folder: Path) -> None:
    """Gives every contestant the model that sets the budget, and twice its time."""
    folder.mkdir()
    shape = contestants.shape_of(SCALE, 64)
    models = [
        Fitted(name, 64, shape, {"weights": 700_000, "gradients": 700_000, "states and index": 1_400_000})
        for name in contestants.CONTESTANTS
    ]
    (folder / contestants.MODELS).write_text(json.dumps([asdict(model) for model in models]))
    peaks = {"1": 3_000_000, "8": 9_000_000, "1, checkpointed": 3_000_000, "8, checkpointed": 5_000_000}
    costs = dict.fromkeys(contestants.CONTESTANTS, 2.0) | {contestants.REFERENCE: 1.0}
    measured = {"64": {name: {"cost": cost, "peaks": peaks} for name, cost in costs.items()}}
    (folder / equal_memory.MEASURED).write_text(json.dumps(measured))


@pytest.mark.parametrize("name", command.STUDIES)
def test_pages(name: str, tmp_path: Path) -> None:
    records = fill(name, tmp_path)
    command.STUDIES[name].write(records, SCALE, tmp_path)
    page = (tmp_path / f"{name}.md").read_text()
    assert "are missing" not in page and "nan" not in page and "| —" not in page.replace("| — |", "")
    for line in page.splitlines():
        if line.startswith("!["):
            figure = tmp_path / line.split("(")[1].rstrip(")")
            assert figure.stat().st_size > 5000


def test_a_page_of_an_unfinished_study(tmp_path: Path) -> None:
    records = Records(tmp_path / "studies" / "quality.jsonl")
    for case in quality.cases(SCALE)[:4]:
        records.add(made_up(case, loss_of(case)))
    command.STUDIES["quality"].write(records, SCALE, tmp_path)
    assert "are missing" in (tmp_path / "quality.md").read_text()


def test_the_power_that_made_the_losses_is_found(tmp_path: Path) -> None:
    records = fill(learning_rate.NAME, tmp_path)
    for part in parts(records, SCALE):
        mean = {p: statistics.fmean(part.regrets(p, 1e-3)) for p in learning_rate.EXPONENTS}
        assert min(mean, key=lambda p: mean[p]) == 0.5
    assert best_rate({1e-3: 1.0, 2e-3: 0.5, 4e-3: 1.0}) == pytest.approx(2e-3)
    assert best_rate({1e-3: 0.4, 2e-3: 0.5, 4e-3: 1.0}) == 1e-3


def test_spikes_are_differences_of_pairs(tmp_path: Path) -> None:
    records = fill(spikes.NAME, tmp_path)
    naive, smet = (seen(records, SCALE, method, *spikes.DEFAULT) for method in ("naive SET", "SMET"))
    assert naive is not None and smet is not None and len(naive.updates) == 2 * len(naive.nulls) == 2 * len(SCALE.seeds)
    assert naive.rise.mean == pytest.approx(0.5 + 0.0505, abs=1e-6)
    assert naive.rise.excludes_zero and naive.rise.mean > 5 * smet.rise.mean


def test_quality_is_above_dense_of_the_same_seed(tmp_path: Path) -> None:
    records = fill(quality.NAME, tmp_path)
    found = excess(records, SCALE, 0.25, "1")
    sparse, dense = (loss_of(quality.sparse_case(SCALE, 0.25, "1", 0)), loss_of(quality.dense_case(SCALE, 0)))
    assert found is not None and found.num == 2
    assert found.mean == pytest.approx(sparse - dense) and found.half == pytest.approx(0, abs=1e-9)


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.303 / math.sqrt(3))
    assert not found.excludes_zero and interval([1.0, 1.01, 1.02]).excludes_zero
    assert interval([1.0]).format() == "+1.0000" and not interval([1.0]).excludes_zero


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.jsonl"
    case = Case(shape=SCALE.small, steps=2, rate=1e-3)
    other = replace(case, seed=1)
    Records(path).add(made_up(case, 1.5))
    path.write_text(path.read_text() + '{"key": "torn')  # a machine that stopped while it wrote
    run([case, other, other], Records(path), workers=1, eager=True)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["loss"] == 1.5 and second["case"]["seed"] == 1 and 5 < second["loss"] < 6
    run([replace(case, seed=2)], Records(path), workers=1, eager=True, minutes=0)
    assert len(path.read_text().splitlines()) == 2


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("moments", tmp_path)
    arguments = ["studies", "moments", "--scale", "quick", "--folder", str(tmp_path), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    assert (tmp_path / "moments.md").exists()
