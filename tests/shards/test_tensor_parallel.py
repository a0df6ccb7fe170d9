"""A model that tensor parallelism cuts trains as one process trains it with the same slabs."""

from typing import Any

import pytest
import torch

import smet_compile as smet
from tests.shards.parallel import dense_weights, parallel_net, whole_net
from tests.shards.setting import train_steps
from tests.support.ranks import processes

FP64, FP32 = torch.float64, torch.float32
HALVES: Any = {"gradient": 0.5, "random": 0.5}
CASES: dict[str, tuple[int, int, Any, torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "single weights": (2, 2, 1, FP64, {}, {}),
    "tiles in four parts, gradients": (4, 4, 4, FP64, {}, {"grow": "gradient"}),
    "runs, twice": (4, 2, (1, 4), FP64, {}, {}),
    "gradients, twice": (4, 2, 1, FP64, {}, {"grow": "gradient"}),
    "gradients of two steps, twice": (4, 2, 1, FP64, {}, {"grow": "gradient", "window": 2}),
    "fp32, momentum": (2, 2, 4, FP32, {}, {"grow": "momentum", "drop": "saliency"}),
    "dropped at random, two ways to grow": (2, 2, 1, FP64, {}, {"drop": "random", "grow": HALVES}),
    "equal fan-in with ablation": (
        2,
        2,
        1,
        FP64,
        {"pattern": "fan_in"},
        {"grow": "gradient", "ablation_threshold": 0.6},
    ),
    "two of four, twice": (4, 2, 1, FP64, {"pattern": "2:4", "density": None}, {"grow": "gradient"}),
}
"""Number of ranks, parts of a weight, block shape, dtype, and the options of sparsify and of the manager."""


def run(rank: int, world: int, name: str, looks: bool = False) -> list[str]:
    """Returns what differs between the model that the ranks hold together and that of one process."""
    _, tp, block_shape, dtype, of_sparsify, of_manager = CASES[name]
    if of_manager.get("grow") is HALVES:
        of_manager = of_manager | {"grow": smet.mix_growth(HALVES)}
    dp = world // tp
    model, _ = parallel_net(dtype, tp, dp, block_shape, fully=dp > 1, **of_sparsify)
    whole = whole_net(dtype, block_shape, **of_sparsify)
    runs = []
    for each in (model, whole):
        optimizer = smet.ActiveAdamW(each, 1e-2, warmup_steps=3)
        manager = smet.TopologyManager(each, optimizer, total_steps=60, every=8, schedule="cosine", **of_manager)
        runs.append((each, optimizer, manager))
    start, expected_start = dense_weights(model), dense_weights(whole)
    losses = train_steps(runs[0], range(30), rank // tp, dp, looks)
    expected = train_steps(runs[1], range(30), 0, 1)
    tolerance = 1e-12 if dtype is FP64 else 1e-6
    found = [f"start of {name}" for name in start if not torch.equal(start[name], expected_start[name])]
    found += [f"loss {step}" for step in range(30) if abs(losses[step] - expected[step]) > tolerance]
    end, expected_end = dense_weights(model), dense_weights(whole)
    matrices = [name for name in end if name.endswith("weight")]
    found += [f"topology of {name}" for name in matrices if not torch.equal(end[name] != 0, expected_end[name] != 0)]
    history = runs[1][2].history
    assert len(history) == 3 and sum(event.num_dropped for event in history) > 0
    if runs[0][2].history != runs[1][2].history:
        found.append("history")
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(name: str) -> None:
    world = CASES[name][0]
    assert processes.run(world, run, name) == [[]] * world


def test_a_validation_loss_that_is_kept_changes_nothing() -> None:
    assert processes.run(4, run, "gradients, twice", True) == [[]] * 4
