"""Numbers of NumPy, 0-d arrays and tensors are plain numbers to optimizer and manager, and in what they save."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train

OF_OPTIMIZER: list[dict[str, Any]] = [
    {"lr": np.float32(0.01), "eps": np.float32(1e-8), "weight_decay": np.float64(0.1)},
    {"betas": (np.float32(0.9), np.float16(0.99)), "warmup_steps": np.int64(5), "initial_warmup_steps": np.int32(2)},
    {"betas": np.array([0.9, 0.99]), "lr_density_exponent": np.float32(0.5)},
    {"betas": torch.tensor([0.9, 0.99]), "eps": np.array(1e-6), "seed": np.uint64(3)},
    {"stochastic_rounding": np.bool_(False), "warmup_steps": torch.tensor(4)},
]
OF_MANAGER: list[dict[str, Any]] = [
    {"total_steps": np.int64(100), "every": np.uint8(2), "seed": np.int32(-1)},
    {"drop_fraction": np.float32(0.2), "final_drop_fraction": np.float16(0), "stop_fraction": np.array(0.5)},
]


@pytest.mark.parametrize(
    ("of_optimizer", "of_manager"),
    [(options, {}) for options in OF_OPTIMIZER] + [({}, options) for options in OF_MANAGER],
    ids=str,
)
def test_trains_and_saves(of_optimizer: dict[str, Any], of_manager: dict[str, Any], tmp_path: Path) -> None:
    model = smet.sparsify(
        two_layers(), density=np.float32(0.4), block_shape=(np.int64(1), np.int64(2)), seed=np.int64(1)
    )  # type: ignore[arg-type]
    optimizer = smet.ActiveAdamW(model, **of_optimizer)
    for option in of_optimizer.keys() & optimizer.defaults.keys():
        values = optimizer.param_groups[0][option]
        plain = [values] if option != "betas" else list(values)
        assert {type(value) for value in plain} <= {int, float}
        assert plain == [float(value) for value in np.ravel(np.asarray(of_optimizer[option]))]
    manager = smet.TopologyManager(model, optimizer, **({"total_steps": 100, "every": 2} | of_manager))
    train(model, optimizer, manager, steps=5)
    assert manager.history
    smet.save_checkpoint(tmp_path / "run", model, optimizer, manager)
    state = snapshot(model, optimizer, manager)
    train(model, optimizer, manager, steps=3)
    smet.load_checkpoint(tmp_path / "run", model, optimizer, manager)
    assert_same(snapshot(model, optimizer, manager), state)


def test_equals_the_plain_numbers() -> None:
    options = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.125, "weight_decay": 0.25, "lr_density_exponent": 0.5}
    states = []
    for convert in (float, np.float32, torch.tensor):
        torch.manual_seed(0)
        model = smet.sparsify(two_layers(), density=0.4)
        given = {k: tuple(map(convert, v)) if isinstance(v, tuple) else convert(v) for k, v in options.items()}
        optimizer = smet.ActiveAdamW(model, warmup_steps=np.int64(3), **given)
        train(model, optimizer, steps=3)
        states.append(snapshot(model)[0])
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])
