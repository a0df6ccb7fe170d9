"""Replicas that train side by side are the runs that `train` makes one by one, and keep to their own rules."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import trainer
from benchmarks.studies.case import Case, Shape
from benchmarks.studies.replica import Replica
from benchmarks.studies.replica_topology import Grid, Movement, Reading, Topology
from benchmarks.studies.replicas import Replicas, train_together
from smet_compile.ops import find_sites

SHAPE = Shape(hidden=32, intermediate=48, heads=2, layers=1, sequence=16, batch=4)
RUN = Replica(shape=SHAPE, steps=60, rate=3e-3, plain_rate=6e-3, density=0.25, every=14, block_warmup=10)
RUN = replace(RUN, accumulate_counts=True)  # as the manager does
SINGLE = {
    "dense": {"density": 1.0},
    "random growth": {},
    "gradient growth": {"grow": "gradient"},
    "protected": {"min_age": 28},
    "tiles, naive": {"block": "4", "drop_fraction": 0.3, "local_age": False, "block_warmup": 0},
    "static, one rate, not rescaled": {"every": 0, "plain_rate": None, "rescale": False, "seed": 1},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices:UserWarning")


def trained(cases: list[Replica]) -> Replicas:
    replicas = Replicas(cases, eager=True)
    for step in range(cases[0].steps):
        replicas.advance(step)
    return replicas


def as_case(replica: Replica) -> Case:
    return Case(**{name: getattr(replica, name) for name in Case.__dataclass_fields__})


def test_replicas_are_single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [replace(RUN, **change) for change in SINGLE.values()]
    replicas = trained(cases)
    built: list[trainer.Trainee] = []
    build = trainer.build
    monkeypatch.setattr(trainer, "NUM_CURVE_POINTS", 1)
    monkeypatch.setattr(trainer, "build", lambda case: built.append(build(case)) or built[-1])
    for case, loss, topologies in zip(cases, replicas.held_out(), replicas.topologies, strict=True):
        record = trainer.train(as_case(case), eager=True)
        assert record["key"] == replace(case, accumulate_counts=False).key
        assert loss == pytest.approx(record["loss"], abs=1e-4)
        manager = built[-1].manager
        assert (manager is not None and len(manager.history) == 3) == (case.density < 1 and case.every > 0)
        sites = find_sites(built[-1].model)
        assert sites.keys() == topologies.keys()
        for name, site in sites.items():
            assert torch.equal(site.mask(), topologies[name].active)


@pytest.mark.slow
def test_compiled_replicas_are_eager_ones() -> None:
    cases = [replace(RUN, steps=4, every=2), replace(RUN, steps=4, every=2, grow="gradient", density=0.1)]
    for eager, compiled in zip(train_together(cases, eager=True), train_together(cases), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], abs=1e-5)
        assert compiled["movement"] == eager["movement"]


def test_records_of_replicas() -> None:
    static, moving = train_together([replace(RUN, every=0), RUN], eager=True)
    assert Replica.from_dict(moving["case"]).accumulate_counts
    assert static["movement"]["dropped"] == 0 == static["movement"]["newly_active"]
    moved = moving["movement"]
    assert moving["density"] == moved["active"] / moved["blocks"] == 0.25
    assert moved["dropped"] == moved["grown"] >= moved["newly_active"] > 0
    assert moved["dropped"] >= moved["judged"] >= moved["dropped_at_first"]
    assert moved["active"] + moved["newly_active"] <= moved["explored"] <= moved["active"] + moved["grown"]
    assert moving["train"][-1] < moving["train"][0] - 1


def test_replicas_of_one_batch_read_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(2_000 * "ab")
    case = replace(RUN, steps=4)
    ours, standard = (
        train_together([each], eager=True)[0]["text"] for each in (replace(case, text=str(tmp_path)), case)
    )
    assert ours["name"] == str(tmp_path) and ours["num_bytes"] == 4_001
    assert standard["name"] == "stdlib" and standard["sha256"] != ours["sha256"]
    with pytest.raises(ValueError, match="text: expected one for all replicas"):
        Replicas([case, replace(case, text=str(tmp_path))], eager=True)


def test_a_replica_that_diverges_has_no_loss_and_harms_no_other() -> None:
    case = replace(RUN, steps=20, every=5)
    alone = train_together([case], eager=True)[0]
    broken, beside = train_together([replace(case, rate=1e30), case], eager=True)
    assert broken["loss"] is None and beside["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_one_batch_has_one_length() -> None:
    with pytest.raises(ValueError, match="steps: expected one for all replicas"):
        Replicas([RUN, replace(RUN, steps=61)], eager=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "size"}, "drop: expected one of .*'magnitude'.*, got 'size'"),
        ({"grow": "none"}, "grow: expected one of"),
        ({"pattern": "2:4"}, "pattern: expected one of"),
        ({"sparse": "attention"}, "sparse: expected one of"),
        ({"moment_dtype": "int8"}, "moment_dtype: expected one of .*'float32'"),
        ({"pattern": "fan_in", "density": 0.6}, "density: expected 0.5 at most"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RUN, **change)


def test_parts_stay_dense_and_factors_count() -> None:
    plain, attention, spread = (
        Replicas([replace(RUN, every=0, **change)], eager=True)
        for change in ({}, {"sparse": "feed_forward"}, {"spread": 0.5})
    )
    query, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert query in plain.topologies[0] and query not in attention.topologies[0]
    assert (attention.parts[query].weight != 0).all() and (attention.parts[gate].weight == 0).float().mean() == 0.75
    assert torch.equal(plain.parts[gate].weight, attention.parts[gate].weight)
    assert torch.equal(2 * spread.parts[gate].weight, plain.parts[gate].weight)
    first = plain.held_out()[0]
    silent = Replicas([replace(RUN, every=0, head_scale=0.0)], eager=True).held_out()[0]
    assert silent == pytest.approx(math.log(256), abs=1e-5) and abs(first - silent) > 1e-4


ZETA = {"every": 15, "drop_fraction": 0.25, "final_drop_fraction": 0.25, "stop_fraction": 1.0}


def topology_of(**change: Any) -> tuple[Topology, torch.Tensor]:
    """Makes a topology of 8 x 12 weights and a matrix of different magnitudes."""
    case = replace(RUN, **ZETA, **change)
    weight = torch.randperm(96, generator=torch.Generator().manual_seed(5)).view(8, 12) + 1.0
    return Topology.draw(case, "some.weight", weight.shape), weight


def updated(topology: Topology, step: int, weight: torch.Tensor, gradient: torch.Tensor | None = None) -> Movement:
    movement = Movement()
    topology.update(step, Reading(weight, weight, gradient), movement)
    return movement


def test_newcomers_are_protected_until_min_age() -> None:
    topology, weight = topology_of(min_age=30)
    assert updated(topology, 15, weight).dropped == 6
    newcomers = topology.births == 15
    tiny = torch.where(newcomers.view(8, 12), 0.001, weight)
    found = updated(topology, 30, tiny)
    assert (found.dropped, found.judged) == (6, 0) and topology.active[newcomers].all()
    found = updated(topology, 45, tiny)
    assert (found.dropped, found.judged, found.dropped_at_first) == (6, 6, 6)
    assert not topology.active[newcomers & (topology.births == 15)].any()


def test_protection_leaves_fewer_to_drop() -> None:
    topology, weight = topology_of(min_age=10**6)
    assert [updated(topology, step, weight).dropped for step in (15, 30, 45, 60, 75)] == [6, 6, 6, 6, 0]


def test_small_counts_accumulate() -> None:
    kept, floored = (topology_of(block="4", accumulate_counts=keep, density=1 / 3)[0] for keep in (True, False))
    assert kept.active.sum() == 2  # so an update asks for half a block
    weight = torch.ones(8, 12)
    assert [updated(kept, step, weight).dropped for step in (15, 30, 45, 60)] == [0, 1, 0, 1]
    assert [updated(floored, step, weight).dropped for step in (15, 30)] == [0, 0]


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_equal_fan_in(grow: str) -> None:
    topology, weight = topology_of(pattern="fan_in", grow=grow)
    gradient = torch.arange(96.0).view(8, 12)
    for step in (15, 30, 45):
        before = topology.active.clone()
        updated(topology, step, weight, gradient)
        assert topology.active.view(8, 12).sum(1).tolist() == 8 * [3]
        if grow == "gradient":
            grown = (topology.births == step).view(8, 12)
            rest = gradient.masked_fill(before.view(8, 12) | grown, -1.0).amax(1)
            assert (gradient.masked_fill(~grown, torch.inf).amin(1) > rest).all()


@pytest.mark.parametrize("block", ["1", "4", "2x3"])
def test_permuted_blocks(block: str) -> None:
    plain, permuted = (topology_of(block=block, permuted=each)[0] for each in (False, True))
    numbers = torch.arange(plain.active.numel())
    regular, mixed = plain.grid.spread(numbers), permuted.grid.spread(numbers)
    assert not torch.equal(regular, mixed) and torch.equal(regular.flatten().bincount(), mixed.flatten().bincount())
    for rows in (mixed, mixed.T):  # an order of rows and one of columns: whole rows keep their blocks together
        assert len({tuple(sorted(row.tolist())) for row in rows}) == len({tuple(sorted(r.tolist())) for r in regular})
        regular = regular.T
    assert torch.equal(permuted.grid.means(mixed.float()), numbers.float())


def test_drop_rules() -> None:
    weight, gradient = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9.0, 1.0, 9.0, 1.0]])
    moments, births = torch.tensor([[5.0, 4.0, 1.0, 6.0]]), torch.tensor([0, 0, 0, 85])
    for drop, first in {"magnitude": 0, "saliency": 1, "momentum": 2, "relative": 0}.items():
        case = replace(RUN, **ZETA, drop=drop)
        grid = Grid.of(case, "w", weight.shape)
        topology = Topology(case, "w", grid, torch.ones(4, dtype=torch.bool), births)
        ages = 100 - births
        scores = topology._drop_scores(ages, Reading(weight, moments, gradient))
        assert int(scores.argmin()) == first
    assert scores.tolist() == pytest.approx([1.0, 2.0, 3.0, 4.0 / (15 / 60)])


def test_gradients_are_summed_over_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(RUN, every=4, steps=16, window=2)
    kinds = [replace(case, grow="gradient"), replace(case, grow="momentum"), case]
    replicas = Replicas(kinds, eager=True)
    seen: list[dict[str, torch.Tensor]] = []
    gradients = replicas._gradients

    def remember(tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses, grads = gradients(tokens)
        seen.append(grads)
        return losses, grads

    monkeypatch.setattr(replicas, "_gradients", remember)
    monkeypatch.setattr(replicas, "_update", lambda index, step: None)  # it would use them up
    name = "model.layers.0.mlp.up_proj.weight"
    for step in range(3):
        replicas.advance(step)
    assert replicas._summed.keys() == {(i, each) for i in (0, 1) for each in replicas.topologies[i]}
    assert torch.equal(replicas._summed[0, name], seen[2][name][0])
    replicas.advance(3)
    assert torch.allclose(replicas._summed[0, name], seen[2][name][0] + seen[3][name][0])
    assert torch.allclose(replicas._summed[1, name], 0.9 * seen[2][name][1] + seen[3][name][1])
