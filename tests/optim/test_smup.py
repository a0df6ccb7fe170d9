"""SμPar: initial values and rates with which activations change as much at any width and density."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.optim.language_model import LanguageModel
from tests.support.states import Unchanged

STD, BASE = 0.05, 64
LAYERS = ("first", "second", "head")
NUM_TOKENS = 4
"""Few, so that the steps of a layer add up on each token: what scales with 1 / (d n) and not with its root."""


def spreads(model: nn.Module) -> dict[str, float]:
    """Returns the root mean square of each weight's entries that are not zero."""
    parameters = dict(model.named_parameters()) | {name: site.values for name, site in find_sites(model).items()}
    return {name: float(p.detach()[p != 0].double().square().mean().sqrt()) for name, p in parameters.items()}


@pytest.mark.parametrize(("density", "block"), [(1.0, 1), (0.5, 1), (0.25, 7), (0.25, (1, 16))], ids=str)
@pytest.mark.parametrize("is_scaled_first", [False, True])
def test_initial_values(is_scaled_first: bool, density: float, block: Any) -> None:
    model = LanguageModel(128)
    before = spreads(model)
    if is_scaled_first:
        smet.scale_initial_(model, std=STD, base_width=BASE)
    smet.sparsify(model, density, block_shape=block, seed=1)
    if not is_scaled_first:
        assert smet.scale_initial_(model, std=STD, base_width=BASE) is model
    found = spreads(model)
    sites = find_sites(model)
    for name, num_inputs in (("first.weight", 128), ("second.weight", 512)):
        exact = sites[name].density if name in sites else 1.0
        rel = 0.03 if is_scaled_first else 1e-6  # the active ones are a sample of the weights that were scaled
        assert found[name] == pytest.approx(STD * (BASE / (exact * num_inputs)) ** 0.5, rel=rel)
    assert found["head.weight"] == pytest.approx(STD * BASE / 128, rel=1e-6)
    assert {name: found[name] for name in before if "head" not in name and name not in sites and "bias" in name} == {
        name: before[name] for name in before if "bias" in name
    }
    assert found["embedding.weight"] == before["embedding.weight"]


def test_a_second_call_changes_nothing() -> None:
    model = smet.sparsify(LanguageModel(64), 0.5)
    once = spreads(smet.scale_initial_(model, std=STD, base_width=BASE))
    assert spreads(smet.scale_initial_(model, std=STD, base_width=BASE)) == pytest.approx(once, rel=1e-6)


def test_a_tied_head_and_zeros_stay() -> None:
    model = LanguageModel(128, tied=True)
    nn.init.zeros_(model.second.weight)
    before = model.embedding.weight.detach().clone()
    smet.scale_initial_(model, std=STD, base_width=BASE)
    assert torch.equal(model.embedding.weight, before) and not model.second.weight.any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"std": 0.0}, "std: expected a finite number above 0, got 0.0"),
        (
            {"std": 1e37},
            r"first.weight: expected a standard deviation that torch.float32 can hold, got 2e\+37; change std",
        ),
        ({"base_width": 0}, "base_width: expected a whole number of at least 1, got 0"),
        ({"model": None}, r"scale_initial_: expected a model \(torch.nn.Module\), got None"),
    ],
    ids=str,
)
def test_bad_numbers(options: dict[str, Any], match: str) -> None:
    given = {"model": LanguageModel(16), "std": STD, "base_width": BASE} | options
    with pytest.raises(ValueError, match=match):
        smet.scale_initial_(**given)


def test_weights_without_values() -> None:
    model = LanguageModel(16)
    model.second.weight.data[3, 3] = torch.nan
    with Unchanged(model), pytest.raises(ValueError, match=r"second\.weight: expected finite initial values"):
        smet.scale_initial_(model, std=STD, base_width=BASE)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"first\.weight: expected a weight with data.*materialize"),
    ):
        smet.scale_initial_(LanguageModel(16), std=STD, base_width=BASE)


def activations(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the output of each layer."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: out.detach()})
        )
        for name in LAYERS
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


def changes(width: int, density: float, is_smup: bool) -> dict[str, float]:
    """Trains four steps, and returns how far each layer's output has moved: the root mean square."""
    model = LanguageModel(width)
    for name in LAYERS:
        nn.init.normal_(model.get_submodule(name).weight, std=STD)
    if is_smup:
        smet.scale_initial_(model, std=STD, base_width=BASE)
    smet.sparsify(model, density, rescale=is_smup)
    groups = smet.param_groups(model, 2e-3, embedding_lr=1e-2, base_width=BASE if is_smup else None)
    optimizer = smet.ActiveAdamW(groups, model=model, warmup_steps=0, lr_density_exponent=float(is_smup))
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(NUM_TOKENS, (2, 256), generator=generator)
    before = activations(model, tokens)
    for _ in range(4):
        nn.functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = activations(model, tokens)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in LAYERS}


def largest_ratio(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(run[name] for run in runs) / min(run[name] for run in runs) for name in LAYERS}


@pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")
def test_activations_change_as_much_at_every_width_and_density() -> None:
    settings = [(width, density) for width in (64, 128, 256) for density in (1.0, 0.5, 0.25, 0.1)]
    ratios = largest_ratio([changes(*setting, is_smup=True) for setting in settings])
    plain = largest_ratio([changes(*setting, is_smup=False) for setting in settings])
    assert max(ratios.values()) < 1.4, ratios
    assert min(plain.values()) > 3, plain
