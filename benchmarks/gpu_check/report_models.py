"""Makes the tables of whole models: steps of LLaMA-350m's shapes with 8 layers, and LLaMA-7b's."""

from __future__ import annotations

import functools

from benchmarks.gpu_check.models import BLOCK_OF_LARGEST, LARGEST, SMALLER, STEPS
from benchmarks.gpu_check.report_rows import row
from benchmarks.gpu_check.results import Line, Results
from benchmarks.layer import DENSITY
from benchmarks.tables import Row, Table, Target, at_least, at_most

DENSE_STAGE = "350m dense"
STEP_TARGETS: dict[str, Target | None] = {
    "350m 128 tiles": at_least(1.8),
    "350m 64 tiles": at_least(1.5),
    "350m single weights": None,
}
LARGEST_STAGES = ("7b 8-bit moments", "7b ActiveScale")
LARGEST_BYTES = 12e9
PEAK, LOSS = at_most(1), at_most(1)
STEP_NOTE = (
    f"LLaMA-350m's shapes with {SMALLER.layers} layers, bf16 weights and moments, {SMALLER.batch} sequences of "
    f"{SMALLER.sequence} tokens, density {DENSITY}, update in backward, beside dense `torch.compile` with torch's "
    "fused AdamW, in processes of their own that measure one after another. By operations alone the ratio is at most "
    f'{SMALLER.bound:.2f}. "host" is how long a step keeps Python.'
)
LARGEST_NOTE = (
    f"bf16, density {DENSITY}, {BLOCK_OF_LARGEST} tiles, `compile_train_step`, {STEPS} steps on one batch of "
    f"{LARGEST.tokens} tokens. Peak: the most that tensors hold, from the third step on, over "
    f"{LARGEST_BYTES / 1e9:.0f} GB. Loss: of the last step over that of the first."
)


def model_tables(results: Results) -> list[Table]:
    return [
        Table("Training step on a GPU", "dense / sparse", STEP_NOTE, _step_rows(results)),
        Table("LLaMA-7b's shapes on a GPU", "over the limit", LARGEST_NOTE, _largest_rows(results)),
    ]


def _step_rows(results: Results) -> list[Row]:
    dense = results.last(DENSE_STAGE, "steps")
    rows = [row("dense", dense, lambda line: Row("dense", more=_step_columns(line)))]
    for stage, target in STEP_TARGETS.items():
        name, line = stage.removeprefix("350m "), results.last(stage, "steps")
        if line is not None and dense is not None:
            line = line | {"dense_seconds": dense["seconds"]}
        rows.append(row(name, line if dense else None, functools.partial(_step_row, name, target), target))
    return rows


def _step_row(what: str, target: Target | None, line: Line) -> Row:
    ratios = [line["dense_seconds"] / seconds for seconds in line["all_seconds"]]
    return Row(what, line["kernels"], ratios, target, _step_columns(line))


def _step_columns(line: Line) -> dict[str, str]:
    return {
        "step, ms": f"{1e3 * line['seconds']:.4g}",
        "host, ms": f"{1e3 * line['host_seconds']:.4g}",
        "TFLOP/s": f"{line['operations'] / line['seconds'] / 1e12:.3g}",
        "peak, GB": f"{line['peak_bytes'] / 1e9:.2f}",
    }


def _largest_rows(results: Results) -> list[Row]:
    rows = []
    for stage in LARGEST_STAGES:
        steps = _last_run(results.all(stage, "step"))
        whole = steps if len(steps) > 2 else []
        line = {"steps": whole, "kernels": (results.last(stage, "model") or {}).get("kernels", "")} if whole else None
        name = stage.removeprefix("7b ")
        rows.append(row(f"peak memory, {name}", line, functools.partial(_peak_row, f"peak memory, {name}"), PEAK))
        rows.append(row(f"loss, {name}", line, functools.partial(_loss_row, f"loss, {name}"), LOSS))
    return rows


def _last_run(steps: list[Line]) -> list[Line]:
    """Returns the steps from the last one with number 0 on."""
    starts = [place for place, step in enumerate(steps) if step["number"] == 0]
    return steps[starts[-1] :] if starts else []


def _peak_row(what: str, line: Line) -> Row:
    peak = max(step["peak_bytes"] for step in line["steps"][2:])
    more = {"peak, GB": f"{peak / 1e9:.2f}", "steps": str(len(line["steps"]))}
    return Row(what, line["kernels"], [peak / LARGEST_BYTES], PEAK, more)


def _loss_row(what: str, line: Line) -> Row:
    first, last = line["steps"][0]["loss"], line["steps"][-1]["loss"]
    more = {"first loss": f"{first:.3f}", "last loss": f"{last:.3f}", "steps": str(len(line["steps"]))}
    return Row(what, line["kernels"], [last / first], LOSS, more)
