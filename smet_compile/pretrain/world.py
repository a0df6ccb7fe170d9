"""Has several processes (ranks) train one run: how they were started, what each one reads, how they agree.

Every rank makes the same calls in the same order. Where one process trains alone, nothing is sent, and every method
returns what it is given.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from smet_compile.format.arguments import described
from smet_compile.pretrain.config import RunConfig
from smet_compile.shards.styles import styles_of

T = TypeVar("T")


class OtherRankError(ValueError):
    """Ends a rank because another one has failed, which reports the error."""


@dataclass(frozen=True)
class World:
    """Names the ranks that train together, and this one among them; `replicas` is None where nothing is sharded.

    `tp` ranks in a row hold the parts of one copy of each layer that is cut, and read the same text. `groups` are those
    of the dimensions of their mesh; empty where all ranks of the default process group train.
    """

    rank: int = 0
    size: int = 1
    replicas: int | None = None
    device: str = "cpu"
    tp: int = 1
    groups: tuple[Any, ...] = ()

    @property
    def num_readers(self) -> int:
        """Returns into how many shares the text of a step is cut."""
        return self.size // self.tp

    @property
    def _reader(self) -> int:
        return self.rank // self.tp

    @property
    def is_first(self) -> bool:
        """Tells whether this rank is the one that writes and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.size} rank{'s' * (self.size > 1)}"

    @property
    def _all_groups(self) -> tuple[Any, ...]:
        """Returns groups over which a reduction, one after the other, is one over all ranks."""
        return (self.groups or (None,)) if self.size > 1 else ()

    def cut_layers(self, model: nn.Module) -> nn.Module:
        """Cuts the layers that the model's own plan names by tensor parallelism; returns the model."""
        if self.tp > 1:
            cut_layers(model, self._mesh()["tp"])
        return model

    def _mesh(self) -> Any:
        """Returns the mesh of all ranks; torch keeps those of the same ranks and names."""
        from torch.distributed.device_mesh import init_device_mesh

        assert self.replicas is not None
        kind = torch.device(self.device).type
        if self.tp > 1:
            return init_device_mesh(kind, (self.num_readers, self.tp), mesh_dim_names=("dp", "tp"))
        shape = (self.replicas, self.size // self.replicas) if self.replicas > 1 else (self.size,)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])

    def shard(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Shards the model by FSDP2, where it is to be; returns the model."""
        if self.replicas is None or (self.tp > 1 and self.num_readers == 1):
            return model
        return shard_blocks(model, self._mesh()["dp"] if self.tp > 1 else self._mesh(), dtype)

    def rows_of(self, batch: Tensor) -> Tensor:
        """Returns this rank's rows of the micro-batches (accumulate, batch, sequence) of a step."""
        return batch.chunk(self.num_readers, dim=1)[self._reader]

    def share_of(self, windows: Tensor) -> Tensor:
        """Returns this rank's share of (W, sequence) windows, which may be none; the shares make up all of them."""
        return windows.tensor_split(self.num_readers)[self._reader]

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the ranks' tensors."""
        tensor = tensor.clone() if self._all_groups else tensor
        for group in self._all_groups:
            distributed.all_reduce(tensor, group=group)
        return tensor

    def sum_over_readers(self, tensor: Tensor) -> Tensor:
        """Returns the sum of what the ranks that read other text have; those that read the same have the same."""
        return self.sum(tensor) / self.tp if self.tp > 1 else self.sum(tensor)

    def mean(self, tensor: Tensor) -> Tensor:
        """Returns the mean of the ranks' tensors."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Tells whether `flag` is True on some rank."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device))) if self.size > 1 else flag

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls `function` on the first rank; every rank gets what it returns, or an error where it raises one."""
        found: list[Any] = [None]
        with self.together():
            if self.is_first:
                found = [function()]
        for group in reversed(self._all_groups):
            distributed.broadcast_object_list(found, group=group, group_src=0)
        result: T = found[0]
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises on every rank if the block raises on one: the error on the first of them, `OtherRankError` elsewhere.

        The block makes no other calls that wait for a rank, or fails alike on all.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.any(error is not None):
            self._raise(error)

    def _raise(self, error: Exception | None) -> None:
        own = error is not None and not isinstance(error, OtherRankError)
        texts: list[str | None] = [str(error) if own else None]
        for group in reversed(self._all_groups):
            parts: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(parts, texts, group=group)
            texts = [text for part in parts for text in part]
        first = next((rank for rank, text in enumerate(texts) if text is not None), 0)
        if error is not None and first == self.rank:
            raise error
        raise OtherRankError(f"rank {first}: {texts[first]}") from error

    def expect_same(self, name: str, value: object) -> None:
        """Raises an error on every rank where one has another `value` than the first; `name` says of what."""
        first = self.on_first(lambda: value)
        with self.together():
            if value != first:
                raise ValueError(
                    f"{name}: expected {described(first)} as on the first rank, got {described(value)} on rank "
                    f"{self.rank}; give all ranks the same files"
                )


def cut_layers(model: nn.Module, mesh: Any) -> None:
    """Cuts the layers that the model's own plan names by tensor parallelism over a mesh of one dimension."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    made = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    parallelize_module(model, mesh, {name: made[style]() for name, style in styles_of(model).items()})


def shard_blocks(model: nn.Module, mesh: Any, dtype: torch.dtype) -> nn.Module:
    """Shards each block of the model's longest list of modules, then the rest, by FSDP2; returns the model.

    Gradients are averaged in fp32 at least.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in max(lists, key=len, default=()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


ALONE = World()
"""One process that trains without others."""


@contextmanager
def open_world(config: RunConfig) -> Iterator[World]:
    """Joins the ranks of a run: those that torchrun started, or those of the process group that is there.

    Without either the process trains alone, whatever `--shard` is. Raises ValueError, on every rank and before any
    waits for another, for settings that do not suit the number of ranks. The process group that it makes ends with
    the block.
    """
    is_ready = distributed.is_available() and distributed.is_initialized()
    is_launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    size = distributed.get_world_size() if is_ready else int(os.environ["WORLD_SIZE"]) if is_launched else 1
    replicas, tp = config.sharding
    if replicas is None or not (is_ready or is_launched):
        _expect_one_process(size)
        yield ALONE
        return
    _check(config, replicas, tp, size)
    choose_device(config.device)
    if not is_ready:
        on_cards = torch.device(config.device).type == "cuda"
        distributed.init_process_group("nccl" if on_cards else "gloo")
    yield World(distributed.get_rank(), size, replicas, config.device, tp)
    if not is_ready:
        distributed.destroy_process_group()


def _expect_one_process(size: int) -> None:
    if size > 1:
        raise ValueError(
            f"--shard: expected fsdp, hsdp=R or tp=N for {size} processes, got none; start them with torchrun and "
            "--shard fsdp, or one process without torchrun"
        )


def _check(config: RunConfig, replicas: int, tp: int, size: int) -> None:
    if size % tp:
        raise ValueError(
            f"--shard: expected tp=N with an N that divides {size} (the number of ranks), got {config.shard}; pass "
            "another N, or start another number of processes"
        )
    if size % replicas:
        raise ValueError(
            f"--shard: expected a number of replicas that divides {size} (the number of ranks), got {config.shard}; "
            "pass fsdp, say"
        )
    readers = size // tp
    if config.batch % readers:
        what = "the number of ranks" if tp == 1 else f"the number of ranks over {tp}"
        raise ValueError(
            f"--batch: expected a multiple of {readers} ({what}, which share each micro-batch), got {config.batch}; "
            "pass another --batch and --accumulate, or start another number of processes"
        )


def choose_device(name: str) -> None:
    """Has each rank of a machine compute on a card of its own."""
    device = torch.device(name)
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ValueError(f"--device: expected cpu or cuda (a card for each rank) with --shard, got {name}; pass cuda")
    if device.type == "cuda":
        num_here, num_cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if num_here > num_cards:
            raise ValueError(
                f"--device: expected a card for each of the {num_here} ranks on this machine, got {num_cards} cards; "
                "start fewer processes, or pass --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def is_first_process() -> bool:
    """Tells whether this process is the one that prints, as far as the one who started it says."""
    return os.environ.get("RANK", "0") == "0"


def is_reporter(error: Exception) -> bool:
    """Tells whether this process is to print `error`, so that one line says what is wrong.

    Before the ranks are joined all of them find the same mistakes; then one process of each machine prints.
    """
    is_joined = distributed.is_available() and distributed.is_initialized()
    return not isinstance(error, OtherRankError) and (is_joined or os.environ.get("LOCAL_RANK", "0") == "0")


def start_command() -> str:
    """Returns the command that starts as many processes on a machine as there are now."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return "python -m smet_compile"
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 1)} -m smet_compile"


def set_gradient_sync(model: Any, is_on: bool) -> None:
    """Has the next backward pass of a sharded model reduce gradients, or only add them up on each rank."""
    set_sync = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(is_on)
