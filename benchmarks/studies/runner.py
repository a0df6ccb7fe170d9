"""Runs the cases that have no record yet, several at once, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from benchmarks.studies.case import Case
from benchmarks.studies.records import Records

_RUNS_OF_A_PROCESS = 4


def run(
    cases: Callable[[], Sequence[Case]],
    records: Records,
    workers: int,
    minutes: float = float("inf"),
    eager: bool = False,
) -> None:
    """Trains what is missing, in order; after ``minutes`` nothing new is begun, and a later call goes on.

    ``cases`` is asked again after each run, since results may decide what is run next. What fails is told, and left.
    """
    end = time.monotonic() + 60 * minutes
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[name] = "1"
    flying: dict[Future[dict], Case] = {}
    failed: set[str] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=_RUNS_OF_A_PROCESS) as pool:
        while True:
            if time.monotonic() < end:
                begun = failed | {case.key for case in flying.values()}
                waiting = [case for case in dict.fromkeys(cases()) if case.key not in records and case.key not in begun]
                for case in waiting[: workers - len(flying)]:
                    flying[pool.submit(_work, case, eager)] = case
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                case, record = flying.pop(future), future.result()
                if "error" in record:
                    failed.add(case.key)
                    print(record["error"], flush=True)
                    continue
                records.add(record)
                now = time.strftime("%H:%M:%S")
                print(f"{now} {record['seconds']:.0f} s: loss {record['loss']}", flush=True)


def _work(case: Case, eager: bool) -> dict:
    import torch

    from benchmarks.studies.trainer import train

    torch.set_num_threads(1)
    try:
        return train(case, eager)
    except Exception:
        return {"error": f"{case}\n{traceback.format_exc()}"}
