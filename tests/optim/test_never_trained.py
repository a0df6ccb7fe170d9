"""Compact weights that are in no parameter group cause a warning."""

import warnings

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.training import train


def by_name(model: nn.Module, ending: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(ending)]


def test_groups_by_name_miss_them_and_a_warning_says_so() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    groups = [{"params": by_name(model, "bias"), "weight_decay": 0.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = smet.ActiveAdamW(groups, model=model)
    with pytest.warns(UserWarning, match=r"0\.weight, 3\.weight got a gradient.*never trained.*decay_groups") as caught:
        train(model, optimizer, steps=3)
    assert len(caught) == 1 and caught[0].filename.endswith("training.py")


@pytest.mark.filterwarnings("error")
def test_no_warning_where_all_is_well() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    first, second = (site.values for site in find_sites(model).values())
    biases = smet.ActiveAdamW(by_name(model, "bias"), model=model)
    rest = [smet.ActiveAdamW([values], model=model) for values in (first, second)]
    train(model, biases, steps=1)
    assert len(rest) == 2
    first.requires_grad_(False)
    model.zero_grad()
    train(model, smet.ActiveAdamW([second], model=model), steps=1)


def test_a_sibling_that_is_gone_trains_nothing() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    first, second = (site.values for site in find_sites(model).values())
    gone, kept = smet.ActiveAdamW([first], model=model), smet.ActiveAdamW([second], model=model)
    del gone
    with pytest.warns(UserWarning, match=r"ActiveAdamW: 0\.weight got a gradient"):
        train(model, kept)
    assert torch.is_tensor(first)
