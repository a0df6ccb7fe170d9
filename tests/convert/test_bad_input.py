"""Every wrong request is a ValueError that says what to do, and the model is as it was."""

from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.states import Unchanged


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_density_outside_0_1(density: float) -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match="density"):
        smet.sparsify(model, density=density)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_density_of_a_rule_outside_0_1(density: float) -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=r"density.*|3\.weight"):
        smet.sparsify(model, rules={"3.weight": density})


@pytest.mark.parametrize("block_shape", [0, -1, (0, 4), (4, -2), (1, 2, 3), (4,)], ids=str)
def test_block_shape_not_positive(block_shape: Any) -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match="block"):
        smet.sparsify(model, block_shape=block_shape)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.Embedding(5, 4)), nn.Sequential(), nn.Conv2d(1, 2, 3)],
    ids=["norm", "embedding", "empty", "convolution"],
)
def test_nothing_to_sparsify(model: nn.Module) -> None:
    with Unchanged(model), pytest.raises(ValueError, match=r"(?i)nothing|no weight|no site"):
        smet.sparsify(model)


def test_everything_excluded() -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=r"(?i)nothing|no weight|no site"):
        smet.sparsify(model, exclude="*")


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("globs", ["layers.9.*", ["0.weight", "nowhere*"]], ids=str)
def test_a_glob_that_matches_nothing(argument: str, globs: Any) -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=r"layers\.9\.\*|nowhere\*"):
        smet.sparsify(model, **{argument: globs})


def test_an_include_glob_that_matches_only_what_cannot_be_sparse() -> None:
    """Even where another glob matches something that can."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    with Unchanged(model), pytest.raises(ValueError, match=r"'\[12\]\.weight'.*tied to [12]\.weight"):
        smet.sparsify(model, density=0.5, include=["0.weight", "[12].weight"])


def test_a_rule_that_matches_nothing() -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=r"nowhere\*"):
        smet.sparsify(model, rules={"0.weight": 0.5, "nowhere*": 0.2})


def test_sparsify_twice() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    with Unchanged(model), pytest.raises(ValueError, match=r"0\.weight.*already|already.*0\.weight"):
        smet.sparsify(model, density=0.5)


def test_sparsify_twice_on_one_of_the_weights() -> None:
    model = smet.sparsify(two_layers(), density=0.5, include="0.weight")
    with Unchanged(model), pytest.raises(ValueError, match=r"0\.weight.*already|already.*0\.weight"):
        smet.sparsify(model, density=0.5, include=["0.weight", "3.weight"])


def test_the_rest_may_follow_later() -> None:
    model = smet.sparsify(two_layers(), density=0.5, include="0.weight")
    smet.sparsify(model, density=0.25, include="3.weight")
    assert [row.density for row in smet.report(model).sites] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("argument", "value"), [("distribution", "uniformly"), ("select", "best")], ids=["distribution", "select"]
)
def test_unknown_names(argument: str, value: str) -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=value):
        smet.sparsify(model, **{argument: value})


def test_a_one_dimensional_parameter_by_name() -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=r"0\.bias"):
        smet.sparsify(model, include="0.bias")


def test_an_integer_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight|(?i:nothing)"):
        smet.sparsify(model, include="0.weight")
