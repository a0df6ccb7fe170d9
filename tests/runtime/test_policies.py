"""Policies score blocks: the shipped ones by hand, a user's own, and what comes of bad scores."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import Site, find_sites
from smet_compile.runtime import update
from smet_compile.runtime.policies import DROP_POLICIES, GROW_POLICIES
from tests.runtime.setting import make
from tests.support.blocks import Grid
from tests.support.masked import dense_weight, fill_masked, masks_of
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import loss_on, train

Means = Callable[[nn.Module, torch.optim.Optimizer, dict[str, Tensor], str], Tensor]
BLOCKS = [1, (1, 4), (4, 4)]


def grads_of(plain: nn.Module, steps: range) -> dict[str, Tensor]:
    """Returns the sums of the dense gradients."""
    loss = sum((loss_on(plain, step) for step in steps), torch.zeros(()))
    names = ["0.weight", "3.weight"]
    return dict(zip(names, torch.autograd.grad(loss, [plain.get_parameter(name) for name in names]), strict=True))


def grid(model: nn.Module, name: str) -> Grid:
    layout = find_sites(model)[name].layout
    return Grid(layout.shape, layout.block_shape)


def dense_state(model: nn.Module, optimizer: Any, name: str, key: str) -> Tensor:
    site = find_sites(model)[name]
    compact = site.compact
    return torch.ops.smet.unpack(
        optimizer.state[site.values][key], compact.topology, compact.lists, site.layout.text, None, None, False
    )


EXPECTED: dict[str, Means] = {
    "magnitude": lambda m, o, g, n: grid(m, n).mean(dense_weight(m, n).abs()),
    "saliency": lambda m, o, g, n: grid(m, n).mean((dense_weight(m, n) * g[n]).abs()),
    "momentum": lambda m, o, g, n: grid(m, n).mean(dense_state(m, o, n, "exp_avg").abs()),
}


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.parametrize("drop", EXPECTED)
def test_drops_the_least_scores(drop: str, block_shape: Any) -> None:
    plain = two_layers()
    torch.manual_seed(0)
    model, optimizer, manager = make(block_shape=block_shape, every=1, drop=drop, drop_fraction=0.4)
    fill_masked(plain, model)
    grads = grads_of(plain, range(1))
    train(model, optimizer, steps=1)
    scores = {name: EXPECTED[drop](model, optimizer, grads, name).detach() for name in grads}
    before = masks_of(model)
    manager.step()
    for name, after in masks_of(model).items():
        dropped = before[name] & ~after
        assert dropped.any()
        assert scores[name][dropped].max() <= scores[name][before[name] & after].min() + 1e-7


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_young_blocks_may_be_small() -> None:
    scores: list[Tensor] = []

    def watch(site: Site, context: smet.TopologyContext) -> Tensor:
        scores.append(DROP_POLICIES["relative_magnitude"](site, context))
        share = (context.ages / (4 * context.every)).clamp(max=1)
        assert torch.equal(scores[-1], context.block_means(site.values) / share)
        return scores[-1]

    model, optimizer, manager = make(drop=watch)
    train(model, optimizer, manager, steps=9)
    assert len(scores) == 6
    model, optimizer, manager = make(drop="relative_magnitude", optimizer=plain_sgd)
    with pytest.raises(ValueError, match=r"0\.weight: expected an optimizer that keeps ages"):
        train(model, optimizer, manager, steps=3)
    model, optimizer, manager = make(drop="momentum", optimizer=plain_sgd)
    with pytest.raises(ValueError, match=r"0\.weight: expected an optimizer that keeps exp_avg or momentum_buffer"):
        train(model, optimizer, manager, steps=3)


def test_momentum_in_eight_bits_is_decoded() -> None:
    kept: dict[str, Tensor] = {}

    def watch(site: Site, context: smet.TopologyContext) -> Tensor:
        kept[site.name] = context.state("exp_avg").clone()
        return context.block_means(site.values)

    exact = {}
    for moment_dtype in (torch.float32, "int8"):
        torch.manual_seed(0)
        optimizer = partial(smet.ActiveAdamW, lr=1e-2, moment_dtype=moment_dtype)
        model, made, manager = make(block_shape=4, every=1, drop=watch, optimizer=optimizer)
        train(model, made, manager, steps=1)
        exact[moment_dtype] = dict(kept)
    for name, moment in exact[torch.float32].items():
        assert exact["int8"][name].dtype == torch.float32 and exact["int8"][name].shape == moment.shape
        torch.testing.assert_close(exact["int8"][name], moment, rtol=0.126, atol=float(moment.abs().max()) * 2**-16)


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_a_window_adds_up_the_gradients_of_its_steps(block_shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradients of all inactive blocks kept, those of the largest sum grow."""
    monkeypatch.setattr(update, "_KEPT_PER_GROWN", 1000)
    plain = two_layers()
    model, optimizer, manager = make(block_shape=block_shape, every=4, grow="gradient", window=3, density=0.4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    fill_masked(plain, model)
    grads, before = grads_of(plain, range(1, 4)), masks_of(model)
    train(model, optimizer, manager, steps=4)
    assert manager.history[0].num_dropped
    for name, after in masks_of(model).items():
        grown = after & ~before[name]
        scores = grid(model, name).mean(grads[name].abs()).masked_fill(before[name], -1.0)
        assert set(grown.nonzero().flatten().tolist()) == set(scores.topk(int(grown.sum())).indices.tolist())


def test_momentum_growth_weighs_later_steps_more() -> None:
    seen: list[Tensor] = []

    @smet.needs_gradient(window=2, decay=0.25)
    def watch(site: Site, context: smet.TopologyContext) -> Tensor:
        seen.append(context.gradient)
        assert torch.equal(context.gradient_means(), context.block_means(context.gradient))
        return context.gradient_means()

    plain = two_layers()
    model, optimizer, manager = make(every=2, grow=watch, density=0.4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    fill_masked(plain, model)
    first, second = grads_of(plain, range(1)), grads_of(plain, range(1, 2))
    train(model, optimizer, manager, steps=2)
    for gradient, name in zip(seen, first, strict=True):
        both = 0.25 * first[name] + second[name]
        known = gradient != 0
        is_late = torch.isclose(gradient, second[name], rtol=1e-4, atol=1e-7)
        assert known.any() and torch.isclose(gradient, both, rtol=1e-4, atol=1e-7)[known & ~is_late].all()


RIGL = """
@smet.needs_gradient
def largest_gradient(site, context):
    return context.block_means(context.gradient)


def smallest_weight(site, context):
    return context.block_means(site.values)
"""


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_rigl_from_scratch_is_rigl(block_shape: Any) -> None:
    written: dict[str, Any] = {"smet": smet}
    exec(RIGL, written)
    runs = []
    for options in (
        {"grow": "gradient"},
        {"grow": written["largest_gradient"], "drop": written["smallest_weight"]},
    ):
        torch.manual_seed(0)
        model, optimizer, manager = make(block_shape=block_shape, **options)
        train(model, optimizer, manager, steps=10)
        assert len(manager.history) == 3
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


def test_a_mixture_grows_its_shares() -> None:
    plain = two_layers()
    mixed = smet.mix_growth({"gradient": 0.5, "random": 0.5})
    model, optimizer, manager = make(every=1, grow=mixed, density=0.3, drop_fraction=0.5)
    fill_masked(plain, model)
    grads, before = grads_of(plain, range(1)), masks_of(model)
    train(model, optimizer, manager, steps=1)
    for name, after in masks_of(model).items():
        grown = after & ~before[name]
        best = grads[name].abs().flatten().masked_fill(before[name], -1).argsort(descending=True)
        half = round(0.5 * int(grown.sum()))
        assert grown[best[:half]].all() and not grown[best[: int(grown.sum())]].all()
    assert manager.settings["grow"].endswith("mix_growth(gradient 0.5, random 0.5)")


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ({"gradient": 0.5, "random": 0.6}, "add up to 1, got 1.1"),
        ({"gradient": 1.0}, "two or more"),
        ({"gradient": 0.5, "magnitude": 0.5}, "expected one of random, gradient, momentum or a function"),
        (["gradient", "random"], "expected a dict"),
        ({"gradient": 1.5, "random": -0.5}, "shares: expected"),
    ],
)
def test_bad_mixtures(shares: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        smet.mix_growth(shares)


WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]


@pytest.mark.parametrize("pattern", [None, "fan_in"])
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_scores_may_be_truth_values_and_whole_numbers(dtype: torch.dtype, mixes: bool, pattern: str | None) -> None:
    """They drop and grow the same blocks as equal scores in fp64."""

    def scores(wanted: torch.dtype, site: Site, context: smet.TopologyContext) -> Tensor:
        torch.manual_seed(1)
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        least, most = max(least, -(2**53)), min(most, 2**53)
        near_the_most = most - torch.randint(min(100, most + 1), context.scores_shape)
        return torch.where(torch.rand(context.scores_shape) < 0.5, least, near_the_most).to(dtype).to(wanted)

    masks = []
    for wanted in (dtype, torch.float64):
        policy = partial(scores, wanted)
        torch.manual_seed(0)
        grow = smet.mix_growth({policy: 0.5, "random": 0.5}) if mixes else policy
        model = smet.sparsify(two_layers(), density=0.3, pattern=pattern)
        optimizer = smet.ActiveAdamW(model, lr=1e-2)
        manager = smet.TopologyManager(
            model, optimizer, total_steps=40, every=1, drop=policy, grow=grow, drop_fraction=0.5
        )
        train(model, optimizer, manager, steps=3)
        assert manager.history[-1].num_dropped
        masks.append(masks_of(model))
    assert_same(*masks)


def raises(site: Site, context: smet.TopologyContext) -> Tensor:
    raise ArithmeticError("my own")


BAD: dict[str, tuple[Any, str]] = {
    "shape": (lambda site, context: torch.zeros(3), r"expected scores of shape \(\d+,\)"),
    "nan": (lambda site, context: torch.full(context.scores_shape, torch.nan), "NaN"),
    "no tensor": (lambda site, context: 3, "got 3"),
    "raises": (raises, "my own"),
    "gradient": (lambda site, context: context.gradient, "needs_gradient"),
    "unlike": (lambda site, context: context.block_means(torch.zeros(5)), r"like the values.*got \(5,\)"),
}


@pytest.mark.parametrize("half", ["drop", "grow"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_policy_leaves_everything_as_it_was(kind: str, half: str) -> None:
    """It is asked for both weights before one changes; only the second has an error here."""
    policy, match = BAD[kind]
    good = (DROP_POLICIES if half == "drop" else GROW_POLICIES)["magnitude" if half == "drop" else "random"]

    def late(site: Site, context: smet.TopologyContext) -> Tensor:
        return policy(site, context) if site.name == "3.weight" else good(site, context)

    model, optimizer, manager = make(**{half: late})
    train(model, optimizer, manager, steps=2)
    train(model, optimizer, first=2, steps=1)
    with Unchanged(model, optimizer, manager), pytest.raises((ValueError, ArithmeticError), match=match):
        manager.step()
    assert manager.num_steps == 2 and manager.history == []


def test_a_grow_policy_has_no_gradient_of_active_blocks() -> None:
    @smet.needs_gradient
    def wrong(site: Site, context: smet.TopologyContext) -> Tensor:
        return context.active_gradient

    model, optimizer, manager = make(grow=wrong)
    with pytest.raises(ValueError, match="expected a drop policy to read active_gradient"):
        train(model, optimizer, manager, steps=3)


@pytest.mark.parametrize(("option", "value"), [("drop", "weights"), ("grow", 3), ("schedule", "cosin"), ("window", 0)])
def test_bad_names(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}: expected"):
        make(**{option: value})


@pytest.mark.parametrize("options", [{"drop": "saliency"}, {"grow": "momentum"}, {"drop": "random"}], ids=str)
def test_runs_resume_bit_for_bit(options: dict[str, Any], tmp_path: Any) -> None:
    """Step 10 lies within the window of ten steps before the update of step 12."""
    torch.manual_seed(0)
    objects = make(every=12, **options)
    train(*objects, steps=10)
    smet.save_checkpoint(tmp_path / "a", *objects)
    other = make(every=12, **options)
    smet.load_checkpoint(tmp_path / "a", *other)
    for run in (objects, other):
        train(*run, first=10, steps=16)
        assert len(run[2].history) == 2
    assert_same(snapshot(*objects[:2]), snapshot(*other[:2]))


def test_what_was_collected_is_checked(tmp_path: Any) -> None:
    model, optimizer, manager = make(every=12, grow="momentum")
    train(model, optimizer, manager, steps=10)
    state = manager.state_dict()
    for change, match in (
        (lambda s: s["collected"]["0.weight"]["positions"].fill_(3), "different blocks"),
        (lambda s: s["collected"]["0.weight"].update(sums=torch.zeros(2)), "sums"),
        (lambda s: s["collected"].update(other={}), "other"),
        (lambda s: s["owed"].update({"0.weight": 2.0}), "owed"),
        (lambda s: s["trace"]["grown"].update({"0.weight": [[0, torch.zeros(30, dtype=torch.uint8)]]}), "grown"),
    ):
        bad = copy.deepcopy(state)
        change(bad)
        with Unchanged(model, optimizer, manager), pytest.raises(ValueError, match=match):
            manager.load_state_dict(bad)
