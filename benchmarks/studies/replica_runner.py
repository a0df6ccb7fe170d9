"""Runs the replicas that have no record yet, in batches that train side by side, one thread for each batch."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence

from benchmarks.studies.records import Records
from benchmarks.studies.replica import COMMON, Replica

SIZE = 15
"""Number of replicas in a batch: three settings in five seeds."""

_BATCHES_OF_A_PROCESS = 4


def batches(cases: Sequence[Replica], size: int = SIZE) -> list[list[Replica]]:
    """Groups cases that can train side by side. Batches come in the order of their first cases."""
    groups: dict[tuple, list[Replica]] = {}
    for case in cases:
        groups.setdefault(tuple(getattr(case, name) for name in COMMON), []).append(case)
    found = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    order = {case: number for number, case in enumerate(cases)}
    return sorted(found, key=lambda batch: order[batch[0]])


def run_replicas(
    cases: Callable[[], Sequence[Replica]],
    records: Records,
    workers: int,
    minutes: float = float("inf"),
    eager: bool = False,
) -> None:
    """Trains what is missing, in order; after ``minutes`` no batch is begun, and a later call goes on."""
    missing = [case for case in dict.fromkeys(cases()) if case.key not in records]
    end = time.monotonic() + 60 * minutes
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[name] = "1"
    context = multiprocessing.get_context("spawn")
    num_done = 0
    with context.Pool(workers, maxtasksperchild=_BATCHES_OF_A_PROCESS) as pool:
        waiting = ((batch, end, eager) for batch in batches(missing))
        for found in pool.imap_unordered(_work, waiting):
            if isinstance(found, str):
                print(found, flush=True)
                continue
            for record in found:
                records.add(record)
            num_done += len(found)
            if found:
                now = time.strftime("%H:%M:%S")
                print(f"{now} {num_done}/{len(missing)} {found[0]['seconds']:.1f} s for each replica", flush=True)


def _work(task: tuple[list[Replica], float, bool]) -> list[dict] | str:
    """Returns the records of a batch, none where it is too late to begin, or the text of an error."""
    batch, end, eager = task
    if time.monotonic() > end:
        return []
    import torch

    from benchmarks.studies.replicas import train_together

    torch.set_num_threads(1)
    try:
        return train_together(batch, eager)
    except Exception:
        return f"{batch[0]} and {len(batch) - 1} more\n{traceback.format_exc()}"
