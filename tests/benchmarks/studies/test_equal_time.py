"""Contestants train for as long as the dense model, by their measured steps."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import smet_compile as smet
from benchmarks.studies import equal_time
from benchmarks.studies.case import Case
from benchmarks.studies.records import Records
from benchmarks.studies.scale import SCALES
from benchmarks.studies.settings import RATE_TIMES_WIDTH
from benchmarks.studies.trainer import build, train, two_calls

SCALE = SCALES["quick"]

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices:UserWarning")


def test_steps_take_as_long_as_the_dense_models() -> None:
    assert equal_time.steps_of(SCALE, 1.0) == SCALE.timed[1] == 8
    assert equal_time.steps_of(SCALE, 0.5) == 16 and equal_time.steps_of(SCALE, 2.0) == 4


def test_times_are_measured_once(tmp_path: Path) -> None:
    equal_time.prepare(SCALE, tmp_path)
    found = equal_time.costs(tmp_path)
    assert found.keys() == {each.name for each in equal_time.RIVALS} and found["dense"] == 1.0
    tiles, then_dense = found[equal_time.TILES.name], found[equal_time.THEN_DENSE.name]
    assert then_dense == pytest.approx(0.8 * tiles + 0.2) and found[equal_time.PERMUTED[0].name] == tiles
    known = {equal_time.TILES.name: 0.5, equal_time.IN_FEED_FORWARD.name: 0.75}
    (tmp_path / equal_time.STEPS).write_text(json.dumps(known))
    equal_time.prepare(SCALE, tmp_path)
    found = equal_time.costs(tmp_path)
    assert found[equal_time.THEN_DENSE.name] == 0.6 and found[equal_time.PERMUTED[1].name] == 0.75


def test_seeds_follow_the_rate_of_each_contestant(tmp_path: Path) -> None:
    (tmp_path / equal_time.STEPS).write_text(json.dumps({each.name: 0.5 for each in equal_time.RIVALS}))
    records = Records(tmp_path / f"{equal_time.NAME}.jsonl")
    first = equal_time.cases(SCALE, tmp_path)
    assert len(first) == 3 * len(equal_time.RIVALS) and {case.seed for case in first} == {0}
    for case in first:
        factor = case.rate * case.shape.hidden / RATE_TIMES_WIDTH
        records.add({"key": case.key, "case": asdict(case), "loss": abs(factor - 1), "seconds": 1.0})
    others = equal_time.cases(SCALE, tmp_path)[len(first) :]
    assert len(others) == len(equal_time.RIVALS) and {case.seed for case in others} == {1}
    assert {case.steps for case in others} == {16, 13}  # the fifth of one model's steps is dense


@pytest.mark.parametrize("place", [0, 1])
def test_tiles_that_cover_other_units_in_each_layer(place: int) -> None:
    """The model computes what a dense one does whose weights are the tiles with rows and columns in another order."""
    trainee = build(equal_time.PERMUTED[place].case(SCALE, 8))
    plain = build((equal_time.TILES, equal_time.IN_FEED_FORWARD)[place].case(SCALE, 8))
    names = [site.name.removesuffix(".weight") for site in smet.report(trainee.model).sites]
    assert len(names) == (7, 3)[place] * trainee.model.config.num_hidden_layers
    for name in names:
        layer, weight = trainee.model.get_submodule(name), plain.model.get_submodule(name).weight.detach()
        eye = torch.eye(layer.in_features, requires_grad=True)
        moved = layer(eye).T
        for dim in (0, 1):
            assert torch.allclose(moved.sum(dim).sort().values, weight.sum(dim).sort().values, atol=1e-5)
        assert not torch.equal(moved != 0, weight != 0)
        (gradient,) = torch.autograd.grad(moved.square().sum(), eye)
        assert torch.allclose(gradient, 2 * moved.T @ moved, atol=1e-5)


def test_sparse_in_feed_forward_alone() -> None:
    trainee = build(equal_time.IN_FEED_FORWARD.case(SCALE, 8))
    names = [site.name for site in smet.report(trainee.model).sites]
    assert names and all(".mlp." in name for name in names)


def test_a_model_that_becomes_dense() -> None:
    """Every weight is active after eight of ten steps."""
    case = equal_time.THEN_DENSE.case(SCALE, 10)
    trainee = build(case)
    step, seen = two_calls(trainee.model, trainee.optimizer), []
    for _ in range(10):
        step(batch_of(case))
        trainee.manager.step()
        seen.append({site.density for site in smet.report(trainee.model).sites})
    assert seen[:7] == 7 * [{0.25}] and seen[7:] == 3 * [{1.0}]


def batch_of(case: Case) -> dict[str, Any]:
    tokens = torch.randint(256, (case.shape.batch, case.shape.sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def test_a_record_of_a_model_that_becomes_dense() -> None:
    record = train(equal_time.THEN_DENSE.case(SCALE, 10), eager=True)
    assert record["density"] == 1.0 and 4 < record["loss"] < 7
