"""Lists the stages: what each runs, and how long it may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu_check.records import Check

HERE = "benchmarks.gpu_check"


class Stage(NamedTuple):
    """Describes a stage.

    Args:
        function: "module:function" of one ``Check``. seconds: time limit. group: stages of one group start together,
            and take turns at measuring.
        interpreted: without a GPU its kernels run in Triton's interpreter.
    """

    name: str
    function: str
    seconds: int
    group: str = ""
    interpreted: bool = True

    def run(self, check: Check) -> None:
        module, name = self.function.split(":")
        function: Callable[[Check], None] = getattr(importlib.import_module(f"{HERE}.{module}"), name)
        function(check)


KERNELS = (
    Stage("environment", "environment:run", 40, interpreted=False),
    Stage("graphs", "graphs:run", 45),
    Stage("correctness", "correctness:run", 70),
    Stage("tests", "tools:run_tests", 85),
    Stage("sanitizer", "tools:run_sanitizer", 35),
    Stage("ceilings", "ceilings:run", 10),
    Stage("products", "products:run", 75),
    Stage("optimizer", "optimizer:run", 40),
    Stage("host", "host:run", 10),
    Stage("counters", "tools:run_counters", 20),
)
MODELS = (
    Stage("350m dense", "models:dense", 200, "models", interpreted=False),
    Stage("350m 128 tiles", "models:tiles_128", 200, "models", interpreted=False),
    Stage("350m 64 tiles", "models:tiles_64", 200, "models", interpreted=False),
    Stage("350m single weights", "models:single_weights", 200, "models", interpreted=False),
    Stage("7b 8-bit moments", "models:largest_coded", 410, "models", interpreted=False),
    Stage("7b ActiveScale", "models:largest_scale", 410, "models", interpreted=False),
)
_DRY_SECONDS = 60
PARTS = {"kernels": KERNELS, "models": MODELS}


class Plan(NamedTuple):
    """Says which stages run. ``only``: their names; none for all of the part. ``dry``: at tiny size, on the CPU."""

    part: str
    only: tuple[str, ...] = ()
    dry: bool = False

    def limit(self, stage: Stage) -> int:
        """Returns the seconds that a stage may take. The interpreter is slow."""
        return stage.seconds + (_DRY_SECONDS if self.dry else 0)

    def groups(self) -> list[list[Stage]]:
        """Returns the stages, those that start together in one list."""
        groups: dict[str, list[Stage]] = {}
        for stage in PARTS[self.part]:
            if not self.only or stage.name in self.only:
                groups.setdefault(stage.group or stage.name, []).append(stage)
        return list(groups.values())

    def total_seconds(self) -> int:
        """Returns the longest that the stages take, one group after another."""
        return sum(max(self.limit(stage) for stage in group) for group in self.groups())
