"""Each layer gets its share of blocks: uniform is exact per site, er and erk meet the total exactly."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import smet_compile as smet
from smet_compile.format import Layout
from tests.support.blocks import round_half_up
from tests.support.states import Unchanged


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {row.name: (row.num_active, row.num_blocks) for row in smet.report(model).sites}


layer_sizes = st.lists(st.integers(2, 48), min_size=2, max_size=6)


def stack_of(sizes: list[int]) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])


@given(layer_sizes, st.floats(0.05, 0.95), st.sampled_from(["er", "erk"]))
def test_er_and_erk_meet_the_total(sizes: list[int], density: float, distribution: str) -> None:
    model = stack_of(sizes)
    total = sum(m.weight.numel() for m in model)
    num_layers = len(model)
    assume(max(round_half_up(density * total), num_layers) < total)
    smet.sparsify(model, density=density, distribution=distribution)
    sparse = sum(row.num_active for row in smet.report(model).sites)
    left_plain = sum(m.weight.numel() for m in model if not hasattr(m, "parametrizations"))
    expected = max(round_half_up(density * total), num_layers)
    assert sparse + left_plain == expected


@given(layer_sizes, st.floats(0.05, 0.95))
def test_uniform_is_exact_per_site(sizes: list[int], density: float) -> None:
    model = stack_of(sizes)
    assume(any(round_half_up(density * m.weight.numel()) < m.weight.numel() for m in model))
    smet.sparsify(model, density=density)
    for active, blocks in counts(model).values():
        assert active == max(1, round_half_up(density * blocks))


def test_er_gives_small_layers_more() -> None:
    """In er the density is proportional to (rows + cols) / (rows cols)."""
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 50), nn.Linear(50, 50))
    smet.sparsify(model, density=0.1, distribution="er")
    density = {row.name: row.density for row in smet.report(model).sites}
    scale = {"0.weight": 800 / 160_000, "1.weight": 450 / 20_000, "2.weight": 100 / 2500}
    factors = [density[name] / scale[name] for name in scale]
    num_blocks = {"0.weight": 160_000, "1.weight": 20_000, "2.weight": 2500}
    assert max(factors) - min(factors) <= max(1 / num_blocks[n] / scale[n] for n in scale) * 2


def test_erk_counts_the_kernel() -> None:
    """In erk the density is proportional to (out + in + kh + kw) / (out in kh kw) for a convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 1))
    smet.sparsify(model, density=0.1, include="*.weight", distribution="erk")
    rows = {row.name: row for row in smet.report(model).sites}
    scale = {"0.weight": (64 + 64 + 3 + 3) / (64 * 64 * 9), "1.weight": (64 + 128 + 1 + 1) / (64 * 128)}
    factors = [rows[name].density / scale[name] for name in scale]
    assert factors[0] == pytest.approx(factors[1], rel=0.01)
    assert sum(r.num_active for r in rows.values()) == round_half_up(0.1 * (64 * 64 * 9 + 64 * 128))


def test_layers_are_capped_at_full_density() -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 2), nn.Linear(2, 2))
    total = 200 * 200 + 400 + 4
    smet.sparsify(model, density=0.3, distribution="er")
    active = sum(row.num_active for row in smet.report(model).sites)
    plain = sum(m.weight.numel() for m in model if not hasattr(m, "parametrizations"))
    assert active + plain == round_half_up(0.3 * total)
    assert all(row.density <= 1 for row in smet.report(model).sites)


def test_rules_win_over_the_density() -> None:
    model = stack_of([20, 20, 20, 20])
    smet.sparsify(model, density=0.5, rules={"0*": 0.1, "*": 0.25, "1*": 0.9})
    assert [row.density for row in smet.report(model).sites] == [0.1, 0.25, 0.25]


def test_density_one_leaves_a_weight_plain() -> None:
    model = stack_of([20, 20, 20])
    smet.sparsify(model, density=0.5, rules={"1.weight": 1.0})
    assert list(counts(model)) == ["0.weight"]
    assert isinstance(model[1].weight, nn.Parameter)


def test_a_dict_means_the_same_as_rules() -> None:
    densities = {"0*": 0.1, "*": 0.25}
    by_rules, by_dict = stack_of([20, 20, 20]), stack_of([20, 20, 20])
    smet.sparsify(by_rules, density=0.5, rules=densities)
    smet.sparsify(by_dict, density=0.5, distribution=densities)
    assert counts(by_rules) == counts(by_dict) == {"0.weight": (40, 400), "1.weight": (100, 400)}


def test_a_function_says_densities_or_numbers_of_blocks() -> None:
    asked: list[tuple[list[str], float]] = []

    def distribute(layouts: Mapping[str, Layout], density: float) -> dict[str, int | float]:
        asked.append((list(layouts), density))
        return {name: 17 if layout.rows == 30 else density / 2 for name, layout in layouts.items()}

    model = stack_of([20, 20, 30, 20])
    smet.sparsify(model, density=0.5, distribution=distribute, rules={"2": 0.75})
    assert asked == [(["0.weight", "1.weight"], 0.5)]
    assert counts(model) == {"0.weight": (100, 400), "1.weight": (17, 600), "2.weight": (450, 600)}


def test_a_function_is_not_asked_where_rules_say_everything() -> None:
    model = stack_of([20, 20])
    smet.sparsify(model, rules={"*": 0.5}, distribution=lambda layouts, density: {}["nothing"])
    assert counts(model) == {"0.weight": (200, 400)}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "distribution: expected a function that returns a dict from names to densities, got None"),
        (
            {},
            r"distribution: expected exactly the 1 names .* got 0, not alike in '0\.weight'; return one number",
        ),
        ({"0.weight": 0.5, "x": 0.5}, r"distribution: expected exactly the 1 names .* got 2, not alike in 'x'"),
        *[
            (
                {"0.weight": bad},
                r"0\.weight: expected from distribution a density in \(0, 1\] or an int from 1 to 400 blo",
            )
            for bad in (0, 0.0, 401, 1.5, -1, float("nan"), True, "0.5", None)
        ],
    ],
    ids=str,
)
def test_a_function_that_answers_badly(answer: Any, message: str) -> None:
    model = stack_of([20, 20])
    with Unchanged(model), pytest.raises(ValueError, match=message):
        smet.sparsify(model, distribution=lambda layouts, density: answer)


def test_a_function_that_raises() -> None:
    model = stack_of([20, 20])
    with Unchanged(model), pytest.raises(ZeroDivisionError):
        smet.sparsify(model, distribution=lambda layouts, density: 1 / 0)


def test_rules_twice() -> None:
    model = stack_of([20, 20])
    with Unchanged(model), pytest.raises(ValueError, match="rules: expected none beside a dict as distribution"):
        smet.sparsify(model, rules={"*": 0.5}, distribution={"*": 0.5})
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"distribution\['\*'\]: expected a number in \(0, 1\], got 2"),
    ):
        smet.sparsify(model, distribution={"*": 2})
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"'nowhere' matches none of the weights chosen to be sparse"),
    ):
        smet.sparsify(model, distribution={"nowhere": 0.2})
