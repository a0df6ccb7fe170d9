"""Models of a race are charged their own steps, train as they would alone, and the study picks their rates."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.studies import longer
from benchmarks.studies.case import Case
from benchmarks.studies.race import NUM_POINTS, Rival, race, run_race
from benchmarks.studies.records import Records
from benchmarks.studies.reports.longer import stored_bytes, write
from benchmarks.studies.scale import SCALES
from benchmarks.studies.trainer import train

SCALE = SCALES["quick"]

pytestmark = pytest.mark.filterwarnings("ignore:sparsify:UserWarning")


def test_a_race_trains_each_as_alone() -> None:
    cases = [longer.case(SCALE, model, 1.0) for model in longer.MODELS]
    records = race(cases, points=4, eager=True)
    for case, record in zip(cases, records, strict=True):
        alone = train(case, eager=True)
        assert record["key"] == case.key and record["text"] == alone["text"]
        assert [point[0] for point in record["curve"]] == [0, 2, 4, 6, 8]
        assert record["train"] == pytest.approx(alone["train"], rel=1e-3)  # AdamW is fused here
        seconds = [point[1] for point in record["curve"]]
        assert seconds == sorted(seconds) and seconds[0] == 0.0 and len(record["step_seconds"]) == case.steps
    losses = [record["loss"] for record in records]
    assert len(set(losses)) == 4 and all(0.5 < loss < 5.6 for loss in losses)


def test_a_step_is_charged_its_own_time() -> None:
    rival = Rival.of(longer.case(SCALE, longer.DENSE, 1.0), eager=True)
    inner = rival.step

    def slow(batch: dict) -> object:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return inner(batch)

    rival.advance(0)
    time.sleep(0.2)  # costs no processor time
    end = time.process_time() + 0.2
    while time.process_time() < end:  # another model's step
        pass
    rival.step = slow
    rival.advance(1)
    assert 0.05 <= rival.seconds[1] < 0.15 and rival.charged(2) == sum(rival.seconds)


def test_steps_that_compile_count_as_the_others() -> None:
    rival = Rival.of(longer.case(SCALE, longer.DENSE, 1.0), eager=True)
    rival.seconds = [9.0, 8.0, 7.0, 1.0, 3.0, 2.0]
    assert [rival.charged(num) for num in range(7)] == [0.0, 2.0, 4.0, 6.0, 7.0, 10.0, 12.0]


def test_bytes_of_the_dense_model_are_those_of_the_sparse_one() -> None:
    sparse, dense = (stored_bytes(longer.case(SCALES["cpu"], m, 1.0)) for m in (longer.SPARSE, longer.EQUAL_BYTES))
    assert dense == pytest.approx(sparse, rel=0.03)


def test_the_study_from_rates_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, together = tmp_path / "studies", []
    records = Records(folder / f"{longer.NAME}.jsonl")

    def in_this_process(cases: Sequence[Case], records: Records, eager: bool) -> None:
        together.append(cases)
        for record in race(cases, NUM_POINTS, eager):
            records.add(record)

    monkeypatch.setattr("benchmarks.studies.race.add_race", in_this_process)
    run_race(lambda: longer.cases(SCALE, folder), records, 1, 0, True)
    assert not list(records)
    run_race(lambda: longer.cases(SCALE, folder), records, 1, eager=True)
    assert together[0] == [longer.case(SCALE, model, longer.FACTORS[0]) for model in longer.MODELS]
    assert [case.seed for case in together[-1]] == [SCALE.seeds[-1]] * len(longer.MODELS)
    assert all(case.key in records for case in longer.cases(SCALE, folder))
    assert len(records[together[0][0].key]["curve"]) == 1 + min(NUM_POINTS, SCALE.race.steps)
    write(records, SCALE, tmp_path)
    page = (tmp_path / "longer.md").read_text()
    assert "are missing" not in page and "not reached" not in page
    assert f"SHA-256 {records[together[0][0].key]['text']['sha256']}…" in page
    assert (tmp_path / "figures" / "longer.png").stat().st_size > 5000
