"""A model that was pruned elsewhere keeps its zeros where they are, and each weight its own density."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.blocks import Grid
from tests.support.small_models import RaggedNet
from tests.support.snapshots import assert_same, same_bits
from tests.support.states import Unchanged


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 13), nn.GELU(), nn.Linear(13, 9), nn.GELU(), nn.Linear(9, 4))


def pruned(model: nn.Module, block_shape: tuple[int, int]) -> dict[str, int]:
    """Sets blocks of each matrix to zero, of each another share; returns how many stay, some with a single entry."""
    counts = {}
    for number, (name, weight) in enumerate(p for p in model.named_parameters() if p[1].dim() > 1):
        grid = Grid(tuple(weight.shape), block_shape)
        mask = torch.rand(grid.num_blocks, generator=torch.Generator().manual_seed(number)) < 0.2 + 0.2 * number
        mask[0] = True
        with torch.no_grad():
            weight.mul_(grid.spread(mask))
            if block_shape != (1, 1):
                entries = grid.spread(mask) & (torch.rand(weight.shape) < 0.5)
                entries.flatten()[0] = True
                weight.mul_(entries)
            weight.add_(0.0)  # -0.0 is a zero like any other, and reads as 0.0
        counts[name] = int((grid.mean((weight != 0).double()) > 0).sum())
    return counts


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("block_shape", [(1, 1), (1, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("make", [net, RaggedNet])
@pytest.mark.usefixtures("unpacked")
def test_weights_and_outputs_are_what_they_were(make: Any, block_shape: tuple[int, int]) -> None:
    model = make()
    counts = pruned(model, block_shape)
    plain, x = copy.deepcopy(model), torch.randn(5, 50 if make is RaggedNet else 10)
    assert smet.sparsify(model, select="nonzero", block_shape=block_shape) is model
    sites = find_sites(model)
    assert {name: site.num_active for name, site in sites.items()} == counts
    for name, site in sites.items():
        assert same_bits(getattr(site.module, site.tensor_name).detach(), plain.get_parameter(name).detach()), name
    assert same_bits(model(x), plain(x))
    assert len({row.density for row in smet.report(model).sites}) > 1


def test_a_weight_without_zeros_stays_plain_and_one_of_zeros_has_a_block() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.zero_()
        model[4].weight[1].zero_()
    smet.sparsify(model, select="nonzero")
    assert {name: site.num_active for name, site in find_sites(model).items()} == {"2.weight": 1, "4.weight": 27}
    assert {row.name: row.reason for row in smet.report(model).skipped} == {"0.weight": "keeps every block: density 1"}
    assert (model[2].weight == 0).all()


def test_what_is_not_a_number_is_no_zero() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[3, 4], model[0].weight[5, 6], model[0].weight[7, 8] = torch.nan, 1e-45, -0.0
    smet.sparsify(model, select="nonzero", include="0")
    assert find_sites(model)["0.weight"].mask().nonzero().flatten().tolist() == [34, 56]


def test_the_topology_moves_from_there() -> None:
    model = net()
    counts = pruned(model, (1, 1))
    smet.sparsify(model, select="nonzero")
    before = {name: site.mask() for name, site in find_sites(model).items()}
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, every=2)
    for _ in range(6):
        model(torch.randn(5, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert manager.history
    for name, site in find_sites(model).items():
        assert site.num_active == counts[name] == int(site.mask().sum())
        assert not torch.equal(site.mask(), before[name]), name


def test_the_rest_may_follow() -> None:
    """The zeros of some layers are kept, others are chosen at random."""
    model = net()
    pruned(model[0], (1, 1))
    smet.sparsify(model, select="nonzero", include="0")
    smet.sparsify(model, density=0.5, exclude="0")
    assert set(find_sites(model)) == {"0.weight", "2.weight", "4.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.3}, r'density: expected none with select="nonzero", .* got 0\.3; leave it out'),
        ({"rules": {"0": 0.3}}, r'rules: expected none with select="nonzero"'),
        ({"distribution": "erk"}, r'distribution: expected none with select="nonzero", .* got \'erk\''),
        ({}, r"nothing to make sparse: none of the 3 chosen weights has a block of \(1, 1\) that is all zero"),
        ({"exclude": "*"}, "nothing to make sparse"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    model = net()
    with Unchanged(model), pytest.raises(ValueError, match=message):
        smet.sparsify(model, select="nonzero", **options)


def test_refused_without_data() -> None:
    model = net().to("meta")
    with pytest.raises(
        ValueError, match=r"0\.weight: expected a weight with data for select=.* load the pruned weights"
    ):
        smet.sparsify(model, select="nonzero")
    assert not find_sites(model)


def test_rescale_is_for_random_blocks_only() -> None:
    model = net()
    pruned(model, (1, 1))
    weight = model[0].weight.detach().clone()
    smet.sparsify(model, select="nonzero", rescale=True, include="0")
    density = smet.report(model).sites[0].density
    torch.testing.assert_close(model[0].weight.detach(), weight * density**-0.5)


def prune_by_torch(model: nn.Sequential) -> None:
    for i in (0, 2, 4):
        prune.l1_unstructured(model[i], "weight", 0.7)


PRUNED = (
    r"0\.weight_orig.*pruned by torch\.nn\.utils\.prune: call prune\.remove\(module, 'weight'\) first, then sparsify"
)


@pytest.mark.parametrize(
    "options",
    [{}, {"include": "0.weight"}, {"include": ["*.weight"]}, {"include": "0"}, {"select": "nonzero"}],
    ids=str,
)
def test_a_model_under_torch_prune(options: dict[str, Any]) -> None:
    """The weights that forwards read are computed from parameters of other names, by hooks."""
    model = net()
    prune_by_torch(model)
    prune.random_structured(model[0], "weight", 0.2, dim=0)  # a container of two methods
    with Unchanged(model), pytest.raises(ValueError, match=PRUNED):
        smet.sparsify(model, **options)


def test_a_model_under_torch_prune_whose_report_is_long() -> None:
    """The reason that helps is said, whatever stays dense besides."""
    model = nn.Sequential(*[nn.Embedding(3, 4) for _ in range(9)], nn.Linear(8, 8))
    prune.l1_unstructured(model[9], "weight", 0.7)
    with pytest.raises(ValueError, match=r"9\.weight_orig: pruned by torch\.nn\.utils\.prune.*an embedding"):
        smet.sparsify(model)


@pytest.mark.usefixtures("unpacked")
def test_after_prune_remove() -> None:
    model = net()
    prune_by_torch(model)
    x = torch.randn(5, 10)
    expected = model(x).detach()
    for i in (0, 2, 4):
        prune.remove(model[i], "weight")
    smet.sparsify(model, select="nonzero")
    assert_same(model(x).detach(), expected)
    assert {name: site.num_active for name, site in find_sites(model).items()} == {
        "0.weight": 39,
        "2.weight": 35,
        "4.weight": 11,
    }


@pytest.mark.filterwarnings("ignore:sparsify. the model")
def test_a_layer_that_hooks_compute_stays_dense_with_its_reason() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[2])
    expected = model(torch.ones(1, 10)).detach()
    smet.sparsify(model, density=0.5, select="magnitude")
    reasons = {row.name: row.reason for row in smet.report(model).skipped}
    assert "prune.remove(module, 'weight')" in reasons["0.weight_orig"]
    assert "torch.nn.utils.remove_weight_norm(module, 'weight')" in reasons["2.weight_v"]
    assert set(find_sites(model)) == {"4.weight"} and model(torch.ones(1, 10)).shape == expected.shape
    with pytest.raises(ValueError, match=r"2\.weight_g, which cannot be sparse: computed by .*remove_weight_norm"):
        smet.sparsify(model, include="2.weight")


def test_spectral_norm() -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)))
    with pytest.raises(
        ValueError, match=r"0\.weight_orig: computed by .*call torch\.nn\.utils\.remove_spectral_norm\("
    ):
        smet.sparsify(model)
    nn.utils.remove_spectral_norm(model[0])
    smet.sparsify(model, density=0.5)
    assert set(find_sites(model)) == {"0.weight"}
