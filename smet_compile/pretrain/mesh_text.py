"""Reads how the ranks of an elastic run lie, such as "fsdp=2,tp=2"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smet_compile.format.arguments import described
from smet_compile.pretrain.config import RunConfig

_KINDS = ("hsdp", "fsdp", "tp")


@dataclass(frozen=True)
class MeshText:
    """Holds the sizes of a mesh: replicas, ranks that share the weights out, ranks that cut layers."""

    replicas: int = 1
    shards: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return self.replicas * self.shards * self.tp

    @property
    def num_readers(self) -> int:
        """Returns into how many shares the text of a step is cut."""
        return self.replicas * self.shards

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of its dimensions; those of one rank are left out, as long as another one is there."""
        sizes = {"replicate": self.replicas, "shard": self.shards, "tp": self.tp}
        return tuple(name for name, size in sizes.items() if size > 1) or ("shard",)

    def table(self, ranks: Sequence[int]) -> Any:
        """Returns the ranks as a table of its dimensions."""
        sizes = {"replicate": self.replicas, "shard": self.shards, "tp": self.tp}
        return torch.tensor(ranks[: self.size]).view([sizes[name] for name in self.names]).tolist()

    def __str__(self) -> str:
        sizes = {"hsdp": self.replicas, "fsdp": self.shards, "tp": self.tp}
        return ",".join(f"{kind}={size}" for kind, size in sizes.items() if size > 1 or kind == "fsdp")

    def check(self, config: RunConfig) -> None:
        """Raises ValueError where a run cannot lie so."""
        if config.batch % self.num_readers:
            raise ValueError(
                f"{self}: expected a number of ranks with text of their own that divides --batch {config.batch}, got "
                f"{self.num_readers}; take another number"
            )
        if config.slabs % self.tp:
            raise ValueError(
                f"{self}: expected tp=N with an N that divides the run's {config.slabs} slabs, got {self.tp}; take "
                "another N, or begin a new run with --slabs"
            )


def parse_mesh(name: str, text: str, size: int | None) -> MeshText:
    """Reads "fsdp", "fsdp=2", "hsdp=2,fsdp=4", "fsdp=2,tp=2"; "fsdp" without a number takes the rest of ``size`` ranks.

    "hsdp=2" and "tp=2" are "hsdp=2,fsdp" and "tp=2,fsdp". Where ``size`` is None, the rest is one rank.

    Raises:
        ValueError: another text, or more ranks than there are.
    """
    found: dict[str, int | None] = {}
    for part in text.split(",") if isinstance(text, str) else ():
        kind, _, number = part.partition("=")
        is_open = part == "fsdp"
        if kind not in _KINDS or kind in found or not (is_open or re.fullmatch("[1-9][0-9]{0,5}", number)):
            found = {}
            break
        found[kind] = None if is_open else int(number)
    if not found:
        raise ValueError(
            f'{name}: expected a layout such as "fsdp", "fsdp=2", "hsdp=2,fsdp=2" or "fsdp=2,tp=2", got '
            f"{described(text)}"
        )
    replicas, tp = found.get("hsdp") or 1, found.get("tp") or 1
    rest = 1 if size is None else size // (replicas * tp)
    mesh = MeshText(replicas, found.get("fsdp") or max(1, rest), tp)
    if size is not None and mesh.size > size:
        raise ValueError(f"{name}: expected a layout of at most {size} ranks, got {text}; start more processes")
    return mesh


def fitting_mesh(config: RunConfig, text: str, size: int) -> tuple[MeshText, str]:
    """Returns the layout that a text says, and ""; where so many ranks cannot lie so, the largest by FSDP, and why."""
    try:
        mesh = parse_mesh("--shard", text, size)
        mesh.check(config)
    except ValueError as error:
        return MeshText(shards=next(count for count in range(size, 0, -1) if config.batch % count == 0)), str(error)
    return mesh, ""
