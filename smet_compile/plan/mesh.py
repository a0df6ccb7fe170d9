"""Describes the ranks of a run whose parameters are sharded, and reads them from the argument ``mesh``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smet_compile.format import arguments
from smet_compile.format.arguments import described

_MOST_RANKS = 2**20
_SHARDS, _REPLICAS, _PARTS = "dp", "replicate", "tp"


@dataclass(frozen=True)
class Mesh:
    """Holds the sizes of a mesh.

    Tensor parallelism cuts some parameters into ``parts``. FSDP2 cuts every part, and every other parameter, into
    ``shards``, each of which ``replicas`` ranks hold.
    """

    shards: int
    replicas: int = 1
    parts: int = 1

    def __str__(self) -> str:
        parts = f",{_PARTS}={self.parts}" if self.parts > 1 else ""
        replicas = f",{_REPLICAS}={self.replicas}" if self.replicas > 1 else ""
        return f"{_SHARDS}={self.shards}{parts}{replicas}"

    def chunk(self, num_rows: int) -> int:
        """Returns the most rows that a rank holds of a parameter with ``num_rows``; the first rank holds as many."""
        return -(-num_rows // self.shards)

    @property
    def size(self) -> int:
        """Returns the number of ranks."""
        return self.num_readers * self.parts

    @property
    def num_readers(self) -> int:
        """Returns how many groups of ranks read a batch of their own; those of tensor parallelism read one together."""
        return self.shards * self.replicas

    @property
    def calls_fully_shard(self) -> bool:
        """Tells whether FSDP2 is there; tensor parallelism alone leaves it nothing to do."""
        return self.shards > 1 or self.replicas > 1 or self.parts == 1


def check_mesh(mesh: object, argument: str = "mesh") -> Mesh:
    """Reads a dict such as ``{"dp": 64, "tp": 8, "replicate": 2}``. Raises ValueError for anything else."""
    if not isinstance(mesh, Mapping) or not mesh:
        raise ValueError(
            f"{argument}: expected a dict from dimensions to numbers of ranks, got {described(mesh)}; pass "
            f'{{"{_SHARDS}": 8}}, say'
        )
    unknown = [name for name in mesh if name not in (_SHARDS, _REPLICAS, _PARTS)]
    if unknown or _SHARDS not in mesh:
        got = described(unknown[0]) if unknown else f"{' and '.join(mesh)} alone"
        raise ValueError(
            f"{argument}: expected '{_SHARDS}' (ranks that share the parameters by FSDP2) and at most '{_REPLICAS}' "
            f"beside it (copies, as in HSDP) and '{_PARTS}' (ranks among which tensor parallelism cuts layers), got "
            f"{got}; name the dimensions so"
        )
    sizes = {
        name: arguments.whole_number(f"{argument}[{name!r}]", size, at_least=1, at_most=_MOST_RANKS)
        for name, size in mesh.items()
    }
    return Mesh(sizes[_SHARDS], sizes.get(_REPLICAS, 1), sizes.get(_PARTS, 1))
