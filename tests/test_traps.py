"""One test per trap of the design (format, ops, convert, optim, runtime). The name says the trap."""

import copy

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.masked import dense_weight, fill_masked, grids_of, masked_gradients, masks_of, parameter_of
from tests.support.slope import Slope, step_on
from tests.support.small_models import RaggedNet, two_layers
from tests.support.snapshots import assert_same, same_bits, snapshot
from tests.support.training import loss_on, train


def test_loading_an_optimizer_state_casts_integers_to_the_weights_dtype() -> None:
    model = smet.sparsify(two_layers().bfloat16(), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    train(model, optimizer, smet.TopologyManager(model, optimizer, total_steps=5000, every=3), steps=300)
    twin = smet.ActiveAdamW(model)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for site in find_sites(model).values():
        assert_same(dict(twin.state[site.values]), dict(optimizer.state[site.values]))
        assert twin.state[site.values]["step"].item() == 300
        assert torch.equal(twin.block_ages(site.values), optimizer.block_ages(site.values))


def test_deepcopy_and_assign_lose_attributes_of_parameters() -> None:
    model = smet.sparsify(two_layers(), density=0.5, block_shape=(4, 4))
    twin = copy.deepcopy(model)
    twin.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer = smet.ActiveAdamW(twin)
    train(twin, optimizer, smet.TopologyManager(twin, optimizer, total_steps=100, every=2, schedule="cosine"), steps=2)
    assert [s.layout for s in find_sites(twin).values()] == [s.layout for s in find_sites(model).values()]


def test_bfloat16_second_moments_never_decay() -> None:
    model = smet.sparsify(Slope(64, 64), density=0.5)
    optimizer = smet.ActiveAdamW(model, moment_dtype=torch.bfloat16)
    step_on(model, optimizer)
    model.slope.zero_()
    square = optimizer.state[find_sites(model)["weight"].values]["exp_avg_sq"]
    start = square.double().mean().item()
    for _ in range(100):
        step_on(model, optimizer)
    assert 0.88 < square.double().mean().item() / start < 0.93


def test_growth_needs_that_many_inactive_blocks() -> None:
    model = smet.sparsify(two_layers(), density=0.9)
    optimizer = smet.ActiveAdamW(model)
    with pytest.raises(ValueError, match=r"0\.1[01]"):
        smet.TopologyManager(model, optimizer, total_steps=100, drop_fraction=0.2)


def test_an_empty_drop_set_resets_nothing() -> None:
    model = smet.sparsify(two_layers(), density=0.02)
    optimizer = smet.ActiveAdamW(model)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=2, drop_fraction=0.1)
    train(model, optimizer, manager)
    train(model, optimizer, first=1)
    values = find_sites(model)["0.weight"].values
    state = optimizer.state[values]

    def seen() -> list[object]:
        moments = [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
        return [snapshot(model), moments, optimizer.block_ages(values).clone()]

    before = seen()
    manager.step()
    assert_same(seen(), before)


def test_parameters_without_a_gradient_are_skipped_and_biases_train() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    model[0].requires_grad_(False)
    optimizer = smet.ActiveAdamW(model, weight_decay=0.5)
    before = snapshot(model)[0]
    train(model, optimizer, steps=2)
    changed = {key for key, value in model.state_dict().items() if not same_bits(value, before[key])}
    assert changed == {"3.parametrizations.weight.original", "3.bias"}


def test_a_parameter_that_got_no_gradient_at_the_update_does_not_stop_it() -> None:
    model = nn.ModuleList([nn.Linear(12, 7), nn.Linear(12, 7)])
    smet.sparsify(model, density=0.5)
    optimizer = smet.ActiveAdamW(model)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=1)
    model[0](torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert manager.step() is not None


def test_a_python_float_rate_would_recompile_a_0d_tensor_works() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    rate = torch.tensor(1e-2)
    optimizer = smet.ActiveAdamW(model, lr=rate, warmup_steps=0)
    train(model, optimizer)
    rate.zero_()
    before = snapshot(model)
    train(model, optimizer, first=1)
    assert_same(snapshot(model), before)


def test_dividing_the_rate_by_density_in_a_loop_compounds() -> None:
    model = nn.ModuleList([Slope(8, 8) for _ in range(4)]).double()
    smet.sparsify(model, density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1e-3, warmup_steps=0)
    values = [site.values for site in find_sites(model).values()]
    for _ in range(3):
        before = [v.detach().clone() for v in values]
        sum(slope() for slope in model).backward()
        optimizer.step()
        optimizer.zero_grad()
        for v, b in zip(values, before, strict=True):
            torch.testing.assert_close(b - v.detach(), torch.full_like(b, 2e-3), rtol=1e-6, atol=0)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_rule_that_matches_no_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing_here"):
        smet.sparsify(two_layers(), rules={"nothing_here": 0.5})


def test_after_zero_grad_nothing_is_left_to_check() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=1)
    loss_on(model, 0).backward()
    model[0].bias.grad[0] = torch.nan
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert manager.step() is None and manager.history == []


def test_reported_densities_are_read_back() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(7, 1)), density=0.3)
    row = smet.report(model).sites[0]
    assert row.density == 2 / 7
    assert row.num_active == int((model[0].weight != 0).sum())


def test_a_saturating_age_freezes_old_weights() -> None:
    model = smet.sparsify(Slope(4, 4).double(), density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1e-4, lr_density_exponent=0.0)
    values = find_sites(model)["weight"].values
    for _ in range(300):
        before = values.detach().clone()
        step_on(model, optimizer)
    torch.testing.assert_close(before - values.detach(), torch.full_like(before, 1e-4), rtol=1e-6, atol=0)


def test_a_skipped_step_still_counts_as_a_step() -> None:
    model = smet.sparsify(Slope(4, 4), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    values = find_sites(model)["weight"].values
    model().backward()
    values.grad[2] = torch.inf
    optimizer.step()
    assert optimizer.block_ages(values).tolist() == [1] * len(values)


def test_the_warm_up_never_damps_the_stored_moments() -> None:
    states = []
    for warmup in (0, 100):
        torch.manual_seed(0)
        model = smet.sparsify(Slope(4, 4), density=0.5)
        optimizer = smet.ActiveAdamW(model, warmup_steps=warmup)
        for _ in range(5):
            step_on(model, optimizer)
        state = optimizer.state[find_sites(model)["weight"].values]
        states.append([state["exp_avg"], state["exp_avg_sq"]])
    assert_same(states[0], states[1])


def test_conv1d_of_torch_is_three_dimensional_but_no_stack() -> None:
    model = smet.sparsify(nn.Sequential(nn.Conv1d(6, 10, 3)), density=0.5, include="0.weight", block_shape=(4, 4))
    layout = find_sites(model)["0.weight"].layout
    assert (layout.num_matrices, layout.rows, layout.cols) == (1, 10, 18)


@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16], ids=str)
def test_what_hangs_over_the_edge_is_zero_always(moment_dtype: torch.dtype | None) -> None:
    model = smet.sparsify(RaggedNet(), density=0.5, block_shape=(16, 16))
    optimizer = smet.ActiveAdamW(model, lr=1e-2, weight_decay=0.1, moment_dtype=moment_dtype)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=100, every=3, grow="gradient", drop_fraction=0.4, schedule="cosine"
    )
    for _ in range(7):
        model(torch.randn(4, 50)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    for name, site in find_sites(model).items():
        outside = grids_of(model)[name].gather(torch.ones(site.layout.shape), masks_of(model)[name]) == 0
        state = optimizer.state[site.values]
        assert bool(outside.any())
        for tensor in (site.values, state["exp_avg"], state["exp_avg_sq"]):
            assert bool((tensor[outside] == 0).all()), name


def test_odd_sizes_as_in_llama_1b() -> None:
    model = nn.Sequential(nn.Linear(5461 // 64, 2048 // 64))
    smet.sparsify(model, density=0.3, block_shape=16)
    assert find_sites(model)["0.weight"].layout.num_blocks == 2 * 6


def test_a_change_of_topology_needs_no_new_storage() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=2)
    train(model, optimizer, manager)

    def addresses() -> list[int]:
        states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return [t.data_ptr() for t in [*model.parameters(), *model.buffers(), *states]]

    before = addresses()
    train(model, optimizer, manager, first=1)
    assert manager.history and addresses() == before


def test_loading_rebuilds_what_is_derived_from_the_topology() -> None:
    model = smet.sparsify(two_layers(), density=0.5, seed=1)
    other = smet.sparsify(two_layers(), density=0.5, seed=2)
    loss_on(other, 0).backward()
    other.zero_grad()
    other.load_state_dict(model.state_dict())
    for name in find_sites(model):
        assert same_bits(dense_weight(other, name), dense_weight(model, name))
    loss_on(model, 0).backward()
    loss_on(other, 0).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(p.grad, q.grad)


@pytest.mark.usefixtures("unpacked")
def test_the_allocator_reuses_addresses_within_a_forward() -> None:
    sparse = nn.Sequential(*[nn.Linear(40, 40) for _ in range(12)])
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5)
    fill_masked(plain, sparse)
    x = torch.randn(3, 40)
    sparse(x).sum().backward()
    plain(x).sum().backward()
    for name, expected in masked_gradients(plain, sparse).items():
        assert same_bits(parameter_of(sparse, name).grad, expected), name
