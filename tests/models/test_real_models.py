"""Takes real model classes through their whole life: sparsify, train, update, checkpoint, export."""

import copy
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import direct, find_sites
from tests.models.classes import REAL_MODELS, mixtral
from tests.support.masked import fill_masked, masked_gradients, masks_of, parameter_of
from tests.support.snapshots import assert_same, same_bits, snapshot


def make(name: str, seed: int = 0, block_shape: int | tuple[int, int] = 1) -> nn.Module:
    torch.manual_seed(seed)
    return smet.sparsify(REAL_MODELS[name].make(), density=0.4, block_shape=block_shape, seed=seed)


def logits(model: nn.Module, name: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**REAL_MODELS[name].batch()).logits


def train(model: nn.Module, name: str, optimizer: torch.optim.Optimizer, manager: smet.TopologyManager) -> list[float]:
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**REAL_MODELS[name].batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("name", list(REAL_MODELS))
def test_life_of(name: str, grow: str, tmp_path: Path) -> None:
    model = make(name)
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=2)
    manager = smet.TopologyManager(model, optimizer, total_steps=100, every=3, grow=grow)
    before = masks_of(model)
    losses = train(model, name, optimizer, manager)
    assert all(torch.tensor(losses).isfinite()) and [e.step for e in manager.history] == [3]
    assert all(not torch.equal(mask, before[site]) for site, mask in masks_of(model).items())
    smet.save_checkpoint(tmp_path / "checkpoint", model, optimizer, manager)
    other = make(name, seed=1)
    other_optimizer = smet.ActiveAdamW(other, lr=1e-2, warmup_steps=2)
    other_manager = smet.TopologyManager(other, other_optimizer, total_steps=100, every=3, grow=grow)
    smet.load_checkpoint(tmp_path / "checkpoint", other, other_optimizer, other_manager)
    assert_same(snapshot(other, other_optimizer), snapshot(model, optimizer))
    expected = logits(model, name)
    assert same_bits(logits(other, name), expected)
    dense = smet.export_dense(model)
    with direct.unpacked():
        assert same_bits(logits(dense, name), logits(model, name))
    assert not find_sites(dense) and type(dense) is type(model)


@pytest.mark.parametrize("name", list(REAL_MODELS))
def test_what_becomes_compact(name: str) -> None:
    model = make(name)
    names, plain = set(find_sites(model)), dict(model.named_parameters())
    for glob in REAL_MODELS[name].compact:
        assert any(fnmatch(site, glob) for site in names), glob
    for glob in REAL_MODELS[name].dense:
        assert not any(fnmatch(site, glob) for site in names), glob
        assert any(fnmatch(p, glob) for p in plain), glob


@pytest.mark.parametrize("name", list(REAL_MODELS))
def test_gradients_are_those_of_the_masked_dense_model(name: str) -> None:
    make = partial(mixtral, experts_implementation="eager") if name == "mixtral" else REAL_MODELS[name].make
    sparse = make().eval().double()
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.4, block_shape=(1, 4))
    fill_masked(plain, sparse)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in REAL_MODELS[name].batch().items()}
    sparse(**batch).loss.backward()
    plain(**batch).loss.backward()
    for parameter, expected in masked_gradients(plain, sparse).items():
        grad = parameter_of(sparse, parameter).grad
        if expected is None:
            assert grad is None, parameter
        else:
            torch.testing.assert_close(
                grad, expected, atol=1e-10, rtol=1e-10, msg=lambda text, p=parameter: f"{p}: {text}"
            )


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_multiply_experts(experts: str) -> None:
    sparse = mixtral(experts_implementation=experts).eval()
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.4)
    fill_masked(plain, sparse)
    batch = REAL_MODELS["mixtral"].batch()
    sparse(**batch).loss.backward()
    plain(**batch).loss.backward()
    for parameter, expected in masked_gradients(plain, sparse).items():
        assert expected is not None and same_bits(parameter_of(sparse, parameter).grad, expected), parameter
