"""Studies go on where they stopped, and their pages say what the records say."""

import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.studies import __main__ as command
from benchmarks.studies import (
    contestants,
    equal_memory,
    equal_time,
    learning_rate,
    longer,
    quality,
    sensitivity,
    sizes,
    spikes,
)
from benchmarks.studies.case import Case
from benchmarks.studies.contestants import Fitted
from benchmarks.studies.probe import LENGTH
from benchmarks.studies.records import Records
from benchmarks.studies.reports.differences import difference
from benchmarks.studies.reports.interval import interval, paired
from benchmarks.studies.reports.learning_rate import best_rate, parts
from benchmarks.studies.reports.longer import after_as_much_time, loss_after, targets, time_to_loss, times_to_loss
from benchmarks.studies.reports.made import texts_read
from benchmarks.studies.reports.quality import excess
from benchmarks.studies.reports.sizes import by_seed
from benchmarks.studies.reports.spikes import over_seeds, runs
from benchmarks.studies.runner import run
from benchmarks.studies.scale import SCALES
from benchmarks.studies.settings import PLAIN_RATE, rate_of
from benchmarks.studies.trainer import build
from smet_compile.runtime.schedules import find_min_age

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
        "text": {"name": case.text, "num_bytes": 12345, "sha256": "0123456789abcdef", "bytes_per_token": 1.0},
        "cloze": {"places": 10, "exact": 0.5 - 0.1 * loss, "nats_per_byte": loss / 2},
        "step_seconds": case.steps * [0.5],
    } | ({"curve": curve_to(case, loss)} if case.vocabulary > 256 else {})  # fmt: skip


def curve_to(case: Case, loss: float) -> list[list[float]]:
    """A curve as races have it, which falls by a straight line; a sparse step takes half as long."""
    points = range(0, case.steps + 1, 2)
    return [[n, n * (1.0 if case.density == 1 else 0.5), loss + 1 - n / case.steps] for n in points]


def loss_of(case: Case) -> float:
    """Best at a rate of 1e-3 / √d, and .004 for other parameters; every seed a little different."""
    effective = case.rate * case.density ** (0.5 - case.exponent)
    off = math.log(effective / 1e-3), math.log((case.plain_rate or PLAIN_RATE) / PLAIN_RATE)
    return 2 + 0.1 * off[0] ** 2 + 0.1 * off[1] ** 2 + 0.3 * (1 - case.density) + 0.01 * case.seed


def fill(name: str, folder: Path) -> Records:
    study = command.STUDIES[name]
    records = Records(folder / "studies" / f"{name}.jsonl")
    if name == equal_memory.NAME:
        make_up_models(records.path.parent)
    if name == equal_time.NAME:
        records.path.parent.mkdir()
        costs = {rival.name: 0.5 + 0.25 * place for place, rival in enumerate(equal_time.RIVALS)}
        (records.path.parent / equal_time.STEPS).write_text(json.dumps(costs))
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
    naive, smet = (runs(records, SCALE, method, *spikes.DEFAULT) for method in ("naive SET", "SMET"))
    assert [len(run.updates) for run in naive.values()] == [2, 2] and [len(run.nulls) for run in naive.values()] == [
        1,
        1,
    ]
    rise, smaller = over_seeds(naive, "rise"), over_seeds(smet, "rise")
    assert rise is not None and smaller is not None and rise.num == len(SCALE.seeds)
    assert rise.mean == pytest.approx(0.5 + 0.0505, abs=1e-6)
    assert rise.half == pytest.approx(12.706 * 0.0005, abs=1e-5)  # of two seeds, whose windows count as one number each
    assert rise.excludes_zero and rise.mean > 5 * smaller.mean


def test_newcomers_are_protected_in_steps_of_the_setting() -> None:
    for every, density in spikes.SETTINGS:
        assert spikes.case(SCALE, "SMET, protected", every, density, 0).min_age == 2 * every
        assert spikes.case(SCALE, "SMET", every, density, 0).min_age == 0


def test_conclusions_on_spikes_rest_on_five_seeds() -> None:
    scale = SCALES["cpu"]
    seeds: dict[str, set[int]] = {method: set() for method in spikes.METHODS}
    for case in spikes.cases(scale):
        for method in spikes.METHODS:
            if case == spikes.case(scale, method, *spikes.DEFAULT, case.seed):
                seeds[method].add(case.seed)
    assert {method: len(each) for method, each in seeds.items()} == {
        method: 5 if method in spikes.IN_ALL_SETTINGS else 3 for method in spikes.METHODS
    }


def test_old_records_of_studies_are_still_theirs() -> None:
    found = Records(Path("docs/results/studies/spikes.jsonl"))
    keys = {case.key for case in spikes.cases(SCALES["cpu"])}
    assert {record["key"] for record in found} <= keys
    assert all(Case.from_dict(record["case"]).key == record["key"] for record in found)


def test_pages_name_what_was_read() -> None:
    case = Case(shape=SCALE.small, steps=2, rate=1e-3)
    named, other = (made_up(replace(case, text=text), 1.0) for text in ("stdlib", "texts/some"))
    nameless = {name: value for name, value in named.items() if name != "text"}
    found = texts_read([named, other, named, nameless])
    assert "the Python standard library's source, 12,345 bytes with SHA-256 0123456789abcdef… (runs: 2)" in found
    assert "the files in `texts/some`, 12,345 bytes" in found and "keep no hash (runs: 1)" in found


def test_sizes_are_compared_by_seed(tmp_path: Path) -> None:
    records = fill(sizes.NAME, tmp_path)
    kind = ("naive SET", 0.1)
    losses, exact = (by_seed(records, SCALE, kind, one_size, name) for name in ("loss", "exact"))
    assert losses == {seed: loss_of(one_size(kind, seed)) for seed in SCALE.seeds}
    assert exact == {seed: pytest.approx(0.5 - 0.1 * loss) for seed, loss in losses.items()}
    difference = paired(losses, by_seed(records, SCALE, sizes.DENSE, one_size))
    assert difference is not None and difference.num == 2 and difference.mean == pytest.approx(0.3 * 0.9 + more(kind))


def one_size(kind: sizes.Kind, seed: int) -> Case:
    return sizes.case(SCALE, 1, kind, seed)


def more(kind: sizes.Kind) -> float:
    """Returns how much a kind adds to its made-up loss beyond dense."""
    first, dense = one_size(kind, 0), one_size(sizes.DENSE, 0)
    return loss_of(first) - loss_of(dense) - 0.3 * (1 - first.density)


def test_methods_are_compared_at_their_own_best_rate(tmp_path: Path) -> None:
    records = fill(sizes.NAME, tmp_path)
    kind, (shape, _) = ("naive SET", 0.25), SCALE.sizes[0]
    found = sizes.search(SCALE, kind, records)
    assert found.inside and found.best is not None
    ends = [sizes.case(SCALE, 0, kind, seed, found.best) for seed in SCALE.seeds]
    assert all(case.key in records and case.rate == pytest.approx(found.best * rate_of(shape)) for case in ends)
    command.STUDIES[sizes.NAME].write(records, SCALE, tmp_path)
    mean = statistics.fmean(loss_of(case) for case in ends)
    row = next(line for line in (tmp_path / "sizes.md").read_text().splitlines() if f"| {mean:.4f} |" in line)
    assert row.startswith("| naive SET |") or row.startswith("| SMET |")


def test_methods_of_a_size_differ_in_the_rule_alone() -> None:
    scale = SCALES["cpu"]
    for size, (shape, _) in enumerate(scale.sizes):
        found = {kind: sizes.case(scale, size, kind, 0) for kind in sizes.KINDS}
        for (_, density), case in found.items():
            assert case.rate * case.density**-case.exponent == pytest.approx(0.106 / (density * shape.hidden))
        smet, naive, gradient = (found[method, 0.25] for method in sizes.METHODS)
        assert (smet.min_age, smet.local_age, smet.block_warmup) == (100, True, 50)
        assert replace(naive, local_age=True, block_warmup=50, min_age=100) == smet
        assert gradient == replace(naive, grow="gradient")


def test_the_largest_size_is_cut_first(tmp_path: Path) -> None:
    scale = SCALES["cpu"]
    *others, last = scale.sizes
    found = sizes.cases(scale, tmp_path)
    assert {(case.shape, case.density) for case in found[-9:]} == {(last[0], 0.1)}
    assert (last[0], 0.1) not in {(case.shape, case.density) for case in found[:-9]}
    small = found[: len(others) * 3 * len(sizes.KINDS)]
    assert {case.shape for case in small} == {shape for shape, _ in others} and len(found) == len(set(found))


def test_time_to_loss_by_hand() -> None:
    curve = [[0, 0.0, 5.0], [10, 2.0, 3.0], [20, 4.0, 3.5], [30, 7.0, 2.0]]
    assert time_to_loss(curve, 5.0) == (0, 0.0)
    assert time_to_loss(curve, 4.0) == (5, 1.0)
    assert time_to_loss(curve, 2.75) == (25, 5.5)
    assert time_to_loss(curve, 1.0) is None


def test_every_model_reaches_the_targets() -> None:
    ends = {"a": 2.0, "b": 1.0}
    case = Case(shape=SCALE.small, steps=8, rate=1e-3)
    found = {
        name: {0: {"curve": curve_to(case, end)}, 1: {"curve": curve_to(case, end - 0.1)}} for name, end in ends.items()
    }
    assert targets(found) == [2.75, 2.75, 2.25, 2.0]
    curves = [record["curve"] for by_seed in found.values() for record in by_seed.values()]
    assert all(time_to_loss(curve, loss) for curve in curves for loss in targets(found))


def test_the_rates_of_the_longer_run_are_searched_over_its_whole_length(tmp_path: Path) -> None:
    records = Records(tmp_path / f"{longer.NAME}.jsonl")
    losses = {2.0: 2.5, 4.0: 2.6, 8.0: None, 1.0: 2.6}
    for model in longer.MODELS:
        for factor, loss in losses.items():
            assert longer.search(SCALE, model, records).best is None
            records.add(made_up(longer.case(SCALE, model, factor), 1.0) | {"loss": loss})
    found = [case for case in longer.cases(SCALE, tmp_path) if case.key not in records]
    assert found == [longer.case(SCALE, model, 2.0, seed) for seed in SCALE.seeds[1:] for model in longer.MODELS]


def test_times_to_loss_are_paired_by_seed() -> None:
    dense, sparse = ([[[0, 0.0, 3.0], [10, last, 1.0]] for last in each] for each in ((8.0, 4.0), (2.0, 2.0)))
    found = {
        name: {seed: {"curve": curve} for seed, curve in enumerate(curves)}
        for name, curves in ((longer.DENSE, dense), (longer.SPARSE, sparse))
    }
    half = 12.706 * 0.125
    assert times_to_loss(found, 2.0) == ["2.000", "3 s", f"1 s (0.38 ± {half:.2f})"]
    assert times_to_loss(found, 0.5) == ["0.500", "not reached", "not reached"]


def test_quality_is_above_dense_of_the_same_seed(tmp_path: Path) -> None:
    records = fill(quality.NAME, tmp_path)
    found = excess(records, SCALE, 0.25, "1")
    sparse, dense = (loss_of(quality.sparse_case(SCALE, 0.25, "1", 0)), loss_of(quality.dense_case(SCALE, 0)))
    assert found is not None and found.num == 2
    assert found.mean == pytest.approx(sparse - dense) and found.half == pytest.approx(0, abs=1e-9)


def test_loss_after_as_much_time_by_hand() -> None:
    slow, fast = ([[0, 0.0, 5.0], [10, 4.0, 3.0], [20, 8.0, 2.0]], [[0, 0.0, 5.0], [20, 6.0, 2.5]])
    assert [loss_after(slow, seconds) for seconds in (0.0, 2.0, 4.0, 6.0, 8.0, 9.0)] == [5.0, 4.0, 3.0, 2.5, 2.0, 2.0]
    found = {longer.DENSE: {0: {"curve": slow}, 1: {"curve": slow}}, longer.SPARSE: {1: {"curve": fast}}}
    assert after_as_much_time(found) == {longer.DENSE: {1: 2.5}, longer.SPARSE: {1: 2.5}}


def test_a_run_that_diverged_is_in_no_difference(tmp_path: Path) -> None:
    records = Records(tmp_path / "some.jsonl")
    pairs = [(sensitivity.case(SCALE, seed, every=0), sensitivity.case(SCALE, seed)) for seed in (0, 1, 2)]
    for (changed, default), loss in zip(pairs[:2], (1.5, None), strict=True):
        records.add(made_up(changed, 1.0) | {"loss": loss})
        records.add(made_up(default, 1.25))
    assert difference(records, pairs) == interval([0.25])


@pytest.mark.parametrize(
    ("options", "min_age"),
    [
        ({}, 200),
        ({"every": 25}, 50),
        ({"every": 200}, 400),
        ({"drop_fraction": 0.5}, 100),
        ({"drop_fraction": 0.05}, 200),
    ],
)
def test_studies_of_settings_protect_newcomers_as_the_manager_does(options: dict, min_age: int) -> None:
    case = sensitivity.case(SCALES["cpu"], 0, **options)
    manager = build(replace(case, shape=SCALE.tiny)).manager
    assert manager is not None and case.min_age == find_min_age(None, manager.schedule) == min_age


def test_options_come_before_defaults() -> None:
    assert sensitivity.case(SCALES["cpu"], 0, min_age=0).min_age == 0
    assert quality.long_case(SCALES["cpu"], 0.25, "16", 0).every == 0
    assert quality.long_case(SCALES["cpu"], 1.0, "1", 0, 1.5).rate == pytest.approx(1.5 * 0.106 / 64)


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
    run(lambda: [case, other, other], Records(path), workers=1, eager=True)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["loss"] == 1.5 and second["case"]["seed"] == 1 and 5 < second["loss"] < 6
    run(lambda: [replace(case, seed=2)], Records(path), workers=1, eager=True, minutes=0)
    assert len(path.read_text().splitlines()) == 2


def test_results_decide_what_is_run_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path / "some.jsonl")
    first, second = (Case(shape=SCALES["quick"].small, steps=4, rate=rate, every=0) for rate in (1e-2, 2e-2))
    broken = replace(first, optimizer="none of these")
    run(lambda: [broken, first, *([second] if first.key in records else [])], records, workers=1, eager=True)
    assert [record["key"] for record in Records(records.path)] == [first.key, second.key]
    assert capsys.readouterr().out.count("ValueError: optimizer: expected") == 1


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("moments", tmp_path)
    arguments = ["studies", "moments", "--scale", "quick", "--folder", str(tmp_path), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    assert (tmp_path / "moments.md").exists()
