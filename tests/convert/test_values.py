"""Active weights start from the dense ones, chosen at random or by magnitude, rescaled or not, on any device."""

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.blocks import Grid
from tests.support.small_models import two_layers
from tests.support.snapshots import same_bits, snapshot
from tests.support.training import train


def test_random_is_rescaled_by_one_over_root_density() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).double()
    before = model[0].weight.detach().clone()
    smet.sparsify(model, density=0.25)
    active = Grid((64, 64), (1, 1)).spread(find_sites(model)["0.weight"].compact.mask())
    torch.testing.assert_close(model[0].weight.detach(), before * active * 2, atol=1e-10, rtol=1e-10)


def test_random_without_rescale() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.detach().clone()
    smet.sparsify(model, density=0.25, rescale=False)
    active = Grid((8, 8), (1, 1)).spread(find_sites(model)["0.weight"].compact.mask())
    assert same_bits(model[0].weight.detach(), torch.where(active, before, 0.0))


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 4), (4, 4)], ids=str)
def test_magnitude_keeps_the_largest_blocks_as_they_are(block_shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(13, 10))
    before = model[0].weight.detach().clone()
    smet.sparsify(model, density=0.4, block_shape=block_shape, select="magnitude")
    grid = Grid((10, 13), block_shape)
    site = find_sites(model)["0.weight"]
    best = grid.mean(before.double().abs()).topk(site.num_active).indices
    assert sorted(best.tolist()) == site.compact.mask().nonzero().flatten().tolist()
    assert same_bits(model[0].weight.detach(), torch.where(grid.spread(site.compact.mask()), before, 0.0))


def test_magnitude_with_rescale() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).double()
    before = model[0].weight.detach().clone()
    smet.sparsify(model, density=0.25, select="magnitude", rescale=True)
    active = model[0].weight.detach() != 0
    torch.testing.assert_close(model[0].weight.detach(), before * active * 2, atol=1e-10, rtol=1e-10)


def test_the_choice_is_a_function_of_the_seed() -> None:
    def masks(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(torch.seed())
        model = smet.sparsify(two_layers(), density=0.5, seed=seed)
        return [site.compact.mask() for site in find_sites(model).values()]

    assert all(torch.equal(a, b) for a, b in zip(masks(1), masks(1), strict=True))
    assert not torch.equal(masks(1)[0], masks(2)[0])


def test_the_global_generator_is_left_alone() -> None:
    model = two_layers()
    state = torch.get_rng_state()
    smet.sparsify(model, density=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_layers_get_different_masks() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), density=0.5)
    first, second = (site.compact.mask() for site in find_sites(model).values())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = smet.sparsify(two_layers().to(dtype), density=0.5)
    assert model[0].weight.dtype == dtype
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("block_shape", [1, (16, 16)], ids=str)
def test_meta_device(block_shape: int | tuple[int, int]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 5461), nn.Linear(5461, 4096))
    smet.sparsify(model, density=0.25, block_shape=block_shape)
    rows = smet.report(model).sites
    expected = 4096 * 5461 if block_shape == 1 else 256 * 342
    assert [row.num_blocks for row in rows] == [expected, expected]
    assert [row.num_active for row in rows] == [expected // 4, expected // 4]
    assert all(p.device.type == "meta" for p in model.parameters())


def test_an_optimizer_made_before_goes_on_with_the_values_or_is_refused() -> None:
    model = two_layers()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    smet.sparsify(model, density=0.5)
    held = {id(p) for group in early.param_groups for p in group["params"]}
    if not {id(p) for p in model.parameters()} <= held:
        with pytest.raises(ValueError, match=r"(?i)optimizer"):
            smet.TopologyManager(model, early, total_steps=100)
        return
    before = snapshot(model)[0]
    train(model, early)
    assert not any(
        same_bits(before[name], value) for name, value in model.state_dict().items() if "topology" not in name
    )


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_dense_moments_made_before_do_not_go_on_silently(how: dict[str, bool]) -> None:
    model = two_layers()
    early = torch.optim.Adam(model.parameters(), lr=0.1, **how)
    train(model, early)
    smet.sparsify(model, density=0.5)
    with pytest.raises(ValueError, match="exp_avg"):
        smet.TopologyManager(model, early, total_steps=100)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="sparsify was called after this optimizer had stepped; make it anew"):
        train(model, early)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_compiled_model_made_before_reads_the_new_weights() -> None:
    model = two_layers().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 12)
    before = compiled(x).detach()
    smet.sparsify(model, density=0.5)
    after = compiled(x).detach()
    assert same_bits(after, smet.export_dense(model)(x).detach()) and not same_bits(after, before)
