"""Ages, churn and survival of a trained model are those of a diary of its topologies."""

from collections import Counter

import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites


def trained(num_steps: int, every: int, optimizer_class: type = smet.ActiveAdamW) -> tuple[smet.Inspection, Counter]:
    """Returns an inspection after training, and how many active blocks were born at which step, of all weights."""
    torch.manual_seed(0)
    model = smet.sparsify(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)), 0.4)
    parameters = model if optimizer_class is smet.ActiveAdamW else model.parameters()
    optimizer = optimizer_class(parameters, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=every, drop_fraction=0.3)
    born = {name: torch.zeros(site.layout.num_blocks, dtype=torch.int64) for name, site in find_sites(model).items()}
    for step in range(1, num_steps + 1):
        before = {name: site.mask() for name, site in find_sites(model).items()}
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        for name, site in find_sites(model).items():
            born[name][site.mask() & ~before[name]] = step
    births = Counter(b for name, site in find_sites(model).items() for b in born[name][site.mask()].tolist())
    return smet.inspect(model, torch.randn(2, 12), manager=manager), births


def test_ages_and_cohorts_are_those_of_a_diary() -> None:
    found, births = trained(25, 5)
    assert found.age_counts == {25 - born: count for born, count in sorted(births.items(), reverse=True)}
    assert {c.born_step: c.num_active for c in found.cohorts if c.num_active} == dict(births)
    grown = {c.born_step: c.num_grown for c in found.cohorts}
    assert grown[0] == sum(site.num_active for site in found.sites)
    for step in (5, 10, 15, 20, 25):
        churned = sum(round(dict(site.history.churn)[step] * site.num_active) for site in found.sites)
        assert grown[step] == churned > 0
    newest = found.cohorts[-1]
    assert newest.born_step == 25 and newest.survival_fraction == 1
    assert all(c.survival_fraction is not None and 0 <= c.survival_fraction <= 1 for c in found.cohorts)


def test_churn_and_exploration_are_those_of_the_manager() -> None:
    found, _ = trained(12, 5)
    for site in found.sites:
        assert [step for step, _ in site.history.churn] == [5, 10]
        assert site.history.explored_fraction is not None and site.history.explored_fraction > site.density
        assert site.history.mean_age is not None and 0 < site.history.mean_age < 12
    text = str(found)
    assert "churn" in text and "active blocks by age in steps:" in text and "still active, by step of birth:" in text


def test_an_optimizer_without_ages_leaves_them_out() -> None:
    found, _ = trained(12, 5, torch.optim.AdamW)
    assert found.age_counts == {} and found.cohorts == ()
    assert "age" not in str(found) and "churn" in str(found)


def test_an_optimizer_alone_knows_ages() -> None:
    torch.manual_seed(0)
    model = smet.sparsify(nn.Linear(6, 6), 0.5)
    optimizer = smet.ActiveAdamW(model)
    for _ in range(3):
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
    found = smet.inspect(model, torch.randn(2, 6), optimizer=optimizer)
    assert found.age_counts == {3: 18}
    assert [(c.born_step, c.num_grown, c.num_active) for c in found.cohorts] == [(0, 18, 18)]
