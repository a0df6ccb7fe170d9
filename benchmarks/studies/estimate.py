"""Estimates how long the missing runs of a study take, so that it says so before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.studies.case import Case, Shape
from benchmarks.studies.records import Records

_SECONDS_A_STEP = 0.015
_OPERATIONS_A_SECOND = 3e10


def seconds(case: Case, records: Records) -> float:
    """Returns the expected seconds of one thread: by runs of the same shape, density and optimizer, else by counting.

    The fastest of them counts, since a busy machine makes the others slow. Else it is 15 ms a step, and six operations
    for each weight of the linear layers and token at 30 GFLOP/s.
    """
    alike = [
        record["seconds"] / record["case"]["steps"]
        for record in records
        if all(record["case"].get(name, value) == value for name, value in _likeness(case).items())
    ]
    return case.steps * (min(alike) if alike else _counted(case))


def _likeness(case: Case) -> dict[str, object]:
    return {"shape": asdict(case.shape), "density": case.density, "optimizer": case.optimizer, "dtype": case.dtype}


def _counted(case: Case) -> float:
    operations = 6 * linear_weights(case.shape) * case.shape.batch * case.shape.sequence
    return _SECONDS_A_STEP + operations / _OPERATIONS_A_SECOND


def linear_weights(shape: Shape) -> int:
    """Counts the weights of a LLaMA's linear layers, but for the output head."""
    return shape.layers * 4 * shape.hidden**2 + feed_forward_weights(shape)


def feed_forward_weights(shape: Shape) -> int:
    """Counts the weights of a LLaMA's feed-forward layers."""
    return shape.layers * 3 * shape.hidden * shape.intermediate


def forecast(cases: Sequence[Case], records: Records, workers: int) -> str:
    """Returns a sentence with the number of missing runs and the hours that they take."""
    missing = [case for case in dict.fromkeys(cases) if case.key not in records]
    hours = sum(seconds(case, records) for case in missing) / 3600
    together = f"{hours / workers:.1f} with {workers} at a time"
    return f"{len(missing)} of {len(cases)} runs are missing: about {hours:.1f} hours of one thread, {together}"
