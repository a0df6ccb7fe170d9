"""Ages stay right: more updates than a byte can count, against an oracle that keeps int64."""

import copy

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.blocks import Grid
from tests.support.dense_twin import DenseTwin, SmetAdamW, TwinSite
from tests.support.slope import Slope, step_on


def follow(
    every: int,
    num_updates: int,
    size: int,
    drop: float,
    betas: tuple[float, float] = (0.9, 0.999),
    initial_warmup: int | None = None,
    check_ages: bool = True,
) -> tuple[Tensor, int]:
    """Weights (always) and ages (if asked) equal the oracle's at every update.

    Returns the final ages, and the number of entries in the table of births.
    """
    model = nn.Linear(size, size, bias=False).double()
    twin_model = copy.deepcopy(model)
    smet.sparsify(model, density=0.4)
    site = find_sites(model)["weight"]
    with torch.no_grad():
        twin_model.weight.copy_(model.weight)
    grid = Grid((size, size), (1, 1))
    warmups = {"warmup_steps": 20, "initial_warmup_steps": initial_warmup}
    rule = SmetAdamW(1e-2, betas=betas, **warmups)
    twin = DenseTwin(twin_model, {"weight": TwinSite(grid, site.compact.mask().clone())}, rule)
    optimizer = smet.ActiveAdamW(model, lr=1e-2, betas=betas, **warmups)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=10**6, every=every, drop_fraction=drop, schedule="constant", auto_step=False
    )
    generator = torch.Generator().manual_seed(0)
    ages = torch.empty(0)
    for step in range(1, every * num_updates + 1):
        x = torch.randn(4, size, generator=generator, dtype=torch.float64)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        twin.step(x, x)
        ages = optimizer.block_ages(site.values)
        if check_ages:
            assert torch.equal(ages, twin.states["weight"]["age"].flatten()[twin.sites["weight"].mask]), step
        event = manager.step()
        if event is not None:
            twin.change_topology(
                "weight", event.drop_fraction, site.compact.mask(), "random", event.step, manager.min_age
            )
            torch.testing.assert_close(model.weight.detach(), twin.weights["weight"], atol=1e-10, rtol=1e-10)
    assert len(manager.history) == num_updates
    return ages, len(optimizer.state[site.values]["births"])


@pytest.mark.parametrize("every", [1, 2])
def test_more_updates_than_a_byte_counts(every: int) -> None:
    ages, _ = follow(every, 330, size=12, drop=0.1)
    assert int(ages.max()) > 255


def test_more_living_generations_than_a_byte_counts() -> None:
    """Few blocks die, so more than 256 birth steps are alive at once."""
    ages, size = follow(1, 330, size=60, drop=0.003)
    assert len(ages.unique()) > 256
    assert size == 512


@pytest.mark.parametrize(("initial_warmup", "merges"), [(None, True), (0, True), (200, True), (300, False)])
def test_generations_too_old_to_matter_may_merge(initial_warmup: int | None, merges: bool) -> None:
    """At beta2 = 0.8 a weight older than 168 steps has bias corrections of 1; both warm-ups must be over too."""
    _, size = follow(1, 330, size=60, drop=0.003, betas=(0.8, 0.8), initial_warmup=initial_warmup, check_ages=False)
    assert size == (256 if merges else 512)


def test_a_saturating_counter_would_freeze_old_weights() -> None:
    """At age 255 and beyond the step stays what Adam makes it: a constant gradient moves by lr."""
    model = smet.sparsify(Slope(4, 4).double(), density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1e-4, warmup_steps=10, lr_density_exponent=0.0)
    values = find_sites(model)["weight"].values
    for _ in range(700):
        before = values.detach().clone()
        step_on(model, optimizer)
    torch.testing.assert_close(before - values.detach(), torch.full_like(before, 1e-4), rtol=1e-6, atol=0)
    assert bool((optimizer.block_ages(values) == 700).all())


def test_one_byte_per_weight() -> None:
    model = smet.sparsify(nn.Linear(64, 64), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    state = optimizer.state[find_sites(model)["weight"].values]
    assert state["generation"].dtype == torch.uint8 and state["generation"].shape == (2048,)
    assert state["births"].dtype == torch.int64
