"""Values and topologies that do not fit a compact weight are refused before anything of them is loaded."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites, loading
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot

VALUES, BITS = "0.parametrizations.weight.original", "0.parametrizations.weight.0.topology"


def build(seed: int = 0, block_shape: Any = 1) -> nn.Module:
    torch.manual_seed(seed)
    return smet.sparsify(two_layers(), density=0.5, block_shape=block_shape, seed=seed)


def parameters_alone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def without(key: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return lambda model: {name: tensor for name, tensor in model.state_dict().items() if name != key}


@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("part", [parameters_alone, without(BITS)], ids=["parameters", "one weight"])
def test_values_alone_are_refused(part: Callable[..., Any], seed: int, block_shape: Any) -> None:
    model = build(seed, block_shape)
    before = find_sites(model)["0.weight"].values.detach().clone()
    with pytest.raises(RuntimeError, match=r"0.weight: expected a topology with the values, got values alone; .*whole"):
        model.load_state_dict(part(build(0, block_shape)), strict=False)
    assert torch.equal(find_sites(model)["0.weight"].values, before)


@pytest.mark.parametrize("strict", [False, True])
def test_dense_weights_are_refused(strict: bool) -> None:
    """Also in a part of another model, which was never given to ``sparsify``."""
    dense, model = nn.Sequential(two_layers(), nn.LayerNorm(4)), nn.Sequential(build(), nn.LayerNorm(4))
    before = {name: site.values.detach().clone() for name, site in find_sites(model).items()}
    with pytest.raises(
        RuntimeError, match=r"\s0\.0\.weight: expected compact weights, got a dense one; resume"
    ) as caught:
        model.load_state_dict(dense.state_dict(), strict=strict)
    assert str(caught.value).count("expected compact weights") == 1 and "Unexpected" not in str(caught.value)
    assert all(torch.equal(site.values, before[name]) for name, site in find_sites(model).items())


def test_a_dense_weight_beside_its_values_is_left_out() -> None:
    model, other = build(), build(7)
    state = other.state_dict()
    model.load_state_dict(state | {"0.weight": torch.zeros_like(other[0].weight)})
    assert_same(dict(model.state_dict()), dict(state))


def test_a_topology_alone_is_refused_unless_it_is_the_one_that_is_there() -> None:
    model, other = build(7), build(0)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"0.weight: expected values with the topology, got a topology alone"):
        model.load_state_dict({BITS: other.state_dict()[BITS]}, strict=False)
    assert_same(snapshot(model), before)
    model.load_state_dict({BITS: model.state_dict()[BITS].clone()}, strict=False)
    assert_same(snapshot(model), before)


def test_neither_of_the_two_may_miss_where_keys_may_miss() -> None:
    model, other = build(7), build(0)
    rest = {name: tensor for name, tensor in other.state_dict().items() if name not in (VALUES, BITS)}
    before = snapshot(model)
    missing = model.load_state_dict(rest, strict=False).missing_keys
    assert missing == [VALUES, BITS]
    assert torch.equal(model[0].weight, build(7)[0].weight) and torch.equal(model[3].weight, other[3].weight)
    model.load_state_dict(build(7).state_dict())
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("assign", [False, True])
def test_values_stay_where_the_topology_does_not_fit(assign: bool) -> None:
    model, state = build(), build(7).state_dict()
    state[BITS] = state[BITS].clone().zero_()
    before, values = snapshot(model), find_sites(model)["0.weight"].values
    rest = {name: tensor for name, tensor in state.items() if name in (VALUES, BITS)}
    with pytest.raises(RuntimeError, match=r"0.weight: topology: expected 120 active blocks"):
        model.load_state_dict(rest, strict=False, assign=assign)
    assert_same(snapshot(model), before)
    assert find_sites(model)["0.weight"].values is values


def test_the_topology_stays_where_the_values_do_not_fit() -> None:
    model, state = build(), build(7).state_dict()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"0.weight: expected values of shape \(120,\), got \(119,\)"):
        model.load_state_dict({VALUES: state[VALUES][1:], BITS: state[BITS]}, strict=False)
    assert_same(snapshot(model), before)


def linear(inputs: int, outputs: int, block_shape: Any = 1) -> nn.Module:
    return smet.sparsify(nn.Linear(inputs, outputs, bias=False), density=0.3, block_shape=block_shape)


def convolution(inputs: int, kernel: int) -> nn.Module:
    return smet.sparsify(nn.Conv2d(inputs, 16, kernel, bias=False), density=0.3, include=["*"])


OTHER_SHAPES = [
    (linear(16, 32), linear(32, 16)),
    (linear(64, 64, (1, 4)), linear(128, 32, (1, 4))),
    (linear(64, 64, (2, 8)), linear(64, 64, (8, 2))),
    (convolution(8, 3), convolution(72, 1)),
]


@pytest.mark.parametrize(("saved", "model"), OTHER_SHAPES, ids=["transposed", "runs", "blocks", "convolutions"])
def test_a_weight_of_another_shape_is_refused(saved: nn.Module, model: nn.Module) -> None:
    state = saved.state_dict()
    if next(iter(state.values())).shape != next(model.parameters()).shape:  # blocks of the same size, the other way up
        state["parametrizations.weight.original"] = state["parametrizations.weight.original"].mT.contiguous()
    for given in (state, copy.deepcopy(state), saved_and_read(state)):
        before = snapshot(model)
        with pytest.raises(RuntimeError, match=r"weight: expected a weight of shape, matrix and block shape \d+x\d+"):
            model.load_state_dict(given)
        assert_same(snapshot(model), before)
    model.load_state_dict(dict(state))  # nothing says of which shape it is


def saved_and_read(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_weight_of_the_same_shape_loads_with_what_is_noted_of_it() -> None:
    model = smet.sparsify(nn.Linear(16, 32), density=0.3, pattern="fan_in")
    unrestricted = smet.sparsify(nn.Linear(16, 32), density=0.3, seed=5)
    state = model.state_dict()
    assert state._metadata["parametrizations.weight"]["smet_layout"] == "32x16 32x16 1x1"
    unrestricted.load_state_dict(state)
    assert torch.equal(unrestricted.weight, model.weight)
    names_of_a_wrapper = {f"module.{name}": tensor for name, tensor in state.items()}
    nn.ModuleDict({"module": unrestricted}).load_state_dict(names_of_a_wrapper)


@pytest.mark.parametrize(
    ("here", "saved", "expected", "got"),
    [(1, 2, "the whole weight", "2 parts"), (2, 1, "2 parts", "the whole weight"), (2, 4, "2 parts", "4 parts")],
)
def test_the_parts_of_another_number_of_ranks_are_said(here: int, saved: int, expected: str, got: str) -> None:
    compact = find_sites(build())["0.weight"].compact
    bits = compact.topology.clone()
    assert loading.misfit(compact, bits, "0.weight") is None
    if here > 1:
        compact.part = SimpleNamespace(count=here, band=SimpleNamespace(number=0))  # type: ignore[assignment]
        assert loading.misfit(compact, torch.stack([bits] * here), "0.weight") is None
    of_others = torch.stack([bits[:-1]] * saved) if saved > 1 else torch.cat([bits] * here)
    error = loading.misfit(compact, of_others, "0.weight")
    assert error is not None
    assert error.startswith(f"0.weight: topology: expected that of {expected}, as tensor parallelism over {here} ranks")
    assert f"got that of {got};" in error and "Use save_checkpoint and load_checkpoint" in error


def test_a_state_dict_with_parts_is_refused_by_a_whole_model() -> None:
    model = build()
    state, before = model.state_dict(), snapshot(model)
    state[BITS] = state[BITS].view(2, -1)
    with pytest.raises(RuntimeError, match=r"0\.weight: topology: expected that of the whole weight.* that of 2 parts"):
        model.load_state_dict(state)
    assert_same(snapshot(model), before)
