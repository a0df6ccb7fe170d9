"""A folder that ranks write together is the one that a single process writes, and ranks load it into their shards."""

from pathlib import Path

import torch

import smet_compile as smet
from tests.shards.parallel import parallel_net, whole_net
from tests.shards.setting import shard, sparse_net
from tests.support.ranks import processes

FILE = "compact.safetensors"


def save_and_load(rank: int, world: int, folder: Path, tensor_parallel: bool) -> bool:
    """Saves a model that is cut, loads it into another topology, and saves that."""

    def make(seed: int) -> torch.nn.Module:
        if tensor_parallel:
            return parallel_net(torch.float32, world, fully=True, seed=seed)[0]
        return shard(sparse_net(torch.float32, seed=seed))

    smet.save_compact(make(0), folder / "ranks")
    smet.save_compact(smet.load_compact(folder / "ranks", make(1)), folder / "again")
    return (folder / "ranks" / FILE).read_bytes() == (folder / "again" / FILE).read_bytes()


def test_shards_of_fsdp(tmp_path: Path) -> None:
    alone = sparse_net(torch.float32)
    smet.save_compact(alone, tmp_path / "alone")
    assert processes.run(2, save_and_load, tmp_path, False) == [True, True]
    loaded = smet.load_compact(tmp_path / "ranks", sparse_net(torch.float32, seed=2))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in alone.state_dict().items())
    card = (tmp_path / "alone" / "README.md").read_text()
    assert (tmp_path / "ranks" / "README.md").read_text().splitlines()[6:] == card.splitlines()[6:]


def test_parts_of_tensor_parallelism(tmp_path: Path) -> None:
    alone = whole_net(torch.float32)
    assert processes.run(2, save_and_load, tmp_path, True) == [True, True]
    loaded = smet.load_compact(tmp_path / "ranks", whole_net(torch.float32, seed=2))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in alone.state_dict().items())
