"""Runs tools that watch other processes: the tests, compute-sanitizer, and Nsight Compute where they exist."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import launches
from benchmarks.gpu_check.records import Check

CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
NSIGHT = Path("/opt/nvidia/nsight-compute")
_KERNELS = "tests/ops/kernels"
TESTS = (
    *(f"{_KERNELS}/test_triton_{name}.py" for name in ("matmul", "tma", "far", "unpack", "supports", "fusion")),
    *(f"{_KERNELS}/test_triton_adamw{name}.py" for name in ("", "_captures", "_rounding", "_sampled")),
    f"{_KERNELS}/test_graphs_on_a_gpu.py",
    "tests/convert/test_export_layouts.py",
)
"""Tests that compute on a GPU where there is one. Tests of what compiles, and of CPUs, need no card."""
DRY_TESTS = (f"{_KERNELS}/test_triton_supports.py::test_older_gpus_do_not",)
WORKERS = 14
LAUNCHES = "benchmarks.gpu_check.launches"
KERNELS_WATCHED = "regex:^(_masked_tiles|_sampled_tiles|_masked_by_tma|_sampled_by_tma|update)$"
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats")
STATUSES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
_WITH_XDIST = re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<status>{'|'.join(STATUSES)}) (?P<name>.*::.*)$")
_ALONE = re.compile(rf"(?P<name>\S+::.*) (?P<status>{'|'.join(STATUSES)})\s+.*\[ *\d+%\]$")
_SUMMARY = re.compile(r"(?:FAILED|ERROR) (?P<name>\S+?::[^\s\[]*(?:\[.*?\])?) - (?P<message>.*)$")
_SPARE_SECONDS = 3
_LINES = 12


def run_tests(check: Check) -> None:
    """Runs the tests of the kernels, those on the GPU included, and records each that failed."""
    if importlib.util.find_spec("pytest") is None:
        check.record("tests", skipped="pytest is not installed")
        return
    has_xdist = importlib.util.find_spec("xdist") is not None and not check.dry
    options = ["-v", "-rfE", "--color=no", "-p", "no:cacheprovider", *(["-n", str(WORKERS)] if has_xdist else [])]
    command = [sys.executable, "-m", "pytest", *check.size(TESTS, DRY_TESTS), *options]
    code, output = _run(check, command, {}, lines=None)
    statuses, messages = outcomes(output)
    counts = {status.lower(): sum(each == status for each in statuses.values()) for status in STATUSES}
    more = {} if statuses else {"failed": "no test ran", "output": output[-_LINES:]}
    check.record("tests", code=code, counts=counts, passed=code == 0, **more)
    for name, status in statuses.items():
        if status in ("FAILED", "ERROR"):
            check.record("failure", test=name, message=messages.get(name, "")[:500])


def outcomes(lines: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the status of each test, and the message of each that failed, from what pytest prints, with xdist or not.

    Tests that were not reached when time was over are missing.
    """
    statuses: dict[str, str] = {}
    messages: dict[str, str] = {}
    for line in lines:
        if found := _WITH_XDIST.match(line) or _ALONE.match(line):
            statuses[found["name"].strip()] = found["status"]
        elif found := _SUMMARY.match(line):
            messages[found["name"]] = found["message"]
    return statuses, messages


def run_sanitizer(check: Check) -> None:
    """Runs every kernel at tiny size under compute-sanitizer: first for memory, then for races."""
    path = tool("compute-sanitizer")
    if path is None:
        cases = check.size(launches.TINY, launches.TINY[:1])
        check.record("sanitizer", skipped="compute-sanitizer is not installed", calls=launches.tiny(check, cases))
        return
    for kind in ("memcheck", "racecheck"):
        command = [path, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", LAUNCHES, "tiny"]
        start = time.perf_counter()
        code, output = _run(check, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        seconds = time.perf_counter() - start
        check.record("sanitizer", tool=kind, code=code, seconds=seconds, output=output, passed=code == 0)


def run_counters(check: Check) -> None:
    """Reads the hardware's counters for some launches, where Nsight Compute is installed and may."""
    path = tool("ncu")
    if path is None:
        launches.large(check)
        check.record("counters", skipped="ncu is not installed")
        return
    sections = [option for name in SECTIONS for option in ("--section", name)]
    command = [
        path,
        "--csv",
        "--clock-control",
        "none",
        "-k",
        KERNELS_WATCHED,
        "-c",
        "3",
        *sections,
        sys.executable,
        "-m",
        LAUNCHES,
        "large",
    ]
    code, output = _run(check, command, {}, lines=None)
    kernels = counters(output)
    for number, (name, values) in enumerate(kernels):
        check.record("counters", launch=number, kernel=name, values=values)
    if not kernels:
        check.record("counters", code=code, failed="no counters", output=output[-_LINES:])


def tool(name: str) -> str | None:
    """Returns the path of a tool of CUDA; None where it is not installed."""
    return shutil.which(
        name, path=os.pathsep.join((os.environ.get("PATH", ""), *CUDA_FOLDERS, *map(str, NSIGHT.glob("*"))))
    )


def counters(lines: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Returns for each launch the kernel's name and its metrics, from what ``ncu --csv`` prints."""
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(lines[first:]):
        _, values = found.setdefault(row["ID"], (row["Kernel Name"], {}))
        if row.get("Metric Name"):
            values[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(found.values())


def _run(
    check: Check, command: Sequence[str], environment: dict[str, str], lines: int | None = _LINES
) -> tuple[int | None, list[str]]:
    """Runs a command until shortly before the stage's end; returns its exit code, or None, and its last lines."""
    path = check.folder / "output.txt"  # a pipe would stay open as long as what the command has started
    with path.open("w") as file:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(max(1.0, check.left() - _SPARE_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
    return code, _last(path.read_text(errors="replace"), lines)


def _last(output: str, lines: int | None) -> list[str]:
    """Returns the last lines that are not empty, without a terminal's colours."""
    found = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in output.splitlines() if line.strip()]
    return found if lines is None else found[-lines:]
