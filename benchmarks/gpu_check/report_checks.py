"""Tells in markdown how the stages ended, and what passed and what failed."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.gpu_check.results import Line, Results
from benchmarks.gpu_check.stages import KERNELS, MODELS
from benchmarks.tables import AWAITS_GPU

OF_GRAPHS = ("graph", "reduce-overhead", "first step", "streams")
_MOST_FAILURES = 30
_SHORT = 160


def checks(results: Results) -> str:
    """Returns three pieces: how the stages ended, what was checked, and what failed."""
    lines = ["### What was checked on a GPU", "", "| stage | ended | seconds | limit |", "|---|---|---|---|"]
    lines += [_stage_row(results, stage.name, stage.seconds) for stage in (*KERNELS, *MODELS)]
    lines += ["", "| check | passed | note |", "|---|---|---|", *_check_rows(results), ""]
    failed = _failures(results)
    if failed:
        lines += ["Failed:", "", *(f"- {each}" for each in failed[:_MOST_FAILURES]), ""]
        if len(failed) > _MOST_FAILURES:
            lines += [f"and {len(failed) - _MOST_FAILURES} more.", ""]
    return "\n".join(lines)


def _stage_row(results: Results, name: str, seconds: int) -> str:
    end = results.last(name, "end")
    if end is None:
        return f"| {name} | {AWAITS_GPU} | — | {seconds} |"
    return f"| {name} | {end['status']} | {end['seconds']:.0f} | {end['limit']:.0f} |"


def _check_rows(results: Results) -> list[str]:
    products, updates, stack = checked(results)
    compiled = results.latest("environment", "compiled", lambda line: line["case"])
    return [
        _row("kernels compiled without spills", list(map(_with_spills, compiled)), _most_registers(compiled)),
        _row("new memory holds NaN", results.all("correctness", "new memory")[-1:], ""),
        _row("products against dense fp32, twice", products, _largest_error(products)),
        _row("AdamW against plain torch, bit for bit", updates, ""),
        _row("a stack of more than 2^31 weights", stack, _largest_error(stack)),
        _row("tests of the kernels", results.all("tests", "tests")[-1:], _counts(results)),
        _row("compute-sanitizer", results.latest("sanitizer", "sanitizer", lambda line: line.get("tool")), ""),
        _row("CUDA graphs", graph_lines(results), ""),
    ]


def graph_lines(results: Results) -> list[Line]:
    """Returns the lines on CUDA graphs and streams."""
    latest = (results.latest("graphs", what, lambda line: line.get("block")) for what in OF_GRAPHS)
    return [line for lines in latest for line in lines]


def _with_spills(line: Line) -> Line:
    """Adds whether a case was compiled, and its kernels keep all in registers."""
    kernels = line.get("kernels", {}).values()
    return line | {"passed": "failed" not in line and not any(kernel.get("spills") for kernel in kernels)}


def _most_registers(lines: Iterable[Line]) -> str:
    numbers = [kernel.get("registers", 0) for line in lines for kernel in line.get("kernels", {}).values()]
    return f"at most {max(numbers)} registers a thread" if any(numbers) else ""


def checked(results: Results) -> tuple[list[Line], list[Line], list[Line]]:
    """Returns the lines on products, updates and the large stack."""
    products = results.latest("correctness", "product", lambda line: [line["case"], line.get("part")])
    updates = results.latest("correctness", "update", lambda line: line["case"])
    return products, updates, results.latest("correctness", "stack", lambda line: line.get("part"))


def _row(what: str, lines: list[Line], note: str) -> str:
    counted = [line for line in lines if "skipped" not in line]
    skipped = ", ".join(dict.fromkeys(line["skipped"] for line in lines if "skipped" in line))
    if not counted:
        return f"| {what} | {skipped or AWAITS_GPU} | {note or '—'} |"
    passed = sum(bool(line.get("passed")) for line in counted)
    return f"| {what} | {passed} of {len(counted)} | {note or '—'} |"


def _largest_error(lines: Iterable[Line]) -> str:
    errors = [error for line in lines for error in ([line["error"]] if "error" in line else line.get("errors", []))]
    worst = max(errors, key=lambda error: (error != error, error), default=None)  # NaN is the worst
    return "" if worst is None else f"largest relative error {worst:.2g}"


def _counts(results: Results) -> str:
    line = results.last("tests", "tests")
    counts = {} if line is None else line.get("counts", {})
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _failures(results: Results) -> list[str]:
    """Describes what did not pass, in the last run of each stage and check."""
    products, updates, stack = checked(results)
    found = [_described(line) for line in (*products, *updates, *stack) if not line.get("passed")]
    found += [f"test {line['test']}: {line['message'][:_SHORT]}" for line in results.all("tests", "failure")]
    of_graphs = [("graphs", what) for what in OF_GRAPHS]
    for stage, what in (("sanitizer", "sanitizer"), *of_graphs, ("counters", "counters"), ("host", "call")):
        found += [_described(line) for line in results.all(stage, what) if line.get("failed") or _not_passed(line)]
    return found


def _not_passed(line: Line) -> bool:
    return line.get("passed") is False


def _described(line: Line) -> str:
    facts = [str(line[name]) for name in ("case", "part", "block", "tool", "different") if name in line]
    why = line.get("failed") or (f"error {line['error']}" if "error" in line else "")
    return f"{line['stage']}, {line['what']}: {', '.join(facts)} {why[:_SHORT]}".rstrip()
