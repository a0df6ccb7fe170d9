"""The study of topology updates has the runs that its questions need, in order, and its page says what they say."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.studies import topology
from benchmarks.studies.records import Records
from benchmarks.studies.replica import Replica
from benchmarks.studies.replica_runner import _work, batches, run_replicas
from benchmarks.studies.reports.topology import cold_start_effects, movement, paired, protection_effects, write
from benchmarks.studies.scale import SCALES
from benchmarks.studies.trainer import build_model

SCALE = SCALES["cpu"]
TINY = Replica(shape=SCALES["quick"].replicas, steps=2, rate=1e-3, density=0.5)


def record_of(case: Replica, loss: float | None, dropped: int = 10) -> dict:
    counts = {"dropped": dropped, "grown": dropped, "judged": 8, "dropped_at_first": 2, "newly_active": 5,
              "active": 50, "explored": 60, "blocks": 100}  # fmt: skip
    return {"key": case.key, "case": asdict(case), "loss": loss, "movement": counts, "seconds": 1.0, "torch": "2.13.0"}


def records_of(folder: Path, losses: dict[Replica, float | None]) -> Records:
    records = Records(folder / "studies" / "topology.jsonl")
    for case, loss in losses.items():
        records.add(record_of(case, loss))
    return records


def text_of(case: Replica) -> int:
    """Returns the number of bytes that a run reads."""
    return case.steps * case.shape.batch * case.shape.sequence


def test_weights_are_counted_and_text_is_enough() -> None:
    case = topology.run_of(SCALE.replicas, 0.25)
    layers = build_model(case, "meta").model.layers
    assert topology.linear_weights(case.shape) == sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    for question in topology.questions(SCALE):
        for row in question.rows:
            assert text_of(row.case) >= topology.BYTES_PER_WEIGHT * topology.linear_weights(row.case.shape)


def test_dense_models_have_as_many_weights_as_their_names_say() -> None:
    shape = topology.for_tiles(SCALE.replicas)
    num_active = topology.linear_weights(shape) / 4
    found = {row.label: topology.linear_weights(row.case.shape) for row in topology.tiles(shape).rows}
    assert found["width 64, dense, N weights"] == num_active
    assert found["width 64, dense, 2N weights"] == pytest.approx(2 * num_active, rel=0.02)
    assert found["width 64, dense, 4N weights"] == 4 * num_active


def test_every_run_has_its_references_in_all_seeds_and_none_comes_later() -> None:
    cases = topology.cases(SCALE)
    assert len(cases) == len({case.key for case in cases})
    place = {case: number for number, case in enumerate(cases)}
    for question in topology.questions(SCALE):
        for row in question.rows:
            assert len(row.references) == len(question.compared_with)
            for reference in row.references:
                if reference is not None:
                    assert place[replace(reference, seed=4)] < place[row.case] or row.case == reference
                    assert text_of(reference) == text_of(row.case)


def test_batches_hold_seeds_together_and_shapes_apart() -> None:
    cases = topology.cases(SCALE)
    found = batches(cases)
    assert sorted(case.key for batch in found for case in batch) == sorted(case.key for case in cases)
    assert [case.seed for case in found[0]] == 3 * [0, 1, 2, 3, 4]
    for batch in found:
        assert len(batch) <= 15 and len({(case.shape, case.steps) for case in batch}) == 1


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    case, reference = (topology.run_of(SCALE.replicas, 0.25, kind) for kind in ({}, topology.STATIC))
    pairs = {replace(reference, seed=seed): 2.0 + seed for seed in (0, 1, 2, 3)}
    records = records_of(tmp_path, pairs | {replace(case, seed=seed): 1.5 + seed for seed in (0, 1, 2)})
    found = paired(records, case, reference)
    assert found is not None and found.num == 3 and found.mean == pytest.approx(-0.5) and found.half < 1e-9
    assert movement(records, case) == (2 / 10, 1 - 2 / 8, 5 / 50)
    assert paired(records, topology.run_of(SCALE.replicas, 0.1), reference) is None


def test_effects_of_the_parts(tmp_path: Path) -> None:
    losses = {}
    for seed in range(topology.NUM_SEEDS):
        for age, warmup, first in topology.COLD_STARTS:
            case = replace(topology.cold_start_run(SCALE.replicas, age, warmup, first), seed=seed)
            losses[case] = seed + 0.3 * (not age) + 0.02 * (warmup == 0) - 0.1 * (first == 0) * (warmup == 0)
    records = records_of(tmp_path, losses)
    found = [each[0].mean for each in cold_start_effects(records, SCALE).values() if each]
    assert found == pytest.approx([0.3, 0.02 - 0.05, -0.05])
    assert list(protection_effects(records, SCALE).values()) == [None, None]


def test_protection_is_pooled_over_settings_that_all_seeds_have(tmp_path: Path) -> None:
    shape, losses = SCALE.replicas, {}
    for seed in range(topology.NUM_SEEDS):
        for density, gain in ((0.25, 0.1), (0.1, 0.3)):
            kinds = (topology.STATIC, topology.UNPROTECTED, topology.PROTECTED)
            static, plain, protected = (replace(topology.run_of(shape, density, kind), seed=seed) for kind in kinds)
            losses |= {static: 2.0 + seed, plain: 1.0 + seed, protected: 1.0 + seed - gain - 0.01 * seed}
    del losses[replace(topology.run_of(shape, 0.1, topology.STATIC), seed=3)]
    from_static, from_plain = protection_effects(records_of(tmp_path, losses), SCALE).values()
    assert from_static and from_static[1] == 1 and from_static[0].mean == pytest.approx(-1.12)
    assert from_plain and from_plain[1] == 2 and from_plain[0].mean == pytest.approx(-0.22)
    assert from_plain[0].num == topology.NUM_SEEDS


def test_a_page_of_some_runs_names_what_was_cut(tmp_path: Path) -> None:
    row = topology.tiles(topology.for_tiles(SCALE.replicas)).rows[0]
    cases = [*topology.of_seeds(row.case)[:2], *topology.of_seeds(row.references[0] or row.case)[:2]]
    records = records_of(tmp_path, dict.fromkeys(cases, 1.25) | {cases[1]: None})
    write(records, SCALE, tmp_path)
    page = (tmp_path / "topology.md").read_text()
    assert f"| {row.label} | 1.2500 (1 of 5 seeds) (1 diverged) | +0.0000 | — | 0.20 | 0.75 | 0.10 |" in page
    assert "Cut, with no run yet: width 64, dense, N weights | 2N weights | 4N weights; " in page
    assert "81,920 weights in linear layers, 1.64 MB in 3,200 steps, 20 bytes for each weight" in page


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    records = records_of(tmp_path, {TINY: 1.5})
    run_replicas(lambda: [TINY, replace(TINY, seed=1), TINY], records, workers=1, eager=True)
    first, second = (json.loads(line) for line in records.path.read_text().splitlines())
    assert first["loss"] == 1.5 and second["case"]["seed"] == 1 and 5 < second["loss"] < 6
    run_replicas(lambda: [replace(TINY, seed=2)], records, workers=1, eager=True, minutes=0)
    assert len(records.path.read_text().splitlines()) == 2


def test_an_error_in_a_batch_is_returned() -> None:
    case = replace(TINY, shape=replace(TINY.shape, heads=5))
    assert "ValueError" in str(_work(([case], float("inf"), True)))
    assert _work(([case], 0.0, True)) == []
