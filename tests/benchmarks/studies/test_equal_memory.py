"""Contestants fit their budgets by counted tensors, rates are searched both ways, others' optimizers round."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.measuring import storages
from benchmarks.studies import contestants, equal_memory
from benchmarks.studies.case import Case
from benchmarks.studies.contestants import Factors, Fitted, case_of, shape_of, training_bytes
from benchmarks.studies.equal_memory import Results
from benchmarks.studies.estimate import forecast, seconds
from benchmarks.studies.optimizers import In16Bits, is_installed, make_optimizer
from benchmarks.studies.rates import MOST_FACTORS
from benchmarks.studies.records import Records
from benchmarks.studies.reports.equal_memory import steps_to
from benchmarks.studies.scale import SCALES
from benchmarks.studies.settings import PLAIN_RATE, RATE_TIMES_WIDTH
from benchmarks.studies.trainer import build, build_model, two_calls

SCALE = SCALES["quick"]
SHAPE = shape_of(SCALE, 32)

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices:UserWarning")


def counts(case: Case) -> tuple[int, int, int]:
    """Returns the numbers of all parameters, of those in vectors, and of those in the output head."""
    model = build_model(case)
    sizes = [(p.numel(), p.dim()) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, dim in sizes if dim == 1), model.lm_head.weight.numel()


def small(number: int) -> Any:
    """Allows for counters and the frequencies of rotary embeddings: far less than a byte for each weight."""
    return pytest.approx(number, abs=2500)


def test_bytes_of_dense_training() -> None:
    case = case_of(SHAPE, "dense, AdamW, fp32", 1)
    n, _, _ = counts(case)
    found = training_bytes(case)
    assert (found["weights"], found["gradients"]) == (4 * n, 4 * n) and found["states and index"] == small(8 * n)


def test_bytes_of_a_rule_without_moments() -> None:
    """SCALE keeps the momentum of the head and two moments of vectors, in the dtype of the weights or wider."""
    case = case_of(SHAPE, "dense, SCALE, bf16", 1)
    n, vectors, head = counts(case)
    found = training_bytes(case)
    assert (found["weights"], found["gradients"]) == (2 * n, 2 * n)
    assert 2 * head <= found["states and index"] <= 4 * head + 8 * vectors + 2500


def test_bytes_of_sparse_training() -> None:
    """Active weights alone have a value, a gradient, two moments and an age; each weight has a bit of index."""
    case = case_of(SHAPE, "d 0.25, AdamW, bf16", 1)
    n, _, _ = counts(case)
    linear = SHAPE.layers * (4 * SHAPE.hidden**2 + 3 * SHAPE.hidden * SHAPE.intermediate)
    active = linear // 4 + n - linear
    found = training_bytes(case)
    assert found["weights"] == found["gradients"] == pytest.approx(2 * active, abs=64)
    ages, index = linear // 4, linear // 8
    assert 4 * active + ages + index <= found["states and index"] <= 4 * active + ages + index + 25_000


def test_the_largest_model_that_fits(tmp_path: Path) -> None:
    name = "d 0.25, AdamW, bf16"
    contestants.fit(SCALE, tmp_path, {64: (name,)})
    [found] = contestants.read(tmp_path / contestants.MODELS)
    limit = sum(training_bytes(case_of(shape_of(SCALE, 64), contestants.REFERENCE, 1)).values())
    wider = shape_of(SCALE, found.shape.hidden + 8)
    assert found.total <= limit < sum(training_bytes(case_of(wider, name, 1)).values())
    before = (tmp_path / contestants.MODELS).read_text()
    contestants.fit(SCALE, tmp_path, {64: (name,)})
    assert (tmp_path / contestants.MODELS).read_text() == before


def test_the_peak_holds_what_is_stored_and_activations() -> None:
    case = case_of(shape_of(SCALE, 64), "dense, AdamW, fp32", 1)
    stored = sum(training_bytes(case).values())
    one, many, checkpointed = (contestants.step_peak(case, *kind) for kind in ((1, False), (64, False), (64, True)))
    assert 0.7 * stored < one < checkpointed < many  # the gradients come one after another


def test_steps_are_measured_beside_the_model_that_sets_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is no contestant of the budget."""
    timed: list[Case] = []

    def measured(cases: list[Case], eager: bool) -> list[float]:
        timed.extend(cases)
        return [1.0 + number for number in range(len(cases))]

    monkeypatch.setattr(equal_memory, "step_costs", measured)
    monkeypatch.setattr(equal_memory, "peaks", lambda model: {})
    found = rival("d 0.25, AdamW, bf16")
    (tmp_path / contestants.MODELS).write_text(json.dumps([asdict(found)]))
    equal_memory.measure(SCALE, tmp_path)
    assert timed == [
        case_of(shape_of(SCALE, 64), contestants.REFERENCE, 1),
        case_of(found.shape, found.name, 1),
    ]
    assert equal_memory.measured(tmp_path) == {"64": {found.name: {"cost": 2.0, "peaks": {}}}}


def test_steps_and_peaks_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_memory, "peaks", lambda model: {"1": len(model.name)})
    names = ("d 0.25, AdamW, bf16", contestants.REFERENCE)
    models = [asdict(replace(rival(name), shape=shape_of(SCALE, 64))) for name in names]
    (tmp_path / contestants.MODELS).write_text(json.dumps(models))
    equal_memory.measure(SCALE, tmp_path)
    found = equal_memory.measured(tmp_path)["64"]
    assert found[contestants.REFERENCE]["cost"] == 1.0 and found[names[0]]["cost"] > 0
    assert {name: each["peaks"]["1"] for name, each in found.items()} == {name: len(name) for name in names}
    before = (tmp_path / equal_memory.MEASURED).read_text()
    equal_memory.measure(SCALE, tmp_path)
    assert (tmp_path / equal_memory.MEASURED).read_text() == before


def rival(name: str = "dense, AdamW, fp32") -> Fitted:
    return Fitted(name, 64, SHAPE, {"weights": 1})


def record(case: Case, loss: float | None) -> dict[str, Any]:
    return {"key": case.key, "case": asdict(case), "loss": loss, "seconds": 3.0, "torch": "2.13.0"}


def factors_of(case: Case) -> Factors:
    assert case.plain_rate is not None
    linear, plain = case.rate * case.shape.hidden / RATE_TIMES_WIDTH, case.plain_rate / PLAIN_RATE
    return Factors(round(linear, 6), round(plain, 6))


def search_for(best: Factors, records: Records, place: int = 0, model: Fitted | None = None) -> equal_memory.Found:
    """Searches with losses that are least at the factors ``best``."""
    smallest, model = rival(), model or rival()
    results = Results(SCALE, records, {(each.budget, each.name): each for each in (smallest, model)})
    while (found := results.search(model, place)).best is None:
        searched = [results.search(each, step) for each in (smallest, model) for step in range(place + 1)]
        for case in (case for each in searched for case in each.cases):
            if case.key not in records:
                pairs = zip(factors_of(case), best, strict=True)
                records.add(record(case, sum(abs(x / y - y / x) for x, y in pairs)))
    return found


@pytest.mark.parametrize(("linear", "num"), [(1.0, 3), (0.5, 4), (4.0, 5), (0.125, 6)])
def test_rates_are_tried_until_both_neighbours_are_worse(linear: float, num: int, tmp_path: Path) -> None:
    found = search_for(Factors(linear, 2.0), Records(tmp_path / "records.jsonl"))
    assert found.best == (linear, 2.0) and found.linear and found.linear.inside and found.plain and found.plain.inside
    assert len(found.linear.cases) == num and len(found.cases) == num + 3  # those at the other rate's factor 1 are one
    assert {factors_of(case).plain for case in found.linear.cases} == {1.0}
    assert sorted(map(factors_of, found.plain.cases)) == [(linear, plain) for plain in (0.5, 1.0, 2.0, 4.0)]


def test_a_search_ends_at_the_end_of_what_is_tried(tmp_path: Path) -> None:
    found = search_for(Factors(1e6, 1.0), Records(tmp_path / "records.jsonl"))
    assert found.linear and len(found.linear.cases) == MOST_FACTORS and not found.linear.inside
    assert found.best == (16.0, 1.0)


def test_the_longer_length_tries_lower_rates_of_linear_layers_alone(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    search_for(Factors(1.0, 2.0), records)
    found = search_for(Factors(0.5, 2.0), records, place=1)
    assert found.best == (0.5, 2.0) and found.linear and found.linear.inside
    assert sorted(map(factors_of, found.cases)) == [(linear, 2.0) for linear in (0.25, 0.5, 1.0)]


def test_a_larger_budget_takes_the_rate_of_other_parameters_from_the_smallest(tmp_path: Path) -> None:
    larger = replace(rival(), budget=96, shape=shape_of(SCALE, 48))
    found = search_for(Factors(0.5, 4.0), Records(tmp_path / "records.jsonl"), model=larger)
    assert found.best == (0.5, 4.0) and {case.shape.hidden for case in found.cases} == {48}
    assert sorted(map(factors_of, found.cases)) == [(linear, 4.0) for linear in (0.25, 0.5, 1.0, 2.0)]


def test_only_the_best_run_in_a_larger_budget_and_in_three_seeds(tmp_path: Path) -> None:
    scale = SCALES["cpu"]
    last = equal_memory.turns(scale)[-1]
    assert (last.budget, last.place, last.names) == (scale.budgets[1], 0, equal_memory.BEST)
    records = Records(tmp_path / "records.jsonl")
    for budget, num_seeds in zip(scale.budgets, (5, 3), strict=True):
        found = Fitted(equal_memory.BEST[0], budget, shape_of(scale, budget), {})
        results = Results(scale, records, {(budget, found.name): found})
        while (searched := results.search(found, 0)).best is None:
            for case in (case for case in searched.cases if case.key not in records):
                records.add(record(case, sum(abs(factor - 1) for factor in factors_of(case))))
        assert [case.seed for case in results.best_runs(found, 0)] == list(range(num_seeds))


def test_a_run_that_diverged_is_never_the_best(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    results = Results(SCALE, records, {})
    for case in results.search(rival(), 0).cases:
        linear = factors_of(case).linear
        records.add(record(case, None if linear > 1 else 2 - linear))
    found = results.search(rival(), 0).linear
    assert found is not None and found.best == 1.0


def test_seeds_follow_rates_and_turns_follow_one_another(tmp_path: Path) -> None:
    names = ("dense, AdamW, fp32", "dense, GaLore, bf16")
    path = tmp_path / f"{equal_memory.NAME}.jsonl"
    models = [asdict(replace(rival(name), shape=SHAPE)) for name in names]
    (tmp_path / contestants.MODELS).write_text(json.dumps(models))
    records, order = Records(path), []
    while missing := [case for case in equal_memory.cases(SCALE, tmp_path) if case.key not in records]:
        order.append([(case.optimizer, case.steps, case.seed) for case in missing])
        for case in missing:
            records.add(record(case, sum(abs(factor - 1) for factor in factors_of(case))))
    assert order == [
        3 * [("adamw", 4, 0)],
        2 * [("adamw", 4, 0)],
        [("adamw", 4, 1)],
        2 * [("adamw", 8, 0)],
        [("adamw", 8, 1)],
        3 * [("galore", 4, 0)],
        2 * [("galore", 4, 0)],
        [("galore", 4, 1)],
    ]


def test_steps_to_a_loss_by_hand() -> None:
    assert steps_to(2.0, (100, 2.0), (1600, 1.0)) == 100
    assert steps_to(1.5, (100, 2.0), (1600, 1.0)) == pytest.approx(400)


def test_a_forecast_follows_runs_of_the_same_kind(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    case = case_of(SHAPE, "dense, AdamW, fp32", 100)
    linear = SHAPE.layers * (4 * SHAPE.hidden**2 + 3 * SHAPE.hidden * SHAPE.intermediate)
    assert seconds(case, records) == pytest.approx(1.5 + 100 * 6 * linear * SHAPE.batch * SHAPE.sequence / 3e10)
    records.add(record(replace(case, steps=30), 1.0))
    assert seconds(case, records) == pytest.approx(10.0)
    others = [replace(case, seed=seed) for seed in range(1080)]
    assert "1080 of 1080 runs are missing: about 3.0 hours of one thread, 1.5 with 2" in forecast(others, records, 2)


class Halving(torch.optim.Optimizer):
    """Moves every weight by the rate times half of its gradient, and keeps the gradient."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                assert p.dtype == p.grad.dtype == torch.float32
                self.state[p]["kept"] = p.grad / 2
                p.sub_(group["lr"] * self.state[p]["kept"])


def test_rounding_around_an_optimizer_keeps_the_mean() -> None:
    weight = nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))
    optimizer = Halving([weight], lr=1e-3)  # a step of 1e-3, an eighth of what bf16 can tell apart above 1
    In16Bits(optimizer, seed=0)
    for _ in range(3):
        weight.grad = torch.full_like(weight, -2.0)
        optimizer.step()
        assert weight.dtype == weight.grad.dtype == optimizer.state[weight]["kept"].dtype == torch.bfloat16
    assert weight.float().mean().item() == pytest.approx(1.003, abs=1e-4)
    assert set(weight.unique().tolist()) <= {1.0, 1.0078125, 1.015625, 1.0234375}


@pytest.mark.parametrize("name", contestants.CONTESTANTS)
def test_every_contestant_learns(name: str) -> None:
    """The losses of one batch fall; packages that are not installed are named."""
    case = case_of(shape_of(SCALE, 32), name, 8)
    if not is_installed(case.optimizer):
        with pytest.raises(ValueError, match="pip install galore-torch apollo-torch"):
            build(case)
        return
    trainee = build(case)
    tokens = torch.arange(16).repeat(2, 1)
    step = two_calls(trainee.model, trainee.optimizer)
    with torch.compiler.set_stance("force_eager"):
        losses = [step({"input_ids": tokens, "labels": tokens}).item() for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    assert {p.dtype for p in trainee.model.parameters()} == {getattr(torch, case.dtype)}


def test_an_unknown_optimizer_is_named() -> None:
    case = replace(case_of(SHAPE, "dense, AdamW, fp32", 1), optimizer="adan")
    with pytest.raises(ValueError, match=r"optimizer: expected adamw or one of .*galore.*, got 'adan'"):
        make_optimizer(case, build_model(case), [])


def test_tensors_without_a_storage_of_their_own_are_not_counted() -> None:
    others = torch.eye(3).to_sparse_csr(), torch.eye(3).to_sparse(), torch.empty(3, device="meta")
    before = {storage.data_ptr() for storage in storages()}
    mine = torch.zeros(123)
    assert mine.untyped_storage().data_ptr() in {storage.data_ptr() for storage in storages()} - before
    assert len(others) == 3
