"""AdamW's update in plain torch on 8-bit moments gives the same bits as the definition written entry by entry."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout
from smet_compile.ops import CompactWeight, plain
from smet_compile.ops.updates import unflatten
from tests.ops.code_definition import Coded
from tests.support.snapshots import same_bits
from tests.support.updates import PLAIN as NO_TOPOLOGY
from tests.support.updates import after_gradient, settings

OPTIONS: dict[str, Any] = {
    "density_rate": 2.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "warmup_steps": 4,
}  # fmt: skip
LAYOUTS = {
    "singles": Layout.of((57, 83), (1, 1)),
    "singles_of_a_stack": Layout.of((3, 37, 41), (1, 1)),
    "few_singles": Layout.of((3, 5), (1, 1)),
    "runs": Layout.of((48, 113), (1, 8)),
    "runs_that_fill_no_group": Layout.of((48, 110), (1, 24)),
    "long_runs": Layout.of((5, 2500), (1, 1100)),
    "runs_of_a_column": Layout.of((113, 48), (8, 1)),
    "tiles": Layout.of((37, 29), (8, 8)),
    "tiles_of_a_stack": Layout.of((3, 21, 13), (4, 6)),
}
PLAIN = {"matrix": (7, 411), "vector": (5,), "scalar": (), "transposed": (70, 40), "shard": (3, 700)}
FIRST_PLACES = {"shard": 2**31 - 701}
"""The positions in a whole parameter of the first entries of plain ones; 0 for the others."""


@dataclass
class Case:
    """Holds the op's arguments, and the same entry by entry. The second group of larger weights has no active block."""

    values: Tensor
    state: list[Any]
    place: tuple[Any, ...]
    births: Tensor | None
    generation: Tensor | None
    coded: Coded
    first_place: int = 0

    def step(self, grad: Tensor, seed: int | None) -> int:
        """Makes a step of both, and returns the number of blocks that the op skipped."""
        num_skipped, step = self.state[3:]
        before = int(num_skipped)
        self.update(grad, torch.tensor(0.1, dtype=torch.float64), seed)
        ages = torch.full_like(self.coded.values, int(step))
        if self.births is not None and self.generation is not None:
            born = self.births[self.generation.long()].view(-1, *[1] * (grad.dim() - 1))
            ages = (step - born).expand(grad.shape).reshape(-1)
        lr = {"lr": torch.tensor(0.1, dtype=torch.float64)}
        skipped = self.coded.step(grad.reshape(-1), ages, int(step), seed, OPTIONS | lr)
        assert int(num_skipped) - before == skipped
        return skipped

    def update(self, grad: Tensor, lr: Tensor, seed: int | None) -> None:
        """Makes the step in plain torch."""
        options = tuple(OPTIONS[name] for name in ("beta1", "beta2", "eps", "weight_decay"))
        numbers = settings(OPTIONS["density_rate"], options, OPTIONS["warmup_steps"], seed)
        numbers = numbers._replace(first_place=self.first_place)
        rest = after_gradient(self.state, lr, (self.generation, self.births), self.place, numbers)
        plain.update_all([unflatten(self.values, grad, rest)])

    def assert_same(self) -> None:
        for actual, expected in (
            (self.values, self.coded.values),
            (self.state[0], self.coded.codes[0]),
            (self.state[1], self.coded.codes[1]),
        ):
            assert same_bits(actual.reshape(-1), expected)
        assert same_bits(self.state[2], self.coded.scales)


def compact(layout: Layout) -> Case:
    mask = torch.rand(layout.num_blocks) < 0.4
    if layout.num_groups > 3:
        mask[layout.blocks_per_group : 2 * layout.blocks_per_group] = False
    mask[-1] = True
    weight = CompactWeight(layout, mask, int(mask.sum()))
    values = weight.right_inverse(torch.randn(layout.shape))
    blocks = mask.nonzero().squeeze(1)
    size = values[0].numel()
    place = [(block, place) for block in blocks.tolist() for place in range(size)]
    if layout.single_weights:
        place = [divmod(block, 2**16) for block in blocks.tolist()]
    generation = torch.arange(len(values)) % 2
    return Case(
        values,
        [*new_moments(values), torch.full((2, layout.num_groups), 0.25), torch.tensor(0), torch.tensor(2)],
        (weight.topology, weight.lists, weight.layout.text),
        torch.tensor([0, 2]),
        generation.to(torch.uint8),
        Coded(
            values.reshape(-1).clone(),
            [torch.zeros(values.numel(), dtype=torch.uint8) for _ in range(2)],
            torch.full((2, layout.num_groups), 0.25),
            place,
            (blocks // layout.blocks_per_group).repeat_interleave(size).tolist(),
            blocks.repeat_interleave(size).tolist(),
        ),
    )


def plain_parameter(name: str) -> Case:
    shape, first_place = PLAIN[name], FIRST_PLACES.get(name, 0)
    values = torch.randn(shape[::-1]).t() if name == "transposed" else torch.randn(shape)
    groups = -(-values.numel() // 1024)
    entries = list(range(values.numel()))
    return Case(
        values,
        [*new_moments(values), torch.zeros(2, groups), torch.tensor(0), torch.tensor(2)],
        NO_TOPOLOGY,
        None,
        None,
        Coded(
            values.reshape(-1).clone(),
            [torch.zeros(values.numel(), dtype=torch.uint8) for _ in range(2)],
            torch.zeros(2, groups),
            [divmod(first_place + i, 2**16) for i in entries],
            [i // 1024 for i in entries],
            entries,
        ),
        first_place,
    )


def new_moments(values: Tensor) -> list[Tensor]:
    return [torch.zeros_like(values, dtype=torch.uint8) for _ in range(2)]


def case(name: str) -> Case:
    torch.manual_seed(0)
    return compact(LAYOUTS[name]) if name in LAYOUTS else plain_parameter(name)


def gradient(each: Case) -> Tensor:
    """Draws a gradient of many magnitudes, with some zeros, and zero where the values are zero: over the edge."""
    size = torch.rand(each.values.shape, dtype=torch.float64).mul(-30).exp2().float()
    grad = torch.randn(each.values.shape) * size * (torch.rand(each.values.shape) < 0.9)
    return torch.where(each.values == 0, 0.0, grad)


every_case = pytest.mark.parametrize("name", [*LAYOUTS, *PLAIN])
seeds = pytest.mark.parametrize("seed", [None, 7], ids=["nearest", "noise"])


@seeds
@every_case
def test_equals_the_definition(name: str, seed: int | None) -> None:
    each = case(name)
    for _ in range(3):
        each.step(gradient(each), seed)
    each.assert_same()
    assert each.state[0].any() and each.state[1].any()


@seeds
@every_case
def test_gradients_that_are_not_finite(name: str, seed: int | None) -> None:
    """A group in which no gradient is finite stays bit for bit; in other groups the scale is that of all blocks."""
    each = case(name)
    each.step(gradient(each), seed)
    grad = gradient(each)
    group = torch.tensor(each.coded.group).view(each.values.shape)
    whole = group == group.reshape(-1)[0]
    grad[whole] = torch.nan
    bad = torch.rand(len(grad)) < 0.3 if grad.dim() else torch.tensor(False)
    grad[bad] = torch.inf
    before = [t.clone() for t in (each.values, *each.state[:3])]
    assert each.step(grad, seed) > 0
    each.assert_same()
    for now, old in zip((each.values, *each.state[:2]), before[:3], strict=True):
        assert torch.equal(now[whole], old[whole])
    first = each.coded.group[0]
    assert torch.equal(each.state[2][:, first], before[3][:, first])
    if each.state[2].shape[1] > 1:
        assert not torch.equal(each.values, before[0])


@pytest.mark.parametrize("at_once", [1, 1500])
@every_case
def test_groups_are_never_cut(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = case(name), case(name)
    grads = [gradient(whole) for _ in range(2)]
    for each, size in ((whole, 10**9), (parts, at_once)):
        monkeypatch.setattr(plain, "_WEIGHTS_AT_ONCE", size)
        monkeypatch.setattr(plain, "_WEIGHTS_IN_CACHE", size)
        for grad in grads:
            each.update(grad, torch.tensor(0.1), 3)
    for a, b in zip([whole.values, *whole.state], [parts.values, *parts.state], strict=True):
        assert same_bits(a, b)


@every_case
def test_what_hangs_over_the_edge_is_zero_and_scales_of_empty_groups_stay(name: str) -> None:
    each = case(name)
    over = each.values == 0
    each.step(gradient(each), 7)
    assert not each.values[over].any() and not each.state[0][over].any() and not each.state[1][over].any()
    empty = sorted(set(range(each.state[2].shape[1])) - set(each.coded.group))
    assert bool((each.state[2][:, empty] == 0.25).all())
    assert bool(empty) == (name in LAYOUTS and name != "few_singles")


def test_squares_beyond_fp32_are_kept_as_its_largest_number() -> None:
    each = case("few_singles")
    grad = gradient(each)
    grad[1] = 1e25
    each.step(grad, None)
    assert each.state[2][1, 0] == torch.finfo(torch.float32).max and each.state[1][1] == 255
    each.step(gradient(each), None)
    assert bool(each.values.isfinite().all()) and bool(each.state[2].isfinite().all())


def test_a_copy_steps_alike() -> None:
    each = case("tiles")
    other = copy.deepcopy(each)
    grad = gradient(each)
    each.step(grad, 7), other.step(grad, 7)
    assert same_bits(each.state[0], other.state[0])
    each.step(grad, 8), other.step(grad, 9)
    assert not same_bits(each.state[0], other.state[0])
