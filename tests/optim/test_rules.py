"""Tests every rule: like its dense twin, moved with the topology, resumed, in every dtype, in 8 bits, in backward."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.optim.rules_table import ROWS, Row
from tests.support.dense_twin import DenseTwin, TwinSite
from tests.support.masked import dense_weight, fill_masked, grids_of, masks_of
from tests.support.small_models import RaggedNet, batch
from tests.support.snapshots import assert_same, snapshot
from tests.train_step.setting import assert_equal_runs, batch_of, sparse, twice

SHAPES = [(1, 1), (1, 16), (16, 16)]
every_rule = pytest.mark.parametrize("name", list(ROWS))
every_block_shape = pytest.mark.parametrize("block_shape", SHAPES, ids=str)


def make(row: Row, block_shape: tuple[int, int] = (1, 1), dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """Returns a sparse model, its optimizer and a manager that moves the topology every ten steps."""
    torch.manual_seed(0)
    model = smet.sparsify(RaggedNet().to(dtype), density=0.5, block_shape=block_shape, seed=3)
    optimizer = row.make(model, **more)
    manager = smet.TopologyManager(
        model, optimizer, auto_step=False, total_steps=200, every=10, drop_fraction=0.4, schedule="cosine"
    )
    return model, optimizer, manager


def train(model: nn.Module, optimizer: Any, manager: Any, first: int, steps: int, dtype: Any = torch.float64) -> Tensor:
    """Trains for some steps and returns their losses."""
    losses = []
    for step in range(first, first + steps):
        inputs, target = batch(step, 50, 41, dtype)
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@every_rule
@every_block_shape
def test_equals_its_dense_twin(block_shape: tuple[int, int], name: str) -> None:
    follow_twin(ROWS[name], block_shape)


@every_rule
@pytest.mark.parametrize("warmups", [(0, 15), (14, 0), (14, 30), (30, 14)], ids=str)
def test_equals_its_dense_twin_with_two_warmups(warmups: tuple[int, int], name: str) -> None:
    """Grown blocks warm up over the first number of steps, those that are there from the start over the second."""
    follow_twin(ROWS[name], warmup_steps=warmups[0], initial_warmup_steps=warmups[1])


def follow_twin(row: Row, block_shape: tuple[int, int] = (1, 1), **warmups: int) -> None:
    """Trains over two topology updates as the dense twin does."""
    model, optimizer, manager = make(row, block_shape, **warmups)
    plain = RaggedNet().double()
    fill_masked(plain, model)
    masks, grids = masks_of(model), grids_of(model)
    twin = DenseTwin(plain, {site: TwinSite(grids[site], masks[site]) for site in masks}, replace(row.twin, **warmups))
    for step in range(25):
        loss = train(model, optimizer, manager, step, 1).item()
        assert abs(loss - twin.step(*batch(step, 50, 41, torch.float64))) <= 1e-10
        if manager.history and manager.history[-1].step == step + 1:
            for site, mask in masks_of(model).items():
                twin.renew(site, mask, kept=mask & twin.sites[site].mask)
    assert len(manager.history) == 2
    for parameter, weight in twin.weights.items():
        torch.testing.assert_close(dense_weight(model, parameter), weight, atol=1e-10, rtol=1e-10)


@every_rule
def test_has_the_state_of_its_slots_and_no_more(name: str) -> None:
    row = ROWS[name]
    model, optimizer, manager = make(row)
    train(model, optimizer, manager, 0, 1)
    sites = find_sites(model)
    for parameter, slots in zip(
        (sites["first.weight"].values, sites["second.weight"].values, model.first.bias), row.slots, strict=True
    ):
        state = optimizer.state[parameter]
        assert {key for key, each in state.items() if each.shape == parameter.shape and each.dim()} >= set(slots)
        is_compact = parameter is not model.first.bias
        has_ages = is_compact and (optimizer.rule_of(parameter).needs_ages or row.warmup_steps > 0)
        ages = {"generation", "births"} if has_ages else set()
        assert set(state) == {"step", "num_skipped", *slots, *ages}


@every_rule
def test_warmup_of_the_initial_blocks_alone_needs_ages_too(name: str) -> None:
    model, optimizer, manager = make(ROWS[name], warmup_steps=0, initial_warmup_steps=9)
    train(model, optimizer, manager, 0, 1)
    assert "births" in optimizer.state[find_sites(model)["first.weight"].values]


@every_rule
@every_block_shape
def test_state_follows_the_topology(block_shape: tuple[int, int], name: str) -> None:
    model, optimizer, manager = make(ROWS[name], block_shape)
    train(model, optimizer, manager, 0, 9)
    site = find_sites(model)["second.weight"]
    inputs, target = batch(9, 50, 41, torch.float64)
    (model(inputs) - target).square().mean().backward()
    optimizer.step()
    mask_before = site.mask().clone()
    before = {slot: rows.clone() for slot, rows in rows_of(optimizer, site.values).items()}
    assert manager.step() is not None
    mask = site.mask()
    survives, newcomers = mask[mask_before], ~mask_before[mask]
    assert newcomers.any()
    for slot, rows in rows_of(optimizer, site.values).items():
        assert torch.equal(rows[~newcomers], before[slot][survives]) and not rows[newcomers].any(), slot
    if "generation" in optimizer.state[site.values]:
        ages = optimizer.block_ages(site.values)
        assert ages[newcomers].eq(0).all() and ages[~newcomers].eq(10).all()


def rows_of(optimizer: Any, values: nn.Parameter) -> dict[str, Tensor]:
    return {slot.name: optimizer.state[values][slot.name] for slot in optimizer.rule_of(values).slots}


@every_rule
@pytest.mark.parametrize(
    ("dtype", "moment_dtype"),
    [(torch.float32, None), (torch.float32, "int8"), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, "int8")],
    ids=str,
)
def test_resumes_bit_for_bit(name: str, dtype: torch.dtype, moment_dtype: Any, tmp_path: Any) -> None:
    row = ROWS[name]
    whole = make(row, dtype=dtype, moment_dtype=moment_dtype)
    expected = train(*whole, 0, 24, dtype)
    half, resumed = (make(row, dtype=dtype, moment_dtype=moment_dtype) for _ in range(2))
    train(*half, 0, 12, dtype)
    smet.save_checkpoint(tmp_path / "checkpoint", *half)
    smet.load_checkpoint(tmp_path / "checkpoint", *resumed)
    assert torch.equal(train(*resumed, 12, 12, dtype), expected[12:])
    assert_same(snapshot(*resumed[:2]), snapshot(*whole[:2]))
    other = copy.deepcopy(resumed[1])
    other.load_state_dict(resumed[1].state_dict())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_in_few_bits_trains_about_as_well(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    if not row.slots[1]:
        pytest.fail(f"{name}: every rule has some state for the head")
    finals = []
    for moment_dtype in (None, torch.bfloat16, "int8"):
        model, optimizer, manager = make(row, dtype=dtype, moment_dtype=moment_dtype)
        slot = row.slots[1][0]
        losses = train(model, optimizer, manager, 0, 40, dtype)
        kept = optimizer.state[find_sites(model)["second.weight"].values][slot].dtype
        assert kept == {None: torch.float32, torch.bfloat16: torch.bfloat16, "int8": torch.uint8}[moment_dtype]
        finals.append(losses[-10:].float().mean())
    assert max(finals) - min(finals) < 0.03 * min(finals)


@every_rule
@every_block_shape
def test_the_law_and_its_chunks_agree(block_shape: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warmups = {"warmup_steps": 4, "initial_warmup_steps": 20}
    results = []
    for kernel in ("reference", "torch"):
        monkeypatch.setenv("SMET_COMPILE_KERNEL", kernel)
        monkeypatch.setattr("smet_compile.ops.plain._WEIGHTS_IN_CACHE", 300)
        model, optimizer, manager = make(ROWS[name], block_shape, torch.bfloat16, moment_dtype="int8", **warmups)
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):  # gradients from a product would differ: kernels of products round bf16 in their own ways
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.step()
            manager.step()
        assert manager.history
        results.append(snapshot(model, optimizer))
    assert_same(*results)


@every_rule
def test_a_gradient_that_is_not_finite_is_skipped(name: str) -> None:
    model, optimizer, manager = make(ROWS[name])
    train(model, optimizer, manager, 0, 2)
    site = find_sites(model)["first.weight"]
    inputs, target = batch(3, 50, 41, torch.float64)
    (model(inputs) - target).square().mean().backward()
    site.values.grad[5] = torch.nan
    before = site.values.detach().clone()
    optimizer.step()
    assert optimizer.num_skipped_blocks == 1
    assert site.values[5] == before[5] and bool(site.values.isfinite().all())
    assert int((site.values == before).sum()) < len(before) // 2


@every_rule
@pytest.mark.parametrize("block_shape", [1, (1, 4), 4], ids=str)
def test_the_compiled_step_equals_the_loop(name: str, block_shape: Any) -> None:
    row = ROWS[name]
    make_optimizer = partial(row.make, initial_warmup_steps=30)
    step_run, loop_run = twice(sparse(block_shape=block_shape), make_optimizer, drop_fraction=0.4)
    step = step_run.compiled()
    assert step.fused
    step_run.in_step(step, map(batch_of, range(12)))
    loop_run.in_loop(map(batch_of, range(12)))
    assert_equal_runs(step_run, loop_run)


@every_rule
def test_options_differ_by_group_and_bad_ones_are_refused(name: str) -> None:
    row = ROWS[name]
    model = smet.sparsify(RaggedNet(), density=0.5)
    for option in ("lr", "weight_decay", "warmup_steps", "initial_warmup_steps", "lr_density_exponent"):
        with pytest.raises(ValueError, match=f"{option}: expected"):
            type(row.make(model))(model, **{option: "much"})
    groups = smet.decay_groups(model, 0.2)
    optimizer = type(row.make(model))(groups, model=model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    groups = [groups[0] | {"warmup_steps": 3}, groups[1] | {"initial_warmup_steps": 0}]
    optimizer = type(row.make(model))(groups, warmup_steps=7, model=model)
    assert [group["warmup_steps"] for group in optimizer.param_groups] == [3, 7]
    assert [group["initial_warmup_steps"] for group in optimizer.param_groups] == [3, 0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'betta'"):
        type(optimizer)(model, betta=1)
    with pytest.raises(TypeError, match="got fused=True, an option of torch"):
        type(optimizer)(model, fused=True)


def test_sgd_is_that_of_torch() -> None:
    """On a dense model, or at density 1, without warm-up, it is torch's SGD."""
    runs = []
    for kind in (smet.ActiveSGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = RaggedNet().double()
        given = model if kind is smet.ActiveSGD else model.parameters()
        optimizer = kind(given, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
        for step in range(10):
            inputs, target = batch(step, 50, 41, torch.float64)
            optimizer.zero_grad()
            (model(inputs) - target).square().mean().backward()
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*runs, atol=1e-12, rtol=1e-12)


def test_scale_keeps_nothing_for_compact_weights() -> None:
    model, optimizer, manager = make(ROWS["scale"], dtype=torch.bfloat16)
    train(model, optimizer, manager, 0, 2, torch.bfloat16)
    state = optimizer.state[find_sites(model)["first.weight"].values]
    assert {key: each.numel() for key, each in state.items()} == {"step": 1, "num_skipped": 1}


@pytest.mark.parametrize("block_shape", SHAPES, ids=str)
def test_scale_normalizes_columns_where_these_are_the_outputs(block_shape: tuple[int, int]) -> None:
    """In an embedding the features are the output units, in a ``Conv1D`` and in transposed experts the columns."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 20), Conv1D(37, 20), nn.Linear(37, 5)).double()
    smet.sparsify(model, density=0.5, block_shape=block_shape, include=["1.weight"])
    site = find_sites(model)["1.weight"]
    optimizer = smet.ActiveScale(model, lr=1.0, lr_density_exponent=0.0)
    before = model[1].weight.detach().clone(), model[0].weight.detach().clone()
    model(torch.tensor([1, 2, 3, 3])).square().sum().backward()
    grads = site.compact(site.values.grad), model[0].weight.grad.clone()
    optimizer.step()
    for old, now, grad in zip(before, (model[1].weight, model[0].weight), grads, strict=True):
        expected = grad / grad.norm(dim=0).clamp(min=1e-300)
        torch.testing.assert_close(old - now.detach(), expected, atol=1e-12, rtol=1e-12)


def test_scale_normalizes_the_columns_of_transposed_experts() -> None:
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 12, dtype=torch.float64))

    model = nn.Sequential(Experts(), nn.Linear(5, 5).double())
    optimizer = smet.ActiveScale(model, lr=1.0)
    weight = model[0].weight
    before, grad = weight.detach().clone(), torch.randn_like(weight)
    weight.grad = grad
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), grad / grad.norm(dim=1, keepdim=True), atol=1e-12, rtol=1e-12)
