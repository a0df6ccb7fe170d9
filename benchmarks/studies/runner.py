"""Runs the cases that have no record yet, several at once, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence

from benchmarks.studies.case import Case
from benchmarks.studies.records import Records

_RUNS_OF_A_PROCESS = 4


def run(
    cases: Sequence[Case], records: Records, workers: int, minutes: float = float("inf"), eager: bool = False
) -> None:
    """Trains what is missing, in order; after ``minutes`` nothing new is begun, and a later call goes on."""
    missing = [case for case in dict.fromkeys(cases) if case.key not in records]
    end = time.monotonic() + 60 * minutes
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[name] = "1"
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=_RUNS_OF_A_PROCESS) as pool:
        waiting = ((case, end, eager) for case in missing)
        for number, record in enumerate(pool.imap_unordered(_work, waiting), 1):
            if record is None:
                continue
            if "error" in record:
                print(record["error"], flush=True)
                continue
            records.add(record)
            print(f"{number}/{len(missing)} {record['seconds']:.0f} s: loss {record['loss']}", flush=True)


def _work(task: tuple[Case, float, bool]) -> dict | None:
    case, end, eager = task
    if time.monotonic() > end:
        return None
    import torch

    from benchmarks.studies.trainer import train

    torch.set_num_threads(1)
    try:
        return train(case, eager)
    except Exception:
        return {"error": f"{case}\n{traceback.format_exc()}"}
