"""sparsify keeps to a pattern, and whatever is copied, saved or loaded keeps it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.format import patterns
from smet_compile.ops import Site, find_sites
from tests.support.states import Unchanged


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def per_group(site: Site) -> torch.Tensor:
    return site.mask().view(-1, patterns.group_size(site.compact.pattern, site.layout)).sum(1)


@pytest.mark.parametrize("select", ["random", "magnitude"])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("2:4", {}),
        ("1:8", {}),
        ("1:8", {"density": 0.125, "exclude": "4"}),
        ("2:4", {"rules": {"0": 0.5, "2": 1.0}}),
        ("fan_in", {"density": 0.3}),
        ("fan_in", {"density": 0.3, "block_shape": 4}),
        ("fan_in", {"density": 0.4, "block_shape": (1, 4), "distribution": "erk"}),
        ("fan_in", {}),
    ],
    ids=str,
)
def test_budgets_hold(pattern: str, options: dict[str, Any], select: Any) -> None:
    model = smet.sparsify(net(), pattern=pattern, select=select, **options)
    sites = find_sites(model)
    assert sites
    for site in sites.values():
        counts = per_group(site)
        assert site.compact.pattern == pattern
        assert int(counts.sum()) == site.num_active and counts.min() > 0
        assert counts.max() - counts.min() <= (pattern == "fan_in")
    assert {row.pattern for row in smet.report(model).sites} == {pattern} and pattern in str(smet.report(model))


def test_the_density_of_n_of_m_follows() -> None:
    assert {row.density for row in smet.report(smet.sparsify(net(), pattern="2:4")).sites} == {0.5}
    assert {row.density for row in smet.report(smet.sparsify(net(), 0.125, pattern="1:8")).sites} == {0.125}


def test_magnitude_keeps_the_largest_of_every_four() -> None:
    model = net()
    weight = model[0].weight.detach().clone().view(-1, 4)
    smet.sparsify(model, pattern="2:4", select="magnitude")
    best = torch.zeros_like(weight).scatter_(1, weight.abs().topk(2, 1).indices, 1).bool().flatten()
    assert torch.equal(find_sites(model)["0.weight"].mask(), best)


def test_nonzero_takes_a_pattern_that_is_there() -> None:
    model = smet.export_dense(smet.sparsify(net(), pattern="2:4"))
    smet.sparsify(model, select="nonzero", pattern="2:4")
    assert {site.compact.pattern for site in find_sites(model).values()} == {"2:4"}
    other = smet.export_dense(smet.sparsify(net(), 0.5))
    with (
        Unchanged(other),
        pytest.raises(ValueError, match=r"0\.weight: expected 2 active weights in every 4 along a row"),
    ):
        smet.sparsify(other, select="nonzero", pattern="2:4", include="0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:3x"}, r"pattern: expected None"),
        ({"pattern": 4}, r"pattern: expected None"),
        ({"pattern": "2:4", "density": 0.3}, r'density: expected 0\.5, the density of pattern="2:4", got 0\.3; leave'),
        ({"pattern": "2:4", "density": 1.0}, r'density: expected 0\.5, the density of pattern="2:4", got 1; leave'),
        (
            {"pattern": "2:4", "rules": {"2": 0.3}},
            r'2\.weight: expected 256 active weights for pattern="2:4", got 154; ',
        ),
        ({"pattern": "2:4", "distribution": "erk"}, r'weight: expected \d+ active weights for pattern="2:4", got \d+'),
        ({"pattern": "1:5"}, r"0\.weight: expected a number of columns that 5 divides .* got 24; leave .* exclude="),
        ({"pattern": "2:4", "block_shape": 4}, r"0\.weight: expected single weights .* got blocks of \(4, 4\)"),
        (
            {"pattern": "fan_in", "density": 0.02},
            r"0\.weight: expected at least one active block in each of 16 .* at lea",
        ),
        ({"pattern": "fan_in", "select": "nonzero"}, "nothing to make sparse"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    model = net()
    with Unchanged(model), pytest.raises(ValueError, match=message):
        smet.sparsify(model, **options)


def test_the_density_that_the_error_names_suffices() -> None:
    smet.sparsify(net(), 0.063, pattern="fan_in", exclude="0")  # 32 rows of 16 need 1 / 16 = 0.0625


def test_copies_keep_it() -> None:
    model = smet.sparsify(net(), pattern="2:4")
    assert {site.compact.pattern for site in find_sites(copy.deepcopy(model)).values()} == {"2:4"}
    old = find_sites(model)["0.weight"].compact
    assert pickle.loads(pickle.dumps(old)).pattern == "2:4"
    del old.pattern  # as older versions made it
    assert pickle.loads(pickle.dumps(old)).pattern is None


def test_a_topology_that_breaks_it_is_refused() -> None:
    model = smet.sparsify(net(), pattern="2:4", include="0")
    other = smet.sparsify(net(), 0.5, include="0")
    message = r"0\.weight: topology: expected 2 active weights in every 4 .*same block_shape, density and pattern"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(other.state_dict())
    compact, bad = find_sites(model)["0.weight"].compact, find_sites(other)["0.weight"].compact
    with Unchanged(model), pytest.raises(ValueError, match="expected 2 active weights in every 4"):
        compact.set_mask(bad.mask())
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"0\.weight: topology: expected 2 active weights in every 4"),
    ):
        compact.topology = bad.topology.clone()
    other.load_state_dict(model.state_dict())  # free is free


@pytest.mark.parametrize(
    ("saved", "made", "message"),
    [
        ("2:4", None, r"0\.weight: expected pattern None, got '2:4' in the checkpoint; sparsify .* and pattern"),
        (None, "2:4", r"0\.weight: expected pattern 2:4, got None in the checkpoint"),
        ("fan_in", "2:4", r"0\.weight: expected pattern 2:4, got 'fan_in' in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_pattern(tmp_path: Path, saved: Any, made: Any, message: str) -> None:
    model = smet.sparsify(net(), 0.5, pattern=saved)
    smet.save_checkpoint(tmp_path / "a", model, smet.ActiveAdamW(model))
    smet.load_checkpoint(tmp_path / "a", smet.sparsify(net(), 0.5, pattern=saved, seed=1))
    model = smet.sparsify(net(), 0.5, pattern=made)
    with Unchanged(model), pytest.raises(ValueError, match=message):
        smet.load_checkpoint(tmp_path / "a", model)


@pytest.mark.parametrize("pattern", ["2:4", "fan_in"])
def test_on_the_meta_device(pattern: str) -> None:
    """A model that is drawn later has the topology it would have had at once."""
    with torch.device("meta"):
        later = smet.sparsify(nn.Sequential(nn.Linear(24, 16)), 0.5, pattern=pattern, seed=3)
    smet.materialize(later, device="cpu", seed=3)
    torch.manual_seed(3)
    at_once = smet.sparsify(nn.Sequential(nn.Linear(24, 16)), 0.5, pattern=pattern, seed=3)
    assert torch.equal(find_sites(later)["0.weight"].mask(), find_sites(at_once)["0.weight"].mask())
    assert find_sites(later)["0.weight"].compact.pattern == pattern


def test_a_resized_weight_keeps_to_it() -> None:
    model = smet.sparsify(net(), 0.25, pattern="fan_in", include="0")
    site, mask = find_sites(model)["0.weight"], torch.zeros(16, 24, dtype=torch.bool)
    mask[:, :3] = True
    site.compact.resize(site.values, mask.flatten())
    assert site.num_active == 48 and torch.equal(site.mask(), mask.flatten())
    mask[0, :9] = True
    with Unchanged(model), pytest.raises(ValueError, match=r"0\.weight: expected rows whose active .* got 3 to 9"):
        site.compact.resize(site.values, mask.flatten())


def test_a_weight_that_is_given_numbers_everywhere_is_free() -> None:
    model = smet.sparsify(net(), pattern="2:4", include="0")
    with pytest.warns(UserWarning, match="keeps every block"):
        model[0].weight.data = torch.ones(16, 24)
    compact = find_sites(model)["0.weight"].compact
    assert compact.num_active == 16 * 24 and compact.pattern is None
