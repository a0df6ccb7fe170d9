"""The planned bytes of each density stage are those that the run then has."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from tests.plan.measured import Gradients, bytes_by_kind

STAGES = [(2, 0.5), (4, 0.2), (6, 0.9)]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 33))


def planned(model: nn.Module, density: float | None, stages: Any = STAGES, **options: Any) -> smet.Plan:
    return smet.plan(
        model,
        density,
        batch=3,
        compiled=False,
        inputs=lambda batch, sequence: torch.zeros(batch, 70),
        loss_fn=lambda model, x: model(x).square().mean(),
        density_schedule=stages,
        **options,
    )


@pytest.mark.parametrize("block_shape", [1, (1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("moment_dtype", [None, "int8"])
@pytest.mark.parametrize("rules", [None, {"0.weight": 0.3}], ids=str)
def test_bytes_of_each_stage_are_exact(rules: Any, moment_dtype: Any, block_shape: Any) -> None:
    plan = planned(net(), 1.0, block_shape=block_shape, moment_dtype=moment_dtype, rules=rules)
    model = smet.sparsify(net(), 1.0, block_shape=block_shape, rules=rules, dense_as_compact=True)
    optimizer = smet.ActiveAdamW(model, lr=1e-3, moment_dtype=moment_dtype)
    manager = smet.TopologyManager(model, optimizer, total_steps=9, schedule="none", density_schedule=STAGES)
    gradients, seen = Gradients(optimizer), {}
    for step in range(8):
        loss: Tensor = model(torch.randn(3, 70)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen[step] = bytes_by_kind(model, optimizer, gradients.of)
        manager.step()
    assert [(stage.step, stage.density) for stage in plan.stages] == [(0, 1.0), *STAGES]
    for stage in plan.stages:
        assert stage.stored == seen[stage.step]
    assert plan.stages[0].stored == plan.sparse.stored and plan.stages[0].peak == plan.sparse.peak


def test_the_stage_with_the_highest_peak_is_named() -> None:
    plan = planned(net(), 0.2, [(10, 0.6), (1000, 0.3)])
    first, second, third = (stage.peak for stage in plan.stages)
    assert first < third < second
    table = plan.stage_table().splitlines()
    assert len(table) == 5 and table[-1].endswith("from step 10") and plan.stage_table() in str(plan)


def test_a_compact_model_and_one_without_stages() -> None:
    model = smet.sparsify(net(), 0.5)
    assert [stage.density for stage in planned(model, None, [(5, 0.25)]).stages] == [0.5, 0.25]
    assert planned(model, None, None).stages == ()


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([(5, 1.0)], {}, "stages that change the model"),
        ([(5, 0.5), (3, 0.2)], {}, "a step after 5"),
        ([(5, 2)], {}, r"density_schedule\[0\]"),
        ([(5, 0.5)], {"fits": "1GB"}, "density_schedule: expected none beside fits"),
    ],
    ids=str,
)
def test_bad_input(stages: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(net(), 1.0, stages, **options)
