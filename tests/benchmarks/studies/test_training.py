"""A case trains as it says, and its record holds what the pages read."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import smet_compile as smet
from benchmarks.studies.case import Case
from benchmarks.studies.corpus import Corpus
from benchmarks.studies.probe import LENGTH, Probe, Window
from benchmarks.studies.scale import SCALES
from benchmarks.studies.seeded import SeededAdamW
from benchmarks.studies.trainer import build, corpus_of, schedule, train
from tests.support.fresh_process import ROOT

BYTE_PAIRS = {"vocabulary": 300, "text": str(ROOT / "smet_compile")}  # small, since pairs are counted in all of it
CASE = Case(shape=SCALES["quick"].small, steps=20, rate=1e-2, density=0.25, every=5, block_warmup=5)

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices:UserWarning")


@pytest.mark.parametrize(
    "change",
    [
        {"density": 1.0, "every": 0},
        {"block": "1x16"},
        {"local_age": False, "block_warmup": 0, "exponent": 0.0},
        {"grow": "gradient", "distribution": "erk"},
        {"moment_dtype": "int8"},
        {"dtype": "bfloat16", "moment_dtype": "bfloat16"},
        {"seeded_moments": True},
        {"plain_rate": 3e-3},
        {"block": "4", "even": False},
        {"every": 0},
        {"min_age": 10},
        BYTE_PAIRS,
    ],
    ids=str,
)
def test_trains(change: dict) -> None:
    case = replace(CASE, **change)
    record = train(case, eager=True)
    assert record["loss"] < 5.6  # the logarithm of 256 is 5.55
    assert record["curve"][-1][0] == case.steps and record["curve"][-1][1] < record["curve"][0][1]
    assert record["density"] == pytest.approx(case.density, abs=0.01)
    assert Case.from_dict(record["case"]) == case and record["key"] == case.key
    assert record["cloze"]["places"] > 10 and 0 < record["cloze"]["nats_per_byte"] < 5.6
    assert record["text"]["name"] == case.text and record["text"]["num_bytes"] > 3e5


def test_newcomers_are_as_old_as_the_case_says() -> None:
    managers = [build(replace(CASE, min_age=age)).manager for age in (0, 10)]
    assert [manager.min_age for manager in managers if manager] == [0, 10]


def test_losses_of_byte_pairs_are_per_byte() -> None:
    case = replace(CASE, **BYTE_PAIRS)
    corpus, record = corpus_of(case), train(case, eager=True)
    assert record["text"] == corpus.describe() and corpus.bytes_per_token > 1.2
    assert record["curve"][-1][1] * corpus.bytes_per_token == pytest.approx(record["train"][-1], abs=0.8)


def test_a_folder_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(20_000 * "ab")
    first, other = (train(replace(CASE, text=text), eager=True) for text in (str(tmp_path), "stdlib"))
    assert first["loss"] < 3 < other["loss"]  # two letters are soon learnt
    assert first["text"]["num_bytes"] == 40_001 and first["cloze"]["places"] == 0


def test_a_run_is_a_function_of_its_case() -> None:
    first, again, other = (train(case, eager=True) for case in (CASE, CASE, replace(CASE, seed=1)))
    assert first["loss"] == again["loss"] != other["loss"]


def test_a_run_that_diverges_has_no_loss() -> None:
    record = train(replace(CASE, rate=1e30), eager=True)
    assert record["loss"] is None


def test_every_field_is_in_the_key() -> None:
    changes = asdict(CASE) | {"shape": SCALES["quick"].large}
    changes["plain_rate"] = 1.0
    different = {name: _another(value) for name, value in changes.items() if name != "shape"}
    keys = {replace(CASE, **{name: value}).key for name, value in different.items()} | {CASE.key}
    assert len(keys) == len(different) + 1


def _another(value: object) -> object:
    return not value if isinstance(value, bool) else f"{value}0" if isinstance(value, str) else value + 0.125


def test_rates() -> None:
    case = replace(CASE, steps=100, rate=1.0, warmup=0.1)
    assert schedule(case, 0) == pytest.approx(0.1) and schedule(case, 9) == 1.0
    assert schedule(case, 99) == pytest.approx(0.1, abs=1e-3)
    assert schedule(replace(case, decay="constant"), 99) == 1.0


def test_text_is_held_out_and_ordered_by_seed() -> None:
    corpus, other = Corpus(16, 0), Corpus(16, 1)
    assert torch.equal(corpus.held_out(8), other.held_out(8))
    assert torch.equal(corpus.batch(3, 4), Corpus(16, 0).batch(3, 4))
    assert not torch.equal(corpus.batch(3, 4), other.batch(3, 4))


PROBED = replace(CASE, steps=100, every=50, probe=True)


def test_windows_of_a_run() -> None:
    windows = [Window(**saved) for saved in train(PROBED, eager=True)["windows"]]
    assert [(w.step, w.is_null, w.is_open) for w in windows] == [(50, False, False), (75, True, False)]
    update, null = windows
    assert len(update.losses) == len(update.without) == LENGTH + 1
    assert null.losses == null.without  # the copy is the run, where nothing changes it
    assert update.losses[0] == update.without[0] and update.losses[1] != update.without[1]
    assert update.jump is not None and null.jump is None


def test_a_probed_run_is_the_run() -> None:
    assert train(PROBED, eager=True)["loss"] == train(replace(PROBED, probe=False), eager=True)["loss"]


def test_metric_by_hand() -> None:
    falling = [2.0 - 0.1 * k for k in range(LENGTH + 1)]
    window = Window(100, False, [2.0, 1.9, 2.3, 2.1] + 7 * [1.8], falling, after_drop=2.05)
    assert not window.is_open
    assert window.rise == pytest.approx(0.3 + 0.1)  # the copy's largest rise is -0.1
    assert window.bump == pytest.approx(0.4)
    assert window.jump == pytest.approx(0.05)


def test_probe_sees_a_loss_that_jumps() -> None:
    trainee = build(CASE)
    batch = Corpus(16, 0).held_out(8)
    probe = Probe(trainee.model, trainee.optimizer, batch, lambda model, optimizer, step: None, every=50, steps=100)
    for step in range(50, 61):
        probe.before_update(step)
        if step == 50:
            with torch.no_grad():
                trainee.model.lm_head.weight.mul_(50)  # what no update should do
        probe.after_update(step)
    (update,) = probe.windows
    assert update.without == (LENGTH + 1) * [update.losses[0]]
    assert update.rise == update.jump > 0 and update.bump == pytest.approx(LENGTH * update.rise)


def test_seeded_moments() -> None:
    trainee = build(replace(CASE, seeded_moments=True))
    assert isinstance(trainee.optimizer, SeededAdamW) and trainee.manager is not None
    tokens = Corpus(16, 0).batch(0, 2)
    for _ in range(5):
        trainee.model(input_ids=tokens, labels=tokens).loss.backward()
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
    seen = {}
    for name, site in trainee.manager.sites.items():
        state = trainee.optimizer.state[site.values]
        state["exp_avg_sq"].fill_(2.0)
        seen[name] = state
    event = trainee.manager.step()
    assert isinstance(event, smet.TopologyEvent) and event.num_dropped > 0
    for state in seen.values():
        assert (state["exp_avg_sq"] == 2.0).all()
    grown = [(state["exp_avg"] == 0).sum() for state in seen.values()]
    assert sum(grown) >= event.num_dropped
