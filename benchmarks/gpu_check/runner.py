"""Runs the stages of a plan, each in a process of its own that is ended when its time is over."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_check.records import Check, Record
from benchmarks.gpu_check.stages import Plan, Stage

_GRACE_SECONDS = 2
_ERROR_LINES = 15
_LARGEST_LOG = 200_000
_BESIDE = {"models": ("transformers", "transformers.models.llama.modeling_llama")}
"""Modules that are imported before the processes of a part are forked, so that it is done once. None starts CUDA."""


def run(plan: Plan, out: Path) -> list[str]:
    """Runs the plan, and returns the names of the stages that failed or took too long."""
    groups = plan.groups()
    record = Record(out, "plan")
    limits = {stage.name: plan.limit(stage) for group in groups for stage in group}
    today = datetime.date.today().isoformat()
    record("limits", part=plan.part, date=today, dry=plan.dry, seconds=limits, total_seconds=plan.total_seconds())
    for module in ("smet_compile", "benchmarks.sections.optimizer", *_BESIDE.get(plan.part, ())):
        importlib.import_module(module)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failed = [name for group in groups for name in _run_group(group, plan, Places(out, Path(folder)))]
    record("end", seconds=time.monotonic() - start, failed=failed)
    return failed


class Places(NamedTuple):
    """Says where results go, and where a stage may write what nobody keeps."""

    out: Path
    scratch: Path

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")


class _Running(NamedTuple):
    stage: Stage
    process: BaseProcess
    log: Path
    started: float
    deadline: float

    def is_over(self) -> bool:
        return self.process.exitcode is not None or time.monotonic() >= self.deadline


def _run_group(group: list[Stage], plan: Plan, places: Places) -> list[str]:
    """Runs the stages of a group at the same time; each is finished when it ends, or when its time is over."""
    running = [_start(stage, plan, places) for stage in group]
    failed = []
    while running:
        _wait(running)
        for each in [each for each in running if each.is_over()]:
            running.remove(each)
            if not _finish(each, places):
                failed.append(each.stage.name)
    return failed


def _wait(running: list[_Running]) -> None:
    """Waits until one of the stages ends, or until the first has to."""
    first = min(each.deadline for each in running)
    connection.wait([each.process.sentinel for each in running], max(0.0, first - time.monotonic()))


def _start(stage: Stage, plan: Plan, places: Places) -> _Running:
    log = places.scratch / f"{stage.name}.log"
    log.touch()
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=(stage, plan, places, log))
    process.start()
    started = time.monotonic()
    return _Running(stage, process, log, started, started + plan.limit(stage))


def _finish(running: _Running, places: Places) -> bool:
    """Ends a stage that is over, keeps its log, and records how it ended. Tells whether all went well."""
    stage, process = running.stage, running.process
    code, seconds = process.exitcode, time.monotonic() - running.started
    _end(process)
    status = "timed out" if code is None else "ok" if code == 0 else "failed"
    log = running.log.read_text(errors="replace")
    with places.log.open("a") as file:
        file.write(f"== {stage.name}: {status}\n{log[-_LARGEST_LOG:]}\n")
    more = {} if code == 0 else {"code": code, "log": log.splitlines()[-_ERROR_LINES:]}
    limit = running.deadline - running.started
    Record(places.out, stage.name)("end", status=status, seconds=seconds, limit=limit, **more)
    return code == 0


def _end(process: BaseProcess) -> None:
    """Ends a stage and all that it started."""
    assert process.pid is not None
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nothing of its group is left
            break
        process.join(_GRACE_SECONDS)


def _in_process(stage: Stage, plan: Plan, places: Places, log: Path) -> None:
    """Runs a stage in the process that was started for it; its errors and warnings go to ``log``."""
    os.setpgid(0, 0)
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(errors, sys.stderr.fileno())
    if not stage.interpreted:
        os.environ.pop("TRITON_INTERPRET", None)
    try:
        deadline = time.monotonic() + plan.limit(stage)
        stage.run(Check(Record(places.out, stage.name), plan.dry, places.scratch, deadline))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
