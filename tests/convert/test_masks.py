"""Masks leave a model as dense tensors, and come into another one from anywhere."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.blocks import Grid
from tests.support.small_models import RaggedNet
from tests.support.snapshots import assert_same, same_bits
from tests.support.states import Unchanged, structure


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 13), nn.GELU(), nn.Linear(13, 9), nn.GELU(), nn.Linear(9, 4))


def random_masks(model: nn.Module, share: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in weights}


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 4), (4, 4)], ids=str)
def test_masks_are_where_blocks_are_active(block_shape: tuple[int, int]) -> None:
    model = smet.sparsify(RaggedNet(), 0.4, block_shape=block_shape)
    masks = smet.masks(model)
    assert masks.keys() == find_sites(model).keys()
    for name, site in find_sites(model).items():
        grid = Grid(site.layout.shape, block_shape, flatten=site.layout.matrix != site.layout.shape[-2:])
        assert masks[name].dtype == torch.bool and torch.equal(masks[name], grid.spread(site.mask())), name
        assert (smet.export_dense(model).get_parameter(name)[~masks[name]] == 0).all()


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 4), (4, 4)], ids=str)
def test_another_model_takes_them(block_shape: tuple[int, int]) -> None:
    masks = smet.masks(smet.sparsify(RaggedNet(), 0.4, block_shape=block_shape))
    plain = RaggedNet()
    other = smet.sparsify(copy.deepcopy(plain), masks=masks, block_shape=block_shape)
    assert_same(smet.masks(other), masks)
    for name, mask in masks.items():
        assert torch.equal(smet.export_dense(other).get_parameter(name), plain.get_parameter(name) * mask)


def test_a_block_is_active_where_any_entry_is() -> None:
    model, mask = nn.Sequential(nn.Linear(8, 8)), torch.zeros(8, 8)
    mask[5, 1] = mask[0, 7] = 1
    weight = model[0].weight.detach().clone()
    smet.sparsify(model, masks={"0": mask}, block_shape=4)
    assert find_sites(model)["0.weight"].mask().tolist() == [False, True, True, False]
    assert same_bits(model[0].weight.detach()[4:, :4], weight[4:, :4])


def test_zeros_stay_active() -> None:
    model = net()
    masks = random_masks(model)
    with torch.no_grad():
        model[0].weight.zero_()
    smet.sparsify(model, masks=masks)
    assert find_sites(model)["0.weight"].num_active == int(masks["0.weight"].sum())


def test_weights_without_a_mask() -> None:
    masks = {"2": random_masks(net())["2.weight"]}
    alone, others = smet.sparsify(net(), masks=masks), smet.sparsify(net(), 0.5, masks=masks, rules={"4": 0.25})
    assert set(find_sites(alone)) == {"2.weight"}
    assert {row.reason for row in smet.report(alone).skipped} == {"not included"}
    assert {row.name: row.density for row in smet.report(others).sites if row.name != "2.weight"} == {
        "0.weight": 0.5,
        "4.weight": 0.25,
    }
    plain = net()
    assert torch.equal(others[2].weight, plain[2].weight * masks["2"])  # not rescaled, the others are
    active = smet.masks(others)["0.weight"]
    torch.testing.assert_close(others[0].weight.detach(), plain[0].weight.detach() * active * 2**0.5)


def test_rescale_when_asked_for() -> None:
    model, plain, masks = net(), net(), random_masks(net())
    smet.sparsify(model, masks=masks, rescale=True)
    scale = (130 / int(masks["0.weight"].sum())) ** 0.5
    torch.testing.assert_close(model[0].weight.detach(), plain[0].weight.detach() * masks["0.weight"] * scale)


def test_a_weight_that_is_dense_by_default() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Conv2d(2, 3, 3))
    masks = random_masks(model)
    smet.sparsify(model, masks=masks)
    assert_same(smet.masks(model), masks)


def test_a_wrapped_model_gives_plain_names() -> None:
    model = smet.sparsify(net(), 0.5)
    masks = smet.masks(torch.nn.DataParallel(model))
    assert set(masks) == {"0.weight", "2.weight", "4.weight"}
    wrapped = smet.sparsify(torch.nn.DataParallel(net()), masks=masks)
    assert_same(smet.masks(wrapped), masks)


def test_a_pattern_that_the_masks_keep() -> None:
    masks = smet.masks(smet.sparsify(nn.Sequential(nn.Linear(8, 8)), pattern="2:4"))
    other = smet.sparsify(nn.Sequential(nn.Linear(8, 8)), masks=masks, pattern="2:4")
    assert find_sites(other)["0.weight"].compact.pattern == "2:4"


def some(shape: tuple[int, int] = (13, 10), dtype: torch.dtype = torch.bool) -> Tensor:
    return (torch.arange(shape[0] * shape[1]).view(shape) % 3 == 0).to(dtype)


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ({"0": some((10, 13))}, {}, r"0\.weight: expected a mask of shape \(13, 10\), got \(10, 13\); pass a bool"),
        ({"0": 2 * some(dtype=torch.int8)}, {}, r"0\.weight: expected a mask of 0 and 1, got other numbers"),
        ({"0": some() * torch.nan}, {}, r"0\.weight: expected a mask of 0 and 1, got other numbers"),
        (
            {"0": torch.zeros(13, 10)},
            {},
            r"0\.weight: expected a mask with an active weight, got one that is all false",
        ),
        (
            {"0": torch.ones(13, 10)},
            {},
            r"0\.weight: expected a mask with an inactive weight, got .* all true; leave it",
        ),
        (
            {"1.weight": some()},
            {},
            r"masks: '1\.weight' is none of the parameters of two or more dimensions \(0\.weight",
        ),
        (
            {"0": some(), "0.weight": some()},
            {},
            r"masks: expected one mask for 0\.weight, got two; leave out '0\.weight'",
        ),
        ({"0": some().tolist()}, {}, r"0\.weight: expected a mask, got \[\[True"),
        ({"0": some().to("meta")}, {}, r"0\.weight: expected a mask, got a tensor"),
        ({"0": some().float().to_sparse()}, {}, r"0\.weight: expected a mask, got a tensor"),
        ({}, {}, r"masks: expected a dict from names of weights to bool tensors, got \{\}"),
        ("pruned", {}, r"masks: expected one of prune, got 'pruned'"),
        ([some()], {}, r"masks: expected a dict"),
        ({0: some()}, {}, r"masks: expected a dict"),
        ({"0": some()}, {"exclude": "0"}, r"exclude: expected weights without a mask, got 0\.weight; leave out"),
        ({"0": some()}, {"include": "2"}, r"density: expected one for the weights without a mask, got none"),
        ({"0": some()}, {"distribution": "erk"}, r"density: expected one for the weights without a mask, got none"),
        ({"0": some()}, {"block_shape": 5}, r"0\.weight: expected a mask that leaves a block of \(5, 5\) inactive"),
        ({"0": some()}, {"select": "nonzero"}, r'masks: expected none with select="nonzero"'),
        ({"0": some()}, {"pattern": "1:2"}, r'0\.weight: expected 65 active weights for pattern="1:2", got 44'),
        ({"0": some()}, {"pattern": "fan_in", "block_shape": (13, 1)}, r"0\.weight: expected a mask that leaves"),
    ],
    ids=str,
)
def test_bad_masks(masks: Any, options: dict[str, Any], message: str) -> None:
    model = net()
    with Unchanged(model), pytest.raises(ValueError, match=message):
        smet.sparsify(model, masks=masks, **options)
    assert not find_sites(model)


def test_a_mask_against_the_pattern() -> None:
    mask = torch.zeros(13, 10)
    mask[:, :3] = 1
    mask[0, :5] = 1
    model = net()
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"0\.weight: expected rows whose active .* got 3 to 5; pass a"),
    ):
        smet.sparsify(model, masks={"0": mask}, pattern="fan_in")
    mask[0, 4] = 0
    smet.sparsify(model, masks={"0": mask}, pattern="fan_in")


def test_a_weight_that_cannot_be_sparse() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"masks: 0\.weight cannot be sparse: tied to 1\.weight; leave"),
    ):
        smet.sparsify(model, masks={"0.weight": some((8, 8))})
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    model = nn.Sequential(attention)
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"masks: expected the name of one weight, got '0', which has"),
    ):
        smet.sparsify(model, masks={"0": some((8, 8))})


def test_models_without_data() -> None:
    with pytest.raises(
        ValueError, match=r"0\.weight: expected a weight with data for a mask, got one on the meta device"
    ):
        smet.sparsify(net().to("meta"), masks={"0": some()})
    model = smet.sparsify(net(), masks={"0": some()})
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"0\.weight: expected a topology to draw, got one that masks gave; load"):
        smet.materialize(model)
    with pytest.raises(ValueError, match=r"masks: expected a model with compact weights"):
        smet.masks(net())


def pruned_net() -> nn.Sequential:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.7)
    prune.random_unstructured(model[0], "weight", 0.1)  # a container of two methods
    prune.random_structured(model[2], "weight", 0.4, dim=0)
    prune.l1_unstructured(model[2], "bias", 3)
    prune.identity(model[4], "weight")  # prunes nothing
    return model


def test_the_masks_of_torch_prune() -> None:
    model, x = pruned_net(), torch.randn(5, 10)
    expected, masks = model(x).detach(), {i: model[i].weight_mask.clone() for i in (0, 2)}
    with torch.no_grad():
        model[0].weight_orig[masks[0].bool()] = 0.0  # an active zero
        expected = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smet.sparsify(model, masks="prune")
    assert_same(model(x).detach(), expected)
    assert {name: mask.float() for name, mask in smet.masks(model).items()}.keys() == {"0.weight", "2.weight"}
    for i in (0, 2):
        assert torch.equal(smet.masks(model)[f"{i}.weight"], masks[i].bool())
    assert not [key for key in model.state_dict() if "weight_orig" in key or "weight_mask" in key]
    assert "2.bias_mask" in model.state_dict() and type(model[4].weight) is nn.Parameter
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_torch_prune_and_a_density_for_the_others() -> None:
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 10))
    prune.l1_unstructured(model[0], "weight", 0.7)
    smet.sparsify(model, 0.5, masks="prune")
    assert {row.name: row.density for row in smet.report(model).sites} == {"0.weight": 0.3, "1.weight": 0.5}


def check_pruned_as_before(model: nn.Module, before: list[Any], x: Tensor, expected: Tensor) -> None:
    assert_same([structure(model), dict(model.state_dict())], before)
    assert_same(model(x).detach(), expected)
    prune.remove(model[0], "weight")
    assert_same(model(x).detach(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "columns that 4 divides"),
        ({"block_shape": 5}, "expected a mask that leaves a block"),
        ({"exclude": "0"}, "exclude: expected weights without a mask"),
        ({"density": 7}, "density"),
    ],
    ids=str,
)
def test_a_pruned_model_is_unchanged_by_a_failure(options: dict[str, Any], message: str) -> None:
    model, x = pruned_net(), torch.randn(5, 10)
    expected = model(x).detach()
    before = [structure(model), {name: t.clone() for name, t in model.state_dict().items()}]
    with pytest.raises(ValueError, match=message):
        smet.sparsify(model, masks="prune", **options)
    check_pruned_as_before(model, before, x, expected)


def failing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = iter(range(1, 100))

    def replaced(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise MemoryError
        return function(*given, **named)

    return replaced


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_pruned_model_where_memory_runs_out(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering fails twice with nothing changed, packing with one weight compact at most; forwards are the same."""
    model, x = pruned_net(), torch.randn(5, 10)
    expected = model(x).detach()
    before = [structure(model), {name: t.clone() for name, t in model.state_dict().items()}]
    monkeypatch.setattr(parametrize, "_maybe_set", failing(parametrize._maybe_set, call))
    with pytest.raises(MemoryError):
        smet.sparsify(model, masks="prune")
    monkeypatch.undo()
    if find_sites(model):
        assert call == 4 and len(find_sites(model)) == 1
        assert_same(model(x).detach(), expected)
    else:
        check_pruned_as_before(model, before, x, expected)


def test_a_mask_for_a_weight_that_torch_prunes() -> None:
    model = pruned_net()
    with pytest.raises(ValueError, match=r"masks: 0\.weight_orig cannot be sparse: pruned .*; masks=.prune. does both"):
        smet.sparsify(model, masks={"0.weight": some()})


def test_nothing_is_pruned() -> None:
    with pytest.raises(ValueError, match=r"masks: expected weights pruned by torch\.nn\.utils\.prune .* found none"):
        smet.sparsify(net(), masks="prune")
    model = net()
    prune.identity(model[0], "weight")
    with Unchanged(model), pytest.raises(ValueError, match=r"masks: expected masks with zeros, got none .* 0\.weight"):
        smet.sparsify(model, masks="prune")
