"""``include="conv"``: which convolutions become compact, why the others do not, and the shares of ERK."""

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites

FIRST = "the first convolution, which has few weights and reads the input"
DEPTHWISE = "a depthwise convolution, whose filters have few weights"


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 12, 1),
        nn.Conv2d(12, 12, 3, groups=3),
        nn.ConvTranspose2d(12, 10, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 6),
    )


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in smet.report(model).skipped}


def test_convolutions_beside_linears() -> None:
    model = smet.sparsify(network(), 0.5, include="conv")
    assert set(find_sites(model)) == {"2.weight", "4.weight", "5.weight", "6.weight", "9.weight"}
    assert reasons(model) == {"0.weight": FIRST, "3.weight": DEPTHWISE}
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, 6)


def test_is_said_by_the_text_alone() -> None:
    """A list holds globs, also one that is called "conv"."""
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 6, 3), "other": nn.Conv1d(6, 6, 3), "last": nn.Linear(6, 4)})
    assert set(find_sites(smet.sparsify(model, 0.5, include=["conv"]))) == {"conv.weight"}
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 6, 3), "other": nn.Conv1d(6, 6, 3), "last": nn.Linear(6, 4)})
    assert set(find_sites(smet.sparsify(model, 0.5, include="conv"))) == {"other.weight", "last.weight"}


def test_exclude_and_rules_take_away() -> None:
    model = smet.sparsify(network(), 0.5, include="conv", exclude="9", rules={"2": 0.25, "4": 1.0})
    sites = find_sites(model)
    assert set(sites) == {"2.weight", "5.weight", "6.weight"}
    assert sites["2.weight"].density == 0.25


def test_without_it_they_stay_dense() -> None:
    model = smet.sparsify(network(), 0.5)
    assert set(find_sites(model)) == {"9.weight"}
    assert reasons(model)["2.weight"] == "a convolution"


def test_a_model_whose_only_convolution_is_the_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(ValueError, match=f"nothing to make sparse.*0.weight: {FIRST}.*name weights with include="):
        smet.sparsify(model, 0.5, include="conv")


def test_masks_alone_take_no_selection() -> None:
    masks = {"2.weight": torch.rand(16, 8, 3, 3) < 0.5}
    with pytest.raises(ValueError, match="density: expected one for the weights without a mask"):
        smet.sparsify(network(), include="conv", masks=masks)


def test_shares_of_erk_are_those_of_rigl() -> None:
    """Density is in proportion to (out + in + kernel) / (out · in · kernel), as in Evci et al. 2020, and at most 1."""
    model = smet.sparsify(network(), 0.2, include="conv", distribution="erk", exclude=["5", "6"])
    sites = find_sites(model)
    scores = {"2.weight": (16 + 8 + 3 + 3) / (16 * 8 * 9), "4.weight": (12 + 16 + 1 + 1) / (12 * 16)}
    scores["9.weight"] = (6 + 10) / 60
    unit = sites["2.weight"].density / scores["2.weight"]
    for name, score in scores.items():
        assert sites[name].density == pytest.approx(min(1.0, unit * score), abs=2 / sites[name].layout.num_weights)
    total = sum(site.layout.num_weights for site in sites.values())
    assert sum(site.num_active for site in sites.values()) == pytest.approx(0.2 * total, abs=1)


def test_one_call_trains_a_network_with_topology_updates() -> None:
    model = smet.sparsify(network(), 0.3, include="conv")
    optimizer = smet.ActiveSGD(model, lr=0.01)
    x = torch.randn(4, 3, 9, 9)
    with pytest.warns(UserWarning, match="no site is corrected"):  # its convolutions feed one another
        smet.correct_gradients(model, optimizer, x)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, every=2, grow="gradient")
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert len(manager.history) == 2
