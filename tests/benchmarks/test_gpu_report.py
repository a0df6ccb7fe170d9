"""Lines as a GPU writes them become rows with ratios and verdicts; what is missing awaits a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import optimizer, products, report
from benchmarks.gpu_check.cases import BY_NAME, SIDES
from benchmarks.gpu_check.report_models import STEP_TARGETS, model_tables
from benchmarks.gpu_check.report_tables import tables
from benchmarks.gpu_check.results import Results
from benchmarks.layer import PRODUCTS
from benchmarks.tables import AWAITS_GPU, Table
from tests.support.fresh_process import run_python

Line = dict[str, Any]
RATIOS = [0.5, 0.4, 0.6]
STEP = {"seconds": 0.2, "host_seconds": 0.01, "operations": 1e13, "peak_bytes": 10**10, "kernels": "k"}


def line(stage: str, what: str, **fields: Any) -> Line:
    return {"stage": stage, "what": what, **fields}


def product_lines() -> list[Line]:
    facts = {"kernels": "k", "density": 0.25, "seconds": 0.001, "dense_operations_a_second": 6e14, "ratios": RATIOS}
    shapes = [(size, block) for size in products.SIZES for block in SIDES]
    found = [
        line("products", "product", size=str(size), block=block, part=part, **facts)
        for size, block in shapes
        for part in PRODUCTS
    ]
    found += [{**each, "by": BY_NAME, "ratios": [0.3]} for each in found if each["block"] > 1]
    for block in products.SIDES_OF_SWEEP:
        for number, part in enumerate(PRODUCTS):
            case = {"case": f"{block} tiles, 4096→4096, 16384 tokens", "part": part}
            found.append(line("products", "sizes", **case, sizes={"tokens": 128}, seconds=0.0005 * (number + 1)))
            found.append(line("products", "sizes", **case, sizes={"tokens": 256}, failed="OutOfResources"))
    return found


def other_lines() -> list[Line]:
    step = {"kernel": "k", "seconds": 0.001, "copy_bytes_a_second": 3e12, "over_copy": [0.95], "host_seconds": 1e-4}
    found = [line("optimizer", "step", case=case, launches=2, **step) for case in optimizer.STATES]
    for block, counts in optimizer.TILES.items():
        for tokens in counts:
            times = {"two_seconds": 0.002, "one_seconds": 0.001, "ratios": RATIOS}
            found.append(line("optimizer", "fused", block=block, tokens=tokens, is_one=tokens > 2048, **times))
    found += [line("ceilings", "copy", bytes_a_second=3e12), line("ceilings", "L2", bytes_a_second=5.5e12)]
    found += [line("ceilings", "product", operations_a_second=6.5e14)]
    found += [line("host", "call", case="unpack", block=1, seconds=3e-5)]
    graph = {"eager_seconds": 0.002, "replay_seconds": 0.001, "passed": True}
    found += [line("graphs", "graph", block=block, **graph) for block in (64, 1)]
    found += [line("graphs", "reduce-overhead", block=64, **graph), line("graphs", "streams", passed=True)]
    found += [line("counters", "counters", launch=0, kernel="_masked_tiles", values={"Duration": "8 us"})]
    return found


def model_lines() -> list[Line]:
    found = [line("350m dense", "steps", **STEP | {"seconds": 0.4})]
    found += [line(stage, "steps", all_seconds=[0.2, 0.25], **STEP) for stage in STEP_TARGETS]
    for stage in ("7b 8-bit moments", "7b ActiveScale"):
        found.append(line(stage, "model", kernels="k"))
        peaks = [30e9, 30e9, 11e9, 11.5e9]
        found += [line(stage, "step", number=n, loss=10.0 - n, peak_bytes=peak) for n, peak in enumerate(peaks)]
    return found


def all_tables(lines: list[Line]) -> dict[str, Table]:
    return {table.title: table for table in tables(Results(lines))}


def test_every_row_is_filled() -> None:
    found = all_tables(product_lines() + other_lines() + model_lines())
    text = "\n".join(table.markdown() for table in found.values())
    assert AWAITS_GPU not in text
    tiles = found["Linear layers of tiles on a GPU"]
    assert len(tiles.rows) == 9 * len(products.SIZES)
    by_name = found["Linear layers of tiles, copied by TMA"]
    assert len(by_name.rows) == 8 * len(products.SIZES) and by_name.rows[0].ratios == [pytest.approx(0.25 / 0.3)]
    assert tiles.rows[0].ratios == [0.5, 0.625, pytest.approx(0.25 / 0.6)]
    assert tiles.rows[0].verdict == "no, by 44%"
    assert tiles.rows[0].more["L2 bound"] == "0.78"
    assert found["Linear layers of single weights on a GPU"].rows[0].verdict == "yes"
    sizes = found["Other sizes of programs"].rows[0]
    assert sizes.ratios == [0.5] and sizes.more["best"] == "tokens 128"
    fused = [row.unmeasured for row in found["Gradient and update in one kernel"].rows]
    assert fused == ["the product is split, so it takes two", ""] * 3
    assert found["Host time of a call"].rows[0].verdict == "no, by 100%"
    assert found["Counters of the hardware"].rows[0].more == {"Duration": "8 us"}


def test_models() -> None:
    steps, largest = model_tables(Results(model_lines()))
    assert steps.rows[1].ratios == [2.0, 1.6] and steps.rows[1].verdict == "yes"
    assert [row.ratios for row in largest.rows[:2]] == [[11.5e9 / 12e9], [0.7]]


def test_a_run_that_was_cut_short_is_not_taken_for_a_whole_one() -> None:
    lines = [each for each in model_lines() if each.get("number", 0) < 2]
    _, largest = model_tables(Results(lines))
    assert {row.verdict for row in largest.rows} == {AWAITS_GPU}


def test_without_lines_every_row_awaits_a_gpu() -> None:
    for table in all_tables([]).values():
        assert table.rows and {row.verdict for row in table.rows} == {AWAITS_GPU}


def test_what_failed_says_so() -> None:
    lines = [line("ceilings", "copy", failed="RuntimeError: x"), line("graphs", "graph", block=64, failed="y")]
    found = all_tables(lines)
    assert found["Ceilings of the card"].rows[0].verdict == "failed"
    assert found["A step in a CUDA graph"].rows[0].verdict == "failed"
    assert "- graphs, graph: 64 y" in report.text(Results(lines))


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(line("ceilings", "copy", seconds=1)) + '\n{"stage": "ceil\n[1]\n')
    assert Results.of([path]).lines == [line("ceilings", "copy", seconds=1)]


def test_command(tmp_path: Path) -> None:
    lines, into = tmp_path / "lines.jsonl", tmp_path / "kernels.md"
    lines.write_text("\n".join(map(json.dumps, product_lines())))
    into.write_text("# Kernels\n\n### Step\n")
    run_python("-m", "benchmarks.gpu_check.report", str(lines), f"--into={into}")
    written = into.read_text()
    assert written.startswith("# Kernels\n\n### Step\n\n## On a GPU\n")
    assert "no run on a GPU yet" in written and "no, by 44%" in written
