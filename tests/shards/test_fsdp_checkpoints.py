"""Checkpoints of sharded runs, one file and those of torch: any number of ranks goes on with either."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import smet_compile as smet
from tests.shards.setting import as_bytes, shard, sparse_net, train_steps, whole_state
from tests.support.pairs import pairwise
from tests.support.ranks import processes

SAVED, END = 5, 8


def make(world: int, block_shape: Any, moment_dtype: Any, seed: int = 0) -> Any:
    model = sparse_net(torch.float64 if moment_dtype is None else torch.float32, block_shape, seed=seed)
    if world > 1:
        shard(model)
    optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5, moment_dtype=moment_dtype, stochastic_rounding=False)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=40, every=2, schedule="cosine")


def save(rank: int, world: int, folder: Path, *kind: Any) -> Any:
    """Saves in both ways after some steps; returns the state then, and the losses that follow."""
    parts = model, optimizer, manager = make(world, *kind)
    train_steps(parts, range(SAVED), rank, world)
    smet.save_checkpoint(folder / "one", model, optimizer, manager, extra={"step": SAVED})
    state = whole_state(model, optimizer)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    tree = {"model": of_model, "optimizer": of_optimizer, "manager": as_bytes(manager.state_dict())}
    dcp.save(tree, checkpoint_id=folder / "many")
    return state, train_steps(parts, range(SAVED, END), rank, world)


def load_one(rank: int, world: int, folder: Path, *kind: Any) -> Any:
    """Loads the one file into another topology and writes it again; returns state and the losses that follow."""
    parts = model, optimizer, manager = make(world, *kind, seed=3)
    extra = smet.load_checkpoint(folder / "one", model, optimizer, manager)
    smet.save_checkpoint(folder / "again", model, optimizer, manager, extra=extra)
    return whole_state(model, optimizer), train_steps(parts, range(SAVED, END), rank, world)


def load_many(rank: int, world: int, folder: Path, *kind: Any) -> Any:
    parts = model, optimizer, manager = make(world, *kind, seed=3)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    tree = {"model": of_model, "optimizer": of_optimizer, "manager": as_bytes(manager.state_dict())}
    dcp.load(tree, checkpoint_id=folder / "many")
    set_state_dict(model, optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"])
    manager.load_state_dict(torch.load(io.BytesIO(tree["manager"])))
    assert manager.num_steps == SAVED
    return whole_state(model, optimizer), train_steps(parts, range(SAVED, END), rank, world)


KINDS = [(1, None), (4, None), ((1, 5), torch.bfloat16)]
LOADS = pairwise(KINDS, [4, 3, 2, 1], [load_one, load_many])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_number_of_ranks_goes_on(kind: Any, tmp_path: Path) -> None:
    state, losses = processes.run(4, save, tmp_path, *kind)[0]
    atol = 1e-12 if kind[1] is None else 1e-5
    for world, load in [(world, load) for of_kind, world, load in LOADS if of_kind == kind]:
        got_state, got_losses = processes.run(world, load, tmp_path, *kind)[0]
        assert all(torch.equal(got_state[name], tensor) for name, tensor in state.items()), (world, load)
        torch.testing.assert_close(got_losses, losses, rtol=0, atol=atol)
        if load is load_one:
            assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes(), world


def test_a_single_process_writes_the_same_file(tmp_path: Path) -> None:
    one, many = tmp_path / "single", tmp_path / "sharded"
    for world, folder in ((1, one), (3, many)):
        folder.mkdir()
        processes.run(world, save_at_start, folder)
    assert (one / "one").read_bytes() == (many / "one").read_bytes()


def save_at_start(rank: int, world: int, folder: Path) -> None:
    model, optimizer, manager = make(world, 1, None)
    smet.save_checkpoint(folder / "one", model, optimizer, manager)


def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    assert processes.run(2, save_nowhere, tmp_path) == ["could not save"] * 2


def save_nowhere(rank: int, world: int, folder: Path) -> str:
    model, optimizer, manager = make(world, 1, None)
    (folder / "file").touch()
    try:
        smet.save_checkpoint(folder / "file" / "one", model, optimizer, manager)
    except ValueError as error:
        return "could not save" if "could not save the checkpoint" in str(error) else str(error)
    return "saved"
