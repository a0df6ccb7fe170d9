"""Describes one of many runs that train side by side: a case, and the settings that only such runs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.studies.byte_pairs import BYTES
from benchmarks.studies.case import Case

DROPS = ("magnitude", "relative", "saliency", "momentum")
GROWS = ("random", "gradient", "momentum")
PATTERNS = (None, "fan_in")
SPARSE = ("all", "feed_forward")
COMMON = ("shape", "steps", "warmup", "decay", "text")
"""Settings that all replicas which train side by side share."""
_FIXED = {"distribution": "uniform", "even": True, "dense_from": 1.0, "seeded_moments": False, "dtype": "float32",
          "moment_dtype": "float32", "probe": False, "vocabulary": BYTES}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Replica(Case):
    """Describes a run by the fields of ``Case`` and these. With their defaults it is the run that ``train`` makes.

    Args:
        topology_seed: decides the first topology and random growth; None: ``seed``.
        first_warmup: W of the blocks that are active from the start; None: ``block_warmup``, as for newcomers.
        drop: what the dropped blocks are least in: "magnitude" |w|; "relative", |w| over age, up to an age of 4 ΔT;
            "saliency" |w g|; "momentum" |m|.
        grow: "random", or what the grown blocks are largest in: "gradient"; "momentum", its mean with weights 0.9^k.
        window: number of the last steps whose gradients are summed for "gradient", "momentum" and "saliency".
        pattern: "fan_in": every row of blocks keeps as many active ones as it starts with, equally many within one.
        permuted: the inputs and outputs of every layer are in a random order of their own, as its blocks see them.
        accumulate_counts: the fraction of a block that rounding down leaves over is added to the next count.
        spread: factor on the initial values of linear layers. head_scale: factor on the logits.
    """

    topology_seed: int | None = None
    first_warmup: int | None = None
    drop: str = "magnitude"
    window: int = 1
    pattern: str | None = None
    permuted: bool = False
    accumulate_counts: bool = False
    spread: float = 1.0
    head_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in (("drop", DROPS), ("grow", GROWS), ("pattern", PATTERNS), ("sparse", SPARSE)):
            _check(name, getattr(self, name), choices)
        for name, only in _FIXED.items():
            _check(name, getattr(self, name), (only,))
        if self.pattern == "fan_in" and self.density > 0.5:
            raise ValueError(
                f"density: expected 0.5 at most with pattern='fan_in', got {self.density}; no row must run out of "
                "inactive blocks"
            )

    @property
    def is_dense(self) -> bool:
        return self.density == 1

    @property
    def drawn_from(self) -> int:
        """Returns the seed of topologies."""
        return self.seed if self.topology_seed is None else self.topology_seed

    @property
    def needs_gradients(self) -> bool:
        """Tells whether a topology update reads dense gradients."""
        return self.grow != "random" or self.drop == "saliency"

    @property
    def stop_step(self) -> float:
        return self.stop_fraction * self.steps

    def next_update(self, step: int) -> int | None:
        """Returns the first update after ``step`` steps; None where there is none."""
        if self.is_dense or not self.every:
            return None
        upcoming = (step // self.every + 1) * self.every
        return upcoming if upcoming < self.stop_step else None

    def is_sparse(self, name: str) -> bool:
        """Tells whether the linear weight ``name`` is sparse."""
        return not self.is_dense and (self.sparse == "all" or ".mlp." in name)


def _check(name: str, got: Any, choices: tuple[Any, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {got!r}; see Replica")
