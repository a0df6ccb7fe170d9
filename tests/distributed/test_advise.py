"""Layouts are compared by bytes and seconds that can be worked out by hand, and by those of models on real ranks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import smet_compile as smet
from smet_compile.distributed import Card, Item, SwitchPlan, advise, describe_model, plan_switch
from smet_compile.distributed.sizes import switch_between
from smet_compile.ops import find_sites
from smet_compile.plan.card import seconds_text
from smet_compile.plan.mesh import check_mesh
from tests.shards.parallel import SLABS, cut_layers
from tests.shards.setting import Net, shard
from tests.support.ranks import processes

CARD = Card(memory=1e6, operations=100, bandwidth=1000, link=100)
TP_PLAN = {"0": "colwise", "1": "rowwise"}
DP, TP = {"dp": 2}, {"dp": 1, "tp": 2}
Layout = tuple[str, Any]
"""Kind and ranks, as in test_switch.py."""
FOUR, TWO, ONE = ("fsdp", [0, 1, 2, 3]), ("fsdp", [0, 1]), ("fsdp", [0])
COPIES, PARTS, MORE_PARTS = ("hsdp", [[0, 1], [2, 3]]), ("tp", [[0, 1], [2, 3]]), ("tp", [[0, 1, 2, 3]])
SIZES = {
    str(FOUR): {"dp": 4},
    str(TWO): {"dp": 2},
    str(ONE): {"dp": 1},
    str(COPIES): {"dp": 2, "replicate": 2},
    str(PARTS): {"dp": 2, "tp": 2},
    str(MORE_PARTS): {"dp": 1, "tp": 4},
}
WIDTH = 320
"""The width of a model whose ranks hold many rows of blocks."""
KINDS: dict[str, Any] = {"dense": None, "single weights": 1, "tiles": 4, "runs": (1, 4)}
SAME_COLUMNS = [(FOUR, TWO), (TWO, FOUR), (FOUR, COPIES), (COPIES, ONE), (ONE, FOUR), (PARTS, PARTS)]
OTHER_COLUMNS = [(FOUR, PARTS), (PARTS, MORE_PARTS), (MORE_PARTS, TWO), (COPIES, PARTS)]


def two_layers() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))


def advised(meshes: Any = (DP, TP), **options: Any) -> Any:
    settings: dict[str, Any] = {
        "batch": 4,
        "card": CARD,
        "compiled": False,
        "tp_plan": TP_PLAN,
        "inputs": lambda batch, sequence: torch.zeros(batch, 8),
        "loss_fn": lambda model, x: model(x).sum(),
    }
    settings |= {"model": two_layers(), "meshes": meshes} | options
    return advise(**settings)


def by_mesh(advice: Any) -> dict[str, Any]:
    return {str(option.mesh): option for option in advice.options}


def test_shards_by_hand() -> None:
    """Two weights of 512 bytes; a rank reads 2 of 4 rows. The first product has no gradient of its input."""
    option = by_mesh(advised())["dp=2"]
    assert option.batch == 2
    assert option.step.products == 2 * 2 * 128 * (2 + 2 + 1) / 100
    assert option.step.update == (3 * 512 + 2 * 1024) / 1000  # half of the weights, and of two moments each
    assert option.step.links == (512 + 512) / 100  # half of the weights is gathered, half of the gradients scattered
    counts, activations = 2 * 16, 2 * 16 * 4 + 4  # what the second layer reads, and the loss
    assert option.rank_bytes == (512 + 512 + 1024 + counts) + (1024 + 1024) + activations


def test_parts_by_hand() -> None:
    option = by_mesh(advised())["dp=1,tp=2"]
    assert option.batch == 4
    assert option.step.products == 2 * 4 * 64 * (2 + 2 + 1) / 100
    assert option.step.update == (3 * 512 + 2 * 1024) / 1000
    assert option.step.links == 4 * 8 * 4 / 100  # two ranks add up what the second layer returns
    counts, activations = 2 * 16, 4 * 8 * 4 + 4  # half of the columns that the second layer reads
    assert option.rank_bytes == 512 + 512 + 1024 + counts + activations


def test_weights_are_read_where_there_is_little_to_compute() -> None:
    fast = Card(memory=1e6, operations=1e9, bandwidth=1000, link=100)
    found = by_mesh(advised(card=fast))
    assert found["dp=2"].step.products == 3 * 1024 / 1000
    assert found["dp=1,tp=2"].step.products == 3 * 512 / 1000


def test_a_switch_by_hand() -> None:
    """The rows of the first layer stay; of the second, each rank sends 4 rows of 8 columns, with two moments."""
    option = by_mesh(advised(now=DP, remaining_steps=10))["dp=1,tp=2"]
    assert option.moved == 2 * 4 * 8 * 4 * 3
    assert option.switch_seconds == 4 * 8 * 4 * 3 / 100
    gain = (512 + 512) / 100 - 4 * 8 * 4 / 100
    assert option.gain == pytest.approx(gain)
    assert option.saved == pytest.approx(10 * gain - option.switch_seconds)
    assert option.return_ratio == pytest.approx(10 * gain / option.switch_seconds)


def test_a_switch_of_a_compact_weight_by_hand() -> None:
    """Half of 128 single weights: from rank 0 all go to both halves, of values, two moments and an age each."""
    advice = advised([{"dp": 2}], now={"dp": 1}, density=0.5, batch=2)
    assert by_mesh(advice)["dp=2"].moved == 2 * 32 * (3 * 4 + 1)


def test_recommendations() -> None:
    much, little = (advised(now=DP, remaining_steps=steps) for steps in (10, 1))
    assert much.best is by_mesh(much)["dp=1,tp=2"] and much.best.pays
    assert much.recommendation() == (
        "Switch to dp=1,tp=2: the switch takes 3.84 s and each step gains 8.96 s, so 10 steps end 85.8 s sooner."
    )
    assert str(much).startswith("Sequential: density 1; batch 4; float32, moments float32; eager; card 1.00 MB\n")
    assert little.best is by_mesh(little)["dp=1,tp=2"]
    back = advised(now=TP, remaining_steps=1000)
    assert back.best is back.now and not by_mesh(back)["dp=2"].pays
    assert back.recommendation() == "Stay in dp=1,tp=2: of those that fit, no switch gains more than it takes."
    assert advised().recommendation() == "Train in dp=1,tp=2: 30.5 s a step, the fastest layout that fits."
    assert [str(option.mesh) for option in advised().options] == ["dp=1,tp=2", "dp=2"]


def test_a_switch_that_takes_longer_than_it_gains_is_not_made() -> None:
    slow = Card(memory=1e6, operations=100, bandwidth=1000, link=1, near=(2, 100))
    advice = advised([DP, {"dp": 1, "tp": 2}, {"dp": 3}], batch=6, card=slow, now=TP, remaining_steps=1)
    option = by_mesh(advice)["dp=3"]
    assert option.switch_seconds is not None and option.switch_seconds > 100  # three ranks are in two machines
    assert advice.best is advice.now and not option.pays and option.return_ratio < 1


def test_what_does_not_fit_is_not_recommended() -> None:
    small = Card(memory=3000, operations=100, bandwidth=1000, link=100)
    advice = advised(card=small, now=DP)
    assert not by_mesh(advice)["dp=2"].fits and advice.best is by_mesh(advice)["dp=1,tp=2"]
    none = advised(card=Card(memory=2000, operations=100, bandwidth=1000, link=100))
    assert none.best is None
    assert none.recommendation() == "None of these layouts fits; dp=1,tp=2 needs least, 2.21 kB on a rank."
    must = advised(card=small, now=DP, remaining_steps=1)
    assert must.best is by_mesh(must)["dp=1,tp=2"] and must.recommendation().startswith("Switch to dp=1,tp=2: ")
    slower = advised(card=Card(4000, 100, 1000, link=100), now=DP, remaining_steps=1, batch=40)
    assert by_mesh(slower)["dp=1,tp=2"].gain < 0
    assert slower.recommendation() == "Switch to dp=1,tp=2: the present layout does not fit."


def test_rings_share_the_links_of_a_machine() -> None:
    card = Card("1GB", 1, 1, link=10, near=(4, 100))
    assert card.seconds_to_send(1000, 4) == 10  # in a machine
    assert card.seconds_to_send(1000, 8) == 25  # two machines, four links each
    assert card.seconds_to_send(1000, 2, stride=4) == 100  # one rank of each machine
    assert card.seconds_to_send(1000, 4, stride=2) == 50
    assert Card("1GB", 1, 1, link=10).seconds_to_send(1000, 2) == 100
    assert (card.link_among(4), card.link_among(5)) == (100, 10)


def test_seconds_are_printed_in_three_digits() -> None:
    assert [seconds_text(s) for s in (0, 4.2e-6, 0.0216, 0.9999, 12.34, 4321)] == [
        "0 us", "4.20 us", "21.6 ms", "1.00 s", "12.3 s", "4,321 s"
    ]  # fmt: skip


def test_products_in_32_bits_have_their_own_rate() -> None:
    card = Card(memory=1e6, operations=100, bandwidth=1e9, link=100, operations_32=10)
    seconds = [by_mesh(advised(card=card, dtype=dtype))["dp=2"].step.products for dtype in ("float32", "bfloat16")]
    assert seconds[0] == 10 * seconds[1]


def test_a_compact_model_is_compared_as_it_is() -> None:
    model = smet.sparsify(two_layers(), 0.25, slabs={"0": (2, 0), "1": (2, 1)})
    found = by_mesh(advised(model=model))
    assert found["dp=1,tp=2"].step.products == 4 * 2 * 16 * (2 + 2 + 1) / 100
    assert found["dp=2"].step.products == 2 * 2 * 32 * (2 + 2 + 1) / 100
    whole = smet.sparsify(two_layers(), 0.25)
    with pytest.raises(ValueError, match=r"meshes\[1\]: 0.weight: expected slabs along dimension 0"):
        advised(model=whole)


def test_heads_of_attention_are_shared_out_and_the_output_head_is_not() -> None:
    plan = smet.plan("nano", 1.0, batch=2, sequence=32, compiled=False)
    one, two = (plan.placement().work(check_mesh(mesh)) for mesh in ({"dp": 1}, {"dp": 1, "tp": 2}))
    of_head = 3 * 2 * (2 * 32) * 32 * 32_000
    angles = 2 * 2 * 32 * 16 // 2  # of positions; every rank makes them
    assert two.operations == pytest.approx((one.operations - of_head) / 2 + of_head, abs=angles)
    assert two.activations < one.activations


def some_net(block_shape: Any, width: int = 20, mesh: DeviceMesh | None = None) -> nn.Module:
    with torch.device("meta"):
        model = Net(width, hidden=48 * width // 20)
    if mesh is not None:
        cut_layers(model, mesh)
    if block_shape is None:
        return model
    return smet.sparsify(model, 0.3, block_shape=block_shape, exclude="head", slabs=SLABS)


def described(layout: Layout, block_shape: Any, width: int, rank: int) -> Any:
    """Describes a model as it lies in a layout; None on a rank that has no part in it."""
    kind, ranks = layout
    names = {"fsdp": ("dp",), "hsdp": ("replicate", "dp"), "tp": ("dp", "tp")}[kind]
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=names)
    if rank not in mesh.mesh.flatten().tolist():
        return None
    is_cut = kind == "tp"
    model = some_net(block_shape, width, mesh["tp"] if is_cut else None)
    return describe_model(shard(model, mesh=mesh["dp"] if is_cut else mesh), mesh)


def real_switches(
    rank: int, world: int, kind: str, pairs: list[tuple[Layout, Layout]], width: int = 20
) -> list[SwitchPlan]:
    """Plans switches between regions of real models, with the state that an optimizer has after a step."""
    model = some_net(KINDS[kind], width)
    if KINDS[kind] is None:
        model.to_empty(device="cpu")
    else:
        smet.materialize(model, seed=0)
    optimizer = smet.ActiveAdamW(model, 1e-3)
    model(torch.zeros(2, 5, dtype=torch.int64)).sum().backward()
    optimizer.step()
    bits = {name: site.compact.topology.clone() for name, site in find_sites(model).items()}
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    found = []
    for pair in pairs:
        old, new = (described(layout, KINDS[kind], width, rank) for layout in pair)
        if rank:
            continue
        items = []
        for (name, note), state in zip(old.items(), states, strict=True):
            places = note.placed(bits), new[name].placed(bits)
            items.append(Item(name, note.shape, note.dtype, *places))
            for key, value in state.items():
                if value.dim() and key not in ("births", "scales"):
                    items.append(Item(f"{name}/{key}", tuple(value.shape), value.dtype, *places))
        found.append(plan_switch(items))
    return found


def planned(kind: str, width: int = 20) -> smet.Plan:
    density = 1.0 if KINDS[kind] is None else None
    return smet.plan(
        some_net(KINDS[kind], width),
        density,
        batch=1,
        compiled=False,
        inputs=lambda batch, sequence: torch.zeros(batch, 5, dtype=torch.int64),
        loss_fn=lambda model, tokens: model(tokens).sum(),
        tp_plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"},
    )


def by_sizes(plan: smet.Plan, pair: tuple[Layout, Layout]) -> SwitchPlan:
    old, new = (check_mesh(SIZES[str(layout)]) for layout in pair)
    return switch_between(plan.placement(), old, new)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_tell_what_real_models_send(kind: str) -> None:
    pairs = SAME_COLUMNS + (OTHER_COLUMNS if kind == "dense" else [])
    plan = planned(kind)
    for pair, real in zip(pairs, processes.run(4, real_switches, kind, pairs)[0], strict=True):
        found = by_sizes(plan, pair)
        assert (found.sent, found.lower_bound) == (real.sent, real.lower_bound), pair
        assert (found.stored_before, found.stored_after) == (real.stored_before, real.stored_after), pair


@pytest.mark.parametrize("kind", ["single weights", "tiles", "runs"])
def test_sizes_tell_about_what_is_sent_where_columns_are_cut_anew(kind: str) -> None:
    plan, found_on_ranks = planned(kind, WIDTH), processes.run(4, real_switches, kind, OTHER_COLUMNS, WIDTH)[0]
    for pair, real in zip(OTHER_COLUMNS, found_on_ranks, strict=True):
        found = by_sizes(plan, pair)
        assert found.total_sent == pytest.approx(real.total_sent, rel=0.01), pair
        assert found.seconds(1) == pytest.approx(real.seconds(1), rel=0.02), pair


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_moved_is_what_the_planner_stores(kind: str) -> None:
    plan = planned(kind)
    for layout in (FOUR, COPIES, PARTS):
        cost = plan.on_mesh(SIZES[str(layout)]).sparse
        model, compact = some_net(KINDS[kind]), 0 if KINDS[kind] is None else 4
        not_moved = 16 * len(list(model.parameters())) + 256 * 8 * compact  # counts, and births of generations
        stored = max(by_sizes(plan, (layout, ONE)).stored_before.values())
        assert stored == cost.parameters + cost.moments + cost.stored["ages"] - not_moved


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "card": ({"card": "h1000"}, r"card: expected one of a100, h100, h200 or a Card, got 'h1000'"),
    "no meshes": ({"meshes": []}, r"meshes: expected a list of dicts, got \[\]"),
    "a dict": ({"meshes": {"dp": 2}}, r"meshes: expected a list of dicts, got \{'dp': 2\}"),
    "mesh": ({"meshes": [DP, {"pp": 2}]}, r"meshes\[1\]: expected 'dp'"),
    "size": ({"meshes": [{"dp": 0}]}, r"meshes\[0\]\['dp'\]: expected a whole number of at least 1, got 0"),
    "now": ({"now": {"tp": 2}}, r"now: expected 'dp'"),
    "sizes": ({"meshes": [DP, {"dp": 1, "tp": 3}]}, r"meshes\[1\]: 0.weight: expected rows that tp=3 divides, got 16"),
    "plan": ({"tp_plan": None}, r"tp_plan: expected one for Sequential"),
    "batch": ({"batch": 5}, r"batch: expected a number of sequences that the 2 readers of meshes\[0\] \(dp=2\) divide"),
    "no batch": ({"batch": 0}, r"batch: expected a whole number of at least 1, got 0"),
    "steps": ({"now": DP, "remaining_steps": 0}, r"remaining_steps: expected a whole number of at least 1"),
    "steps alone": ({"remaining_steps": 5}, r"remaining_steps: expected now= beside it"),
    "fits": ({"fits": "1GB"}, r"fits: expected none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        advised(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "memory: expected bytes"),
        ({"operations": 0}, "operations: expected a finite number above 0"),
        ({"link": "fast"}, "link: expected a finite number above 0"),
        ({"operations_32": -1}, "operations_32: expected a finite number above 0"),
        ({"near": 8}, r"near: expected \(cards in a machine, bytes a second between them\), got 8"),
        ({"near": (0, 1.0)}, r"near\[0\]: expected a whole number"),
    ],
)
def test_bad_cards(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Card(**({"memory": "1GB", "operations": 1, "bandwidth": 1, "link": 1} | options))
