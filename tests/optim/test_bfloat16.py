"""bf16 weights and states round stochastically: right on average, a function of the seed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.slope import Slope, step_on
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train

SIZE = 128


def flat_model(start: float, slope: float = 1.0) -> tuple[Slope, Tensor]:
    """Returns a bf16 model with all active weights at `start`."""
    model = smet.sparsify(Slope(SIZE, SIZE, slope).bfloat16(), density=0.5)
    values = find_sites(model)["weight"].values
    nn.init.constant_(values, start)
    return model, values


def test_weights_move_by_a_quarter_of_a_unit_on_average() -> None:
    """At 1.5 the spacing of bf16 is 2^-7: a step of 2^-9 takes a quarter of the weights one unit down."""
    model, values = flat_model(1.5)
    step_on(model, smet.ActiveAdamW(model, lr=2**-9, warmup_steps=0, lr_density_exponent=0.0))
    assert set(values.unique().tolist()) == {1.5, 1.5 - 2**-7}
    moved = (values < 1.5).double().mean().item()
    sigma = (0.25 * 0.75 / values.numel()) ** 0.5
    assert abs(moved - 0.25) < 5 * sigma


def test_many_small_steps_add_up() -> None:
    """In 100 steps of a hundredth of a unit, rounding to nearest would not move at all."""
    model, values = flat_model(1.5)
    optimizer = smet.ActiveAdamW(model, lr=2**-7 / 100, warmup_steps=0, lr_density_exponent=0.0)
    for _ in range(100):
        step_on(model, optimizer)
    unit = 2**-7
    sigma = unit * (100 * 0.01 * 0.99 / values.numel()) ** 0.5
    assert abs((1.5 - values.double().mean().item()) - unit) < 5 * sigma


def test_nearest_rounding_when_asked() -> None:
    model, values = flat_model(1.5)
    options = {"warmup_steps": 0, "lr_density_exponent": 0.0, "stochastic_rounding": False}
    step_on(model, smet.ActiveAdamW(model, lr=2**-9, **options))
    assert values.unique().tolist() == [1.5]


def test_second_moments_in_bfloat16_decay() -> None:
    """0.999 v rounds back to v in bf16; with stochastic rounding 500 steps leave 0.999^500 = 0.61 of it."""
    model = smet.sparsify(Slope(SIZE, SIZE), density=0.5)
    optimizer = smet.ActiveAdamW(model, moment_dtype=torch.bfloat16, lr=0.0)
    step_on(model, optimizer)
    values = find_sites(model)["weight"].values
    square = optimizer.state[values]["exp_avg_sq"]
    assert square.dtype == torch.bfloat16
    start = square.double().mean().item()
    assert start == pytest.approx(0.001, rel=1e-3)
    model.slope.zero_()
    for _ in range(500):
        step_on(model, optimizer)
    square = optimizer.state[values]["exp_avg_sq"]
    spread = square.double().std().item() / square.numel() ** 0.5
    assert abs(square.double().mean().item() - start * 0.999**500) < 5 * spread
    assert optimizer.state[values]["exp_avg"].double().abs().max().item() < 1e-6


def test_states_of_bfloat16_weights_are_fp32_by_default() -> None:
    model = smet.sparsify(two_layers().bfloat16(), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    train(model, optimizer)
    assert {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_a_run_is_a_function_of_its_seed(dtype: torch.dtype, moment_dtype: Any) -> None:
    def run(seed: int) -> list[object]:
        torch.manual_seed(0)
        model = smet.sparsify(two_layers().to(dtype), density=0.5)
        optimizer = smet.ActiveAdamW(model, lr=1e-2, moment_dtype=moment_dtype, seed=seed)
        torch.manual_seed(torch.seed())
        losses = train(model, optimizer, steps=10)
        return [losses, snapshot(model)]

    assert_same(run(5), run(5))
    if (dtype, moment_dtype) != (torch.float32, torch.float32):
        with pytest.raises(AssertionError):
            assert_same(run(5), run(6))


def test_the_global_generator_is_never_touched() -> None:
    model = smet.sparsify(two_layers().bfloat16(), density=0.5)
    optimizer = smet.ActiveAdamW(model, moment_dtype=torch.bfloat16)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=2)
    state = torch.get_rng_state()
    train(model, optimizer, manager, steps=4)
    assert manager.history
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_differs_between_parameters_and_steps() -> None:
    model = nn.ModuleList([Slope(SIZE, SIZE).bfloat16() for _ in range(2)])
    smet.sparsify(model, density=0.9, exclude=["1"], select="magnitude")
    smet.sparsify(model, density=0.9, exclude=["0"], select="magnitude")
    nn.init.constant_(find_sites(model)["0.weight"].values, 1.5)
    nn.init.constant_(find_sites(model)["1.weight"].values, 1.5)
    find_sites(model)["1.weight"].compact.load_state_dict(find_sites(model)["0.weight"].compact.state_dict())
    optimizer = smet.ActiveAdamW(model, lr=2**-9, warmup_steps=0, lr_density_exponent=0.0)
    values = [site.values for site in find_sites(model).values()]
    seen = []
    for _ in range(2):
        before = [v.detach().clone() for v in values]
        (model[0]() + model[1]()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += [(v != b).detach() for v, b in zip(values, before, strict=True)]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_noise_follows_the_dense_position() -> None:
    """A weight rounds the same whatever else is active."""
    moved = []
    for seed in (1, 2):
        model = smet.sparsify(Slope(SIZE, SIZE).bfloat16(), density=0.5, seed=seed)
        site = find_sites(model)["weight"]
        nn.init.constant_(site.values, 1.5)
        step_on(model, smet.ActiveAdamW(model, lr=2**-9, warmup_steps=0, lr_density_exponent=0.0))
        moved.append((model.weight.detach() < 1.5, model.weight.detach() != 0))
    both = moved[0][1] & moved[1][1]
    assert int(both.sum()) > 1000
    assert torch.equal(moved[0][0][both], moved[1][0][both])
