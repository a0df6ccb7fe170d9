"""Checkpoints of a model that tensor parallelism cuts: one process writes the same, and any ranks go on with it."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import smet_compile as smet
from tests.shards.parallel import dense_weights, parallel_net, whole_net
from tests.shards.setting import as_bytes, train_steps
from tests.support.ranks import processes

SAVED, END = 5, 8


def make(rank: int, world: int, tp: int, block_shape: Any, grow: str = "random", **options: Any) -> Any:
    if tp == 1:
        model = whole_net(torch.float64, block_shape, **options)
    else:
        model, _ = parallel_net(torch.float64, tp, world // tp, block_shape, fully=world > tp, **options)
    optimizer = smet.ActiveAdamW(model, 3e-3, warmup_steps=5)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=2, schedule="cosine", grow=grow)
    return model, optimizer, manager


def go_on(parts: Any, rank: int, world: int, tp: int) -> list[float]:
    return train_steps(parts, range(SAVED, END), rank // tp, world // tp)


def save(rank: int, world: int, tp: int, folder: Path, block_shape: Any, grow: str) -> Any:
    parts = model, optimizer, manager = make(rank, world, tp, block_shape, grow)
    train_steps(parts, range(SAVED), rank // tp, world // tp)
    smet.save_checkpoint(folder / "one", model, optimizer, manager, extra={"step": SAVED})
    of_model, of_optimizer = get_state_dict(model, optimizer)
    tree = {"model": of_model, "optimizer": of_optimizer, "manager": as_bytes(manager.state_dict())}
    dcp.save(tree, checkpoint_id=folder / "many")
    return dense_weights(model), go_on(parts, rank, world, tp)


def load_one(rank: int, world: int, tp: int, folder: Path, block_shape: Any, grow: str) -> Any:
    """Loads the file into another topology and writes it again."""
    parts = model, optimizer, manager = make(rank, world, tp, block_shape, grow, seed=3)
    extra = smet.load_checkpoint(folder / "one", model, optimizer, manager)
    smet.save_checkpoint(folder / "again", model, optimizer, manager, extra=extra)
    return dense_weights(model), go_on(parts, rank, world, tp)


def load_many(rank: int, world: int, tp: int, folder: Path, block_shape: Any, grow: str) -> Any:
    parts = model, optimizer, manager = make(rank, world, tp, block_shape, grow, seed=3)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    tree = {"model": of_model, "optimizer": of_optimizer, "manager": as_bytes(manager.state_dict())}
    dcp.load(tree, checkpoint_id=folder / "many")
    set_state_dict(model, optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"])
    manager.load_state_dict(torch.load(io.BytesIO(tree["manager"])))
    return dense_weights(model), go_on(parts, rank, world, tp)


@pytest.mark.parametrize(("block_shape", "grow"), [(1, "momentum"), (4, "random")])
def test_any_number_of_ranks_goes_on(block_shape: Any, grow: str, tmp_path: Path) -> None:
    weights, losses = processes.run(4, save, 2, tmp_path, block_shape, grow)[0]
    for world, tp, load in ((4, 4, load_one), (2, 2, load_one), (1, 1, load_one), (4, 2, load_many), (2, 2, load_many)):
        got, got_losses = processes.run(world, load, tp, tmp_path, block_shape, grow)[0]
        assert all(torch.equal(got[name], tensor) for name, tensor in weights.items()), (world, tp, load)
        torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-12)
        if load is load_one:
            assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes(), (world, tp)


def other_parts(rank: int, world: int, folder: Path) -> str:
    """Returns the error of loading the shards of two parts of each weight into four."""
    model, optimizer, _ = make(rank, world, 4, 1)
    of_model, _ = get_state_dict(model, optimizer)
    try:
        dcp.load({"model": of_model}, checkpoint_id=folder / "many")
    except CheckpointException as error:
        return str(error)
    return ""


def test_shards_of_other_parts_are_refused(tmp_path: Path) -> None:
    processes.run(2, save, 2, tmp_path, 1, "random")
    for message in processes.run(4, other_parts, tmp_path):
        assert "Size mismatch" in message and "topology" in message


def other_slabs(rank: int, world: int, folder: Path) -> str:
    parts = make(rank, world, 2, 1, slabs={"*.up": (2, 0), "*.down": (2, 1)})
    before = dense_weights(parts[0])
    try:
        smet.load_checkpoint(folder / "one", *parts)
    except ValueError as error:
        assert all(torch.equal(before[name], tensor) for name, tensor in dense_weights(parts[0]).items())
        return str(error)
    return ""


def test_a_file_with_other_slabs_is_refused(tmp_path: Path) -> None:
    processes.run(1, save, 1, tmp_path, 1, "random")
    for message in processes.run(2, other_slabs, tmp_path):
        assert "layers.0.up.weight: expected slabs [2, 0], got [4, 0] in the checkpoint" in message
