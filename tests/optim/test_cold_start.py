"""Measures the cold start: how far a grown weight moves in its first steps after a late topology update."""

import pytest
import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.rows import rows_of
from tests.support.slope import Slope, step_on

LR = 1e-4
LATE = 1000
VERY_LATE = 4000
WARMUP = 100


def grow_late(make, late: int = LATE, **options) -> tuple[Slope, torch.optim.Optimizer, Tensor, Tensor]:
    """Trains `late` steps and updates the topology once; returns the values and the rows that were grown."""
    model = Slope(8, 8).double()
    smet.sparsify(model, density=0.25)
    optimizer = make(model, lr=LR, **options)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=10 * late, every=late, drop_fraction=0.25, schedule="constant"
    )
    site = find_sites(model)["weight"]
    before = site.compact.mask().clone()
    for _ in range(late):
        step_on(model, optimizer)
        manager.step()
    after = site.compact.mask()
    grown = rows_of(after, after & ~before)
    assert len(grown) == len(manager.history) * 4 == 4
    assert bool((site.values[grown] == 0).all())
    return model, optimizer, site.values, grown


@pytest.mark.parametrize("initial_warmup", [0, 5, 1000])
def test_initial_blocks_start_by_a_warmup_of_their_own(initial_warmup: int) -> None:
    model = smet.sparsify(Slope(8, 8).double(), density=0.25)
    options = {"warmup_steps": WARMUP, "initial_warmup_steps": initial_warmup, "lr_density_exponent": 0.0}
    optimizer = smet.ActiveAdamW(model, lr=LR, **options)
    values = find_sites(model)["weight"].values
    for age in range(1, 9):
        before = values.detach().clone()
        step_on(model, optimizer)
        expected = LR * min(1.0, age / max(1, initial_warmup))
        torch.testing.assert_close(before - values.detach(), torch.full_like(before, expected), rtol=1e-5, atol=0)


def adam_step(t: int, decay_time: int) -> float:
    """Returns |m_hat| / sqrt(v_hat) of a constant gradient seen t times, corrected for decay_time steps."""
    m_hat = (1 - 0.9**t) / (1 - 0.9**decay_time)
    v_hat = (1 - 0.999**t) / (1 - 0.999**decay_time)
    return m_hat / v_hat**0.5


def test_the_naive_rule_starts_3_16_times_too_fast_and_peaks_at_6_6() -> None:
    model, optimizer, values, grown = grow_late(smet.NaiveAdamW, VERY_LATE, lr_density_exponent=0.0)
    moved = []
    for _ in range(20):
        before = values[grown].detach().clone()
        step_on(model, optimizer)
        moved.append(((before - values[grown].detach()) / LR).unique())
    first, twelfth = moved[0].item(), moved[11].max().item()
    assert first == pytest.approx(adam_step(1, VERY_LATE + 1), rel=1e-6)
    assert first == pytest.approx(3.16, abs=0.05)
    assert twelfth == pytest.approx(adam_step(12, VERY_LATE + 12), rel=1e-6)
    assert twelfth == max(m.max().item() for m in moved) == pytest.approx(6.6, abs=0.1)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_smet_starts_at_lr_over_warmup_times_the_density_factor(exponent: float) -> None:
    model, optimizer, values, grown = grow_late(smet.ActiveAdamW, warmup_steps=WARMUP, lr_density_exponent=exponent)
    rate = LR * 0.25**-exponent
    for age in range(1, WARMUP + 20):
        before = values.detach().clone()
        step_on(model, optimizer)
        moved = before - values.detach()
        newcomers = torch.full_like(moved[grown], rate * min(1, age / WARMUP))
        torch.testing.assert_close(moved[grown], newcomers, rtol=1e-6, atol=0)
        old = torch.ones_like(moved, dtype=torch.bool)
        old[grown] = False
        torch.testing.assert_close(moved[old], torch.full_like(moved[old], rate), rtol=1e-6, atol=0)


def test_smet_without_warm_up_starts_at_lr() -> None:
    model, optimizer, values, grown = grow_late(smet.ActiveAdamW, warmup_steps=0, lr_density_exponent=0.0)
    step_on(model, optimizer)
    torch.testing.assert_close(-values[grown].detach(), torch.full_like(values[grown], LR), rtol=1e-6, atol=0)
