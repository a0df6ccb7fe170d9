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
    """It is refused even where another glob matches something that can be sparse."""
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


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("density", value) for value in (True, "0.5", [0.5], torch.tensor([0.5]), 10**400)],
        *[("block_shape", value) for value in (1.5, True, "44", None, (2.0, 2), [4, "4"], {4: 4}, 10**30, (1, 10**19))],
        *[("include", value) for value in (3, [3], b"0.weight", [None], torch.ones(1))],
        *[("exclude", value) for value in (3, ["*", 3])],
        *[("rules", value) for value in (3, "x", [("*", 0.5)], {3: 0.5}, {"*": None}, {"*": "0.5"}, {"*": True})],
        *[("distribution", value) for value in (None, 3, ["er"])],
        *[("select", value) for value in ("", ["random"])],
        *[("rescale", value) for value in (1, "yes", 0.5)],
        *[("seed", value) for value in (None, 1.5, "1", True, 2**64, -(2**63) - 1)],
    ],
    ids=str,
)
def test_values_of_another_kind(argument: str, value: Any) -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=argument):
        smet.sparsify(model, **{argument: value})


@pytest.mark.parametrize("thing", [None, 3, torch.ones(2), nn.Linear, "model"], ids=str)
def test_what_is_no_model(thing: Any) -> None:
    for function in (smet.sparsify, smet.report, smet.export_dense, smet.inspect, smet.explain):
        with pytest.raises(ValueError, match=rf"{function.__name__}: expected a model \(torch\.nn\.Module\), got "):
            function(thing)


def test_a_one_dimensional_parameter_by_name() -> None:
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=r"0\.bias"):
        smet.sparsify(model, include="0.bias")


def test_an_integer_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight|(?i:nothing)"):
        smet.sparsify(model, include="0.weight")
