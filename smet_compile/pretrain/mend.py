"""Makes metrics.jsonl agree with the checkpoint from which a run goes on: neither is then ahead of the other."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import smet_compile as smet
from smet_compile.pretrain.metrics import cut_back, read_metrics, write_metrics
from smet_compile.pretrain.records import Record, event_values, of_kind

MOST_RANGES = 3
Ranges = list[tuple[int, int]]


def mend_metrics(path: Path, step: int, history: Sequence[smet.TopologyEvent] = ()) -> str | None:
    """Let the log hold what came up to the checkpoint of `step`, once, and nothing later.

    Records after `step` are removed: the run writes them again. Steps without a record, as after a power cut, become
    records of kind "gap"; lost topology updates are taken from `history`, which the checkpoint holds. Returns a line
    that says what was found missing, None where nothing was.
    """
    cut_back(path, step)
    records = read_metrics(path)
    ranges = steps_without_record(records, step)
    new = set(ranges) - {(record["first_step"], record["step"]) for record in of_kind(records, "gap")}
    if not new:
        return None
    kept = [record for record in records if record["kind"] != "gap"]
    gaps = [{"kind": "gap", "step": last, "first_step": first} for first, last in ranges]
    write_metrics(path, sorted([*kept, *gaps, *_lost_updates(records, step, history)], key=lambda r: r["step"]))
    return (
        f"warning: {path}: the log is behind the checkpoint, as after a power cut: {count(ranges)} of {step} steps "
        f"have no record ({as_text(ranges)}); they are marked as a gap, and the run goes on from step {step}"
    )


def _lost_updates(records: list[Record], step: int, history: Sequence[smet.TopologyEvent]) -> list[Record]:
    known = {record["step"] for record in of_kind(records, "topology")}
    lost = [event for event in history if event.step <= step and event.step not in known]
    return [{"kind": "topology", "step": event.step, "event": event_values(event)} for event in lost]


def steps_without_record(records: list[Record], last: int) -> Ranges:
    """Return the steps from 1 to `last` that have no train record, as (first, last) of each range."""
    known = {record["step"] for record in of_kind(records, "train") if 1 <= record["step"] <= last}
    edges = [0, *sorted(known), last + 1]
    return [(before + 1, after - 1) for before, after in pairwise(edges) if after - before > 1]


def count(ranges: Ranges) -> int:
    """Return the number of steps in the ranges."""
    return sum(last - first + 1 for first, last in ranges)


def as_text(ranges: Ranges) -> str:
    """Write ranges as "8 to 20, 33"."""
    written = [str(first) if first == last else f"{first} to {last}" for first, last in ranges[:MOST_RANGES]]
    return ", ".join(written) + (f" and {len(ranges) - MOST_RANGES} more" if len(ranges) > MOST_RANGES else "")
