"""Patterns keep every group's budget through any number of updates, and the best blocks win within it."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from smet_compile.format import Layout, TopologyChange, patterns, positions_of, sample_evenly, sample_positions

SIDES = st.integers(1, 9)
PATTERNS_BY_GROUP = ("1:2", "2:4", "3:4", "1:5")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(positions: Tensor, layout: Layout) -> Tensor:
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool)
    mask[positions] = True
    assert int(mask.sum()) == positions.numel(), "positions are distinct"
    return mask


def per_group(mask: Tensor, size: int) -> Tensor:
    return mask.view(-1, size).sum(1)


@st.composite
def first_masks(draw: st.DrawFn) -> tuple[str | None, Layout, Tensor]:
    """Draws a pattern, a layout that it divides, and a mask that it allows."""
    pattern = draw(st.sampled_from([None, patterns.FAN_IN, *PATTERNS_BY_GROUP]))
    ratio = patterns.n_of_m(pattern)
    if ratio is None:
        block = draw(st.sampled_from([(1, 1), (1, 3), (3, 1), (2, 2)]))
        layout = Layout.of((draw(st.integers(1, 2)), draw(SIDES) * block[0], draw(SIDES) * block[1]), block)
        count = draw(st.integers(1, layout.num_blocks))
    else:
        layout = Layout.of((draw(SIDES), draw(st.integers(1, 3)) * ratio[1]), (1, 1))
        count = layout.num_blocks * ratio[0] // ratio[1]
    seed = generator(draw(st.integers(0, 99)))
    return pattern, layout, mask_of(patterns.sample(pattern, layout, count, seed), layout)


def score_lists(size: int) -> st.SearchStrategy[list[float]]:
    """Makes scores with many ties, and with infinite ones."""
    return st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0, torch.inf]), min_size=size, max_size=size)


@given(first_masks(), st.data())
def test_another_number_of_blocks_keeps_the_pattern(
    first: tuple[str | None, Layout, Tensor], data: st.DataObject
) -> None:
    """Fewer blocks are a part of those before. More contain them, where the rows that have any can hold them all."""
    pattern, layout, mask = first
    if patterns.n_of_m(pattern) is not None:
        return
    size, num_active = patterns.group_size(pattern, layout), data.draw(st.integers(1, layout.num_blocks))
    order = torch.randperm(layout.num_blocks, generator=generator(data.draw(st.integers(0, 99))))
    ranks = order + layout.num_blocks * mask
    resized = [mask_of(patterns.select_resized(ranks, mask, num_active, size), layout)]
    has_room = patterns.has_room(mask, num_active, size)
    if num_active >= int(mask.sum()) and has_room:
        count = num_active - int(mask.sum())
        more = patterns.grow_more_random(layout, mask, count, size, generator(1))
        assert not bool(mask[more].any())
        resized.append(mask | mask_of(more, layout))
    for after in resized:
        assert int(after.sum()) == num_active
        assert patterns.mask_error(after, pattern, layout) is None
        if num_active <= int(mask.sum()):
            assert not bool((after & ~mask).any())
        elif has_room:
            assert bool(after[mask].all())
    if pattern is None and num_active < layout.num_blocks:
        assert ranks[resized[0]].min() > ranks[~resized[0]].max()


@given(first_masks(), st.data())
def test_budgets_hold_after_any_updates(first: tuple[str | None, Layout, Tensor], data: st.DataObject) -> None:
    pattern, layout, mask = first
    size, num_active = patterns.group_size(pattern, layout), int(mask.sum())
    budgets = per_group(mask, size)
    for round in range(data.draw(st.integers(1, 4))):
        scores_N = torch.tensor(data.draw(score_lists(num_active)))
        protected_N = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_active, max_size=num_active)))
        count = data.draw(st.integers(0, num_active))
        protected = torch.zeros_like(mask).index_fill_(0, positions_of(mask)[protected_N], True)
        dropped = patterns.drop_smallest(scores_N, mask, count, size, protected)
        if data.draw(st.booleans()):
            grown = patterns.grow_random(layout, mask, dropped, size, generator(round))
        else:
            grown = patterns.grow_largest(torch.tensor(data.draw(score_lists(mask.numel()))), mask, dropped, size)
        after = mask & ~mask_of(dropped, layout) | mask_of(grown, layout)
        unprotected = mask.clone()
        unprotected[positions_of(mask)[protected_N]] = False
        possible = int(per_group(unprotected, size).minimum(per_group(~mask, size)).sum())
        assert dropped.numel() == grown.numel() == min(count, possible)
        assert unprotected[dropped].all() and not mask[grown].any()
        assert torch.equal(per_group(after, size), budgets)
        patterns.check_mask("weight", after, pattern, layout)
        check_survivors(mask, after)
        mask = after


def check_survivors(before: Tensor, after: Tensor) -> None:
    values = nn.Parameter(positions_of(before).double() + 1)
    moved = TopologyChange.between(values, before, after).remap_(values.detach().clone())
    expected = torch.where(before, torch.arange(1, before.numel() + 1).double(), 0)[after]
    assert torch.equal(moved, expected)


@given(first_masks(), st.data())
def test_what_is_dropped_has_the_least_scores_possible(
    first: tuple[str | None, Layout, Tensor], data: st.DataObject
) -> None:
    pattern, layout, mask = first
    size, positions = patterns.group_size(pattern, layout), positions_of(mask)
    scores_N = torch.randperm(positions.numel(), generator=generator(data.draw(st.integers(0, 99))))
    count = data.draw(st.integers(0, positions.numel()))
    free, greedy = per_group(~mask, size).tolist(), set()
    for position in positions[scores_N.argsort()].tolist():
        if len(greedy) < count and free[position // size] > 0:
            free[position // size] -= 1
            greedy.add(position)
    assert set(patterns.drop_smallest(scores_N, mask, count, size).tolist()) == greedy


@given(first_masks(), st.integers(0, 99))
def test_the_best_grow_in_the_groups_that_lost_some(first: tuple[str | None, Layout, Tensor], seed: int) -> None:
    pattern, layout, mask = first
    size = patterns.group_size(pattern, layout)
    scores = torch.randperm(layout.num_blocks, generator=generator(seed))
    dropped = patterns.drop_smallest(scores[mask], mask, int(mask.sum()) // 2, size)
    expected = set[int]()
    for group, lost in enumerate(per_group(mask_of(dropped, layout), size).tolist()):
        inactive = [i for i in range(group * size, group * size + size) if not mask[i]]
        expected.update(sorted(inactive, key=lambda i: -int(scores[i]))[:lost])
    assert set(patterns.grow_largest(scores, mask, dropped, size).tolist()) == expected


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 4)])
def test_the_free_pattern_draws_as_ever(block: tuple[int, int]) -> None:
    """Runs of earlier versions are reproduced: first topologies and random growth."""
    layout = Layout.of((24, 20), block)
    empty, count = torch.zeros(layout.num_blocks, dtype=torch.bool), layout.num_blocks // 4
    drawn = patterns.sample(None, layout, count, generator(1))
    if layout.tiles:
        assert torch.equal(drawn, sample_evenly(empty, empty, layout, count, generator(1)))
    else:
        assert torch.equal(drawn, sample_positions(empty, count, generator(1)))
    mask = mask_of(drawn, layout)
    scores_N = torch.rand(count, generator=generator(2))
    dropped = patterns.drop_smallest(scores_N, mask, 3, layout.num_blocks)
    assert set(dropped.tolist()) == set(positions_of(mask)[scores_N.topk(3, largest=False).indices].tolist())
    grown = patterns.grow_random(layout, mask, dropped, layout.num_blocks, generator(3))
    if layout.tiles:
        kept = mask & ~mask_of(dropped, layout)
        assert torch.equal(grown, sample_evenly(kept, mask, layout, 3, generator(3)))
    else:
        assert torch.equal(grown, sample_positions(mask, 3, generator(3)))


def test_fan_in_of_tiles_fills_columns_evenly_too() -> None:
    layout = Layout.of((24, 40), (4, 4))
    mask = mask_of(patterns.sample("fan_in", layout, 21, generator(0)), layout)
    for dim in (0, 1):
        counts = mask.view(6, 10).sum(dim)
        assert counts.max() - counts.min() <= 1


def test_tiles_grow_in_the_emptiest_columns_of_their_row() -> None:
    layout, mask = Layout.of((8, 16), (4, 4)), torch.tensor([0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    for seed in range(9):
        assert patterns.grow_random(layout, mask, torch.tensor([4]), 4, generator(seed)).tolist() == [7]


def test_random_growth_in_groups_is_uniform() -> None:
    """Each inactive weight of a group is drawn as often as any other, within five standard deviations."""
    layout, tries, mask = Layout.of((1, 8), (1, 1)), 2000, torch.tensor([1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    times = torch.zeros(8)
    for seed in range(tries):
        times[patterns.grow_random(layout, mask, torch.tensor([0]), 4, generator(seed))] += 1
    assert times[[0, 4, 5, 6, 7]].sum() == 0
    assert (times[1:4] - tries / 3).abs().max() < 5 * (tries * 2 / 9) ** 0.5


@pytest.mark.parametrize(
    ("pattern", "count", "expected"),
    [(None, 4, [1, 2, 3, 6]), ("2:4", 4, [2, 3, 6, 5]), ("fan_in", 4, [2, 3, 6, 5]), ("fan_in", 5, [1, 2, 3, 6, 5])],
)
def test_the_best_first_topology(pattern: str | None, count: int, expected: list[int]) -> None:
    scores = torch.tensor([0.0, 7.0, 9.0, 8.0, 1.0, 2.0, 6.0, 0.5])
    layout = Layout.of((2, 4), (1, 1))
    assert sorted(patterns.select_largest(scores, pattern, layout, count).tolist()) == sorted(expected)


@given(first_masks(), st.integers(0, 99))
def test_a_first_topology_keeps_to_the_pattern(first: tuple[str | None, Layout, Tensor], seed: int) -> None:
    pattern, layout, mask = first
    scores, count = torch.rand(layout.num_blocks, generator=generator(seed)), int(mask.sum())
    for chosen in (mask, mask_of(patterns.select_largest(scores, pattern, layout, count), layout)):
        patterns.check_mask("weight", chosen, pattern, layout)
        counts_G = per_group(chosen, patterns.group_size(pattern, layout))
        assert int(counts_G.sum()) == count and counts_G.max() - counts_G.min() <= 1
    assert int(patterns.budgets(pattern, layout, count, generator(seed)).sum()) == count


@pytest.mark.parametrize("bad", ["", "free", "2:4 ", "4:4", "0:4", "5:4", "2:-4", "2/4", 24, True, ("2", "4")])
def test_a_bad_pattern(bad: object) -> None:
    with pytest.raises(ValueError, match=r'pattern: expected None, "fan_in" or "N:M" with 0 < N < M, got .*; pass'):
        patterns.check_pattern(bad)


def test_a_pattern_is_written_in_one_way() -> None:
    assert [patterns.check_pattern(text) for text in (None, "fan_in", "02:4")] == [None, "fan_in", "2:4"]


def test_a_layout_that_the_pattern_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r'up.weight: expected a number of columns that 4 divides .* "2:4", got 10; '):
        patterns.group_size("2:4", Layout.of((8, 10), (1, 1)), "up.weight")
    with pytest.raises(ValueError, match=r'single weights for the pattern "1:2", got blocks of \(2, 2\); pass block_'):
        patterns.group_size("1:2", Layout.of((8, 8), (2, 2)))
    with pytest.raises(ValueError, match=r'expected 16 active blocks for "2:4", got 15'):
        patterns.sample("2:4", Layout.of((4, 8), (1, 1)), 15, generator(0))


def test_a_mask_that_breaks_the_pattern() -> None:
    layout, mask = Layout.of((3, 4), (1, 1)), torch.zeros(12, dtype=torch.bool)
    mask[[0, 1, 4, 5, 6]] = True
    patterns.check_mask("up", mask, None, layout)
    patterns.check_mask("up", mask, "fan_in", layout)  # the last row is ablated
    with pytest.raises(ValueError, match=r'up: expected 2 active weights in every 4 along .* "2:4", got 0 to 3; pass'):
        patterns.check_mask("up", mask, "2:4", layout)
    mask[7] = True
    with pytest.raises(ValueError, match=r'up: expected rows whose active .* at most one .*"fan_in", got 2 to 4; pass'):
        patterns.check_mask("up", mask, "fan_in", layout)


def test_growth_to_budgets() -> None:
    kept = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    forbidden = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    scores = torch.tensor([0.0, 9.0, 1.0, 2.0, 0.0, 0.0, 3.0, 4.0])
    grown = patterns.grow_to_budgets(scores, kept, forbidden, torch.tensor([2, 3]), 4)
    assert sorted(grown.tolist()) == [3, 7]


def test_salient_blocks_are_kept_or_would_grow() -> None:
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    scores = torch.tensor([9.0, 9, 0, 3, 9, 9, 1, 2, 9, 9, 0, 5])
    assert patterns.count_salient(scores, mask, torch.tensor([0, 1, 4]), 4).tolist() == [1, 2, 3]
    assert patterns.count_salient(scores, mask, torch.tensor([], dtype=torch.int64), 4).tolist() == [2, 2, 2]


def test_rows_of_few_salient_blocks_are_ablated() -> None:
    """Rows have 2 of 8; with gamma .75 those of fewer than 1.5 salient blocks go, and the others share their blocks."""
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = True
    salient, nothing = torch.tensor([0, 3, 1, 2]), torch.tensor([], dtype=torch.int64)
    assert patterns.ablate(salient, mask.flatten(), nothing, 0.75, 8, generator(0)).tolist() == [0, 4, 0, 4]
    assert patterns.ablate(salient, mask.flatten(), nothing, 0.5, 8, generator(0)).sort().values.tolist() == [
        0,
        2,
        3,
        3,
    ]
    assert patterns.ablate(salient, mask.flatten(), nothing, 0.0, 8, generator(0)).tolist() == [2, 2, 2, 2]


def test_no_more_rows_are_ablated_than_the_others_can_make_up_for() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, :2] = True  # two rows hold all eight
    salient, nothing = torch.tensor([1, 0, 0, 0]), torch.tensor([], dtype=torch.int64)
    after = patterns.ablate(salient, mask.flatten(), nothing, 1.0, 4, generator(0)).tolist()
    assert after[0] == 4 and sorted(after) == [0, 0, 4, 4]
    dropped = torch.tensor([0])  # and it may not grow again at once, so that three rows are needed
    after = patterns.ablate(salient, mask.flatten(), dropped, 1.0, 4, generator(0)).tolist()
    assert sorted(after) == [0, 2, 3, 3]


@given(st.integers(1, 8), st.integers(2, 9), st.floats(0, 1), st.data())
def test_ablation_keeps_the_number_of_blocks(rows: int, cols: int, gamma: float, data: st.DataObject) -> None:
    layout = Layout.of((rows, cols), (1, 1))
    count = data.draw(st.integers(1, layout.num_blocks))
    mask = mask_of(patterns.sample("fan_in", layout, count, generator(data.draw(st.integers(0, 99)))), layout)
    for seed in range(3):
        dropped = patterns.drop_smallest(torch.rand(count), mask, data.draw(st.integers(0, count)), cols)
        salient = torch.tensor(data.draw(st.lists(st.integers(0, cols), min_size=rows, max_size=rows)))
        budgets_G = patterns.ablate(salient, mask, dropped, gamma, cols, generator(seed))
        before_G = per_group(mask, cols)
        gone = budgets_G == 0
        assert int(budgets_G.sum()) == count
        assert gone[before_G == 0].all()
        assert (salient[gone & (before_G > 0)] < gamma * before_G[gone & (before_G > 0)]).all()
        forbidden = mask_of(dropped, layout)
        kept = mask & ~forbidden & ~gone.repeat_interleave(cols)
        mask = kept | mask_of(
            patterns.grow_to_budgets(torch.rand(rows * cols), kept, forbidden, budgets_G, cols), layout
        )
        assert torch.equal(per_group(mask, cols), budgets_G)


def test_millions_of_blocks_take_no_time() -> None:
    layout = Layout.of((2048, 2048), (1, 1))
    start = time.process_time()
    mask = mask_of(patterns.sample("2:4", layout, layout.num_blocks // 2, generator(0)), layout)
    dropped = patterns.drop_smallest(torch.rand(layout.num_blocks // 2), mask, 400_000, 4)
    grown = patterns.grow_random(layout, mask, dropped, 4, generator(1))
    assert grown.numel() == 400_000
    assert time.process_time() - start < 10
