"""Parameter groups: which parameter gets which rate and weight decay, in sparse and in dense models."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.presets import build_preset
from tests.optim.language_model import LanguageModel

LINEAR = ["first.weight", "second.weight"]
TABLES = ["embedding.weight", "head.weight"]
VECTORS = ["norm.weight", "first.bias", "second.bias"]


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    names |= {id(site.values): name for name, site in find_sites(model).items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("density", [None, 1.0, 0.5], ids=str)
@pytest.mark.parametrize("block", [1, 4])
def test_linear_layers_have_a_rate_of_their_own(density: float | None, block: int) -> None:
    model = LanguageModel(16)
    if density is not None:
        smet.sparsify(model, density, block_shape=block)
    groups = smet.param_groups(model, 1e-3, embedding_lr=8e-3, weight_decay=0.1)
    assert names_of(model, groups) == [LINEAR, TABLES, VECTORS]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (8e-3, 0.1), (8e-3, 0.0)]


def test_without_another_rate_they_are_the_groups_of_weight_decay() -> None:
    model = smet.sparsify(LanguageModel(16), 0.5)
    groups = smet.param_groups(model, 1e-3, weight_decay=0.1)
    expected = [group | {"lr": 1e-3} for group in smet.decay_groups(model, 0.1)]
    assert names_of(model, groups) == names_of(model, expected)
    assert [group | {"params": 0} for group in groups] == [group | {"params": 0} for group in expected]


def test_a_tied_embedding_comes_once() -> None:
    model = smet.sparsify(LanguageModel(16, tied=True), 0.5)
    groups = smet.param_groups(model, 1e-3, embedding_lr=8e-3)
    assert names_of(model, groups) == [LINEAR, ["embedding.weight"], VECTORS]


def test_a_model_of_transformers() -> None:
    model = smet.sparsify(build_preset("nano", vocabulary=64, device="cpu"), 0.5)
    linear, tables, vectors = names_of(model, smet.param_groups(model, 1e-3, embedding_lr=8e-3))
    assert len(linear) == 14 and all(name.startswith("model.layers.") for name in linear)
    assert tables == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(vectors) == 5 and all("norm" in name for name in vectors)


def test_weights_move_by_the_rate_of_their_group() -> None:
    model = smet.sparsify(LanguageModel(16), 0.5)
    groups = smet.param_groups(model, 1e-3, embedding_lr=8e-3)
    optimizer = smet.ActiveAdamW(groups, eps=0.0, warmup_steps=0, model=model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.arange(32)).square().mean().backward()
    optimizer.step()
    moved = {id(p): (p.detach() - old).abs().max() for p, old in zip(model.parameters(), before, strict=True)}
    rates = [{round(float(moved[id(p)]), 6) for p in group["params"]} for group in groups]
    assert rates == [{2e-3}, {8e-3}, {8e-3}]


def rates(model: nn.Module, **options: Any) -> dict[str, float]:
    groups = smet.param_groups(model, 1e-3, **options)
    return {name: group["lr"] for group, names in zip(groups, names_of(model, groups), strict=True) for name in names}


@pytest.mark.parametrize("sparse", [False, True])
def test_rates_follow_the_width(sparse: bool) -> None:
    model = LanguageModel(64)
    if sparse:
        smet.sparsify(model, 0.5)
    found = rates(model, embedding_lr=8e-3, base_width=16)
    assert found == dict.fromkeys(["embedding.weight", *VECTORS], 8e-3) | {
        "first.weight": 1e-3 * 16 / 64,
        "second.weight": 1e-3 * 16 / 256,
        "head.weight": 8e-3 * 16 / 64,
    }
    assert rates(model, base_width=16)["embedding.weight"] == 1e-3


def test_at_the_base_width_nothing_changes() -> None:
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    assert rates(model, embedding_lr=8e-3, base_width=16) == rates(model, embedding_lr=8e-3)


def test_a_tied_head_keeps_its_rate() -> None:
    assert rates(LanguageModel(64, tied=True), embedding_lr=8e-3, base_width=16)["embedding.weight"] == 8e-3


class Experts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(4, 8, 32))


@pytest.mark.parametrize(
    ("layer", "num_inputs"),
    [
        (nn.Conv2d(4, 6, 3), 36),
        (Conv1D(8, 32), 32),
        (Experts(is_transposed=False), 32),
        (Experts(is_transposed=True), 8),
    ],
    ids=["convolution", "Conv1D of transformers", "experts", "transposed experts"],
)
def test_inputs_are_counted_as_the_layer_reads_them(layer: nn.Module, num_inputs: int) -> None:
    model = nn.Sequential(layer, nn.Linear(5, 5))
    assert rates(model, base_width=16)["0.weight"] == pytest.approx(1e-3 * 16 / num_inputs)
    smet.sparsify(model, 0.5, include=["0.weight"])
    assert rates(model, base_width=16)["0.weight"] == pytest.approx(1e-3 * 16 / num_inputs)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("lr", -1.0, "a finite number of at least 0"),
        ("lr", "x", "a finite number of at least 0"),
        ("embedding_lr", float("nan"), "a finite number of at least 0"),
        ("weight_decay", None, "a finite number of at least 0"),
        ("base_width", 0, "a whole number of at least 1"),
        ("base_width", 1.5, "a whole number of at least 1"),
        ("model", 3, r"a model \(torch.nn.Module\)"),
    ],
)
def test_bad_input(option: str, value: Any, expected: str) -> None:
    given = {"model": LanguageModel(16), "lr": 1e-3} | {option: value}
    name = "param_groups" if option == "model" else option
    with pytest.raises(ValueError, match=f"{name}: expected {expected}, got "):
        smet.param_groups(**given)
