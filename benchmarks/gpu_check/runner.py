"""Runs the stages of a plan, each in a process of its own that is ended when its time is over."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_check.records import Check, Record
from benchmarks.gpu_check.stages import Plan, Stage, total_seconds

_GRACE_SECONDS = 2
_ERROR_LINES = 15
_BESIDE = {"models": ("transformers", "transformers.models.llama.modeling_llama")}
"""Modules that are imported before the processes of a part are forked, so that it is done once. None starts CUDA."""


def run(plan: Plan, out: Path) -> list[str]:
    """Runs the plan, and returns the names of the stages that failed or took too long."""
    groups = plan.groups()
    record = Record(out, "plan")
    limits = {stage.name: stage.seconds for group in groups for stage in group}
    record("limits", part=plan.part, dry=plan.dry, seconds=limits, total_seconds=total_seconds(groups))
    for module in ("smet_compile", "benchmarks.sections.optimizer", *_BESIDE.get(plan.part, ())):
        importlib.import_module(module)
    start = time.perf_counter()
    failed = [name for group in groups for name in _run_group(group, plan, out)]
    record("end", seconds=time.perf_counter() - start, failed=failed)
    return failed


class _Running(NamedTuple):
    stage: Stage
    process: BaseProcess
    log: Path
    started: float


def _run_group(group: list[Stage], plan: Plan, out: Path) -> list[str]:
    """Runs the stages of a group at the same time."""
    running = [_start(stage, plan, out) for stage in group]
    return [each.stage.name for each in running if not _finish(each, out)]


def _start(stage: Stage, plan: Plan, out: Path) -> _Running:
    log = out.parent / f"{out.stem}_logs" / f"{stage.name.replace(' ', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=(stage, plan, out, log))
    process.start()
    return _Running(stage, process, log, time.perf_counter())


def _finish(running: _Running, out: Path) -> bool:
    """Waits for a stage, ends it when its time is over, and records how it ended. Tells whether all went well."""
    stage, process = running.stage, running.process
    process.join(max(0.0, running.started + stage.seconds - time.perf_counter()))
    code = process.exitcode
    seconds = time.perf_counter() - running.started
    _end(process)
    status = "timed out" if code is None else "ok" if code == 0 else "failed"
    more = {} if code == 0 else {"code": code, "log": _tail(running.log)}
    Record(out, stage.name)("end", status=status, seconds=seconds, limit=stage.seconds, **more)
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


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-_ERROR_LINES:]


def _in_process(stage: Stage, plan: Plan, out: Path, log: Path) -> None:
    """Runs a stage in the process that was started for it; its errors and warnings go to ``log``."""
    os.setpgid(0, 0)
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(errors, sys.stderr.fileno())
    if not stage.interpreted:
        os.environ.pop("TRITON_INTERPRET", None)
    try:
        stage.run(Check(Record(out, stage.name), plan.dry, out.parent, stage.seconds))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
