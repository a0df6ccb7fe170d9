"""Makes the tables of what was measured on a GPU, each row beside its goal; a row without a result awaits a GPU."""

from __future__ import annotations

import functools
import statistics

from benchmarks.gpu_check import optimizer, products
from benchmarks.gpu_check.cases import BY_NAME, computes
from benchmarks.gpu_check.report_models import model_tables
from benchmarks.gpu_check.report_rows import row
from benchmarks.gpu_check.results import Line, Results
from benchmarks.layer import DENSITY, PRODUCTS, Size
from benchmarks.tables import AWAITS_GPU, Row, Table, Target, at_least, at_most

USEFUL_SHARE = {128: 0.9, 64: 0.7, 32: 0.4}
SINGLE_WEIGHTS = at_most(1.05)
OVER_COPY = at_least(0.93)
COUNTERS = (
    "Duration",
    "Compute (SM) Throughput",
    "DRAM Throughput",
    "L2 Hit Rate",
    "Achieved Occupancy",
    "Registers Per Thread",
)
HOST_SECONDS = at_most(15e-6)
NO_LONGER = at_most(1)
PROGRAM_SIDE = 256
"""Tokens that one program of a masked product takes at most."""
PRODUCTS_NOTE = (
    f"bf16, density {DENSITY}, device time between events, the L2 cache flushed before each product. Tiles: useful "
    "operations a second, those of active blocks, over those of the vendor's dense product. L2 bound: a program that "
    f"makes {PROGRAM_SIDE} by b outputs, b the side of a tile, reads 2 ({PROGRAM_SIDE} + b) bytes for "
    f"2 · {PROGRAM_SIDE} b operations, at the measured bandwidth."
)
TMA_NOTE = (
    f"As above, with `SMET_COMPILE_KERNEL={BY_NAME}`: forward and input gradients of tiles of 32, 64 and 128, weight "
    "gradients of 64 and 128."
)
STEP_NOTE = (
    f"{optimizer.NUM_TENSORS} weights of {optimizer.SIDE}x{optimizer.SIDE}, density {DENSITY}, several generations of "
    "blocks. Bytes of a step: each weight, gradient, moment (and age, of single weights) read once, all but gradient "
    'and age written once. "host" is how long the call keeps Python.'
)
FUSED_NOTE = (
    "A weight gradient of a 4096 by 4096 weight and its update, bf16: one kernel over two. Two are the default; "
    "`SMET_COMPILE_KERNEL=triton_fused` asks for one."
)


def tables(results: Results) -> list[Table]:
    """Returns the tables in the order of the stages."""
    return [
        Table("Ceilings of the card", "—", "Random data.", _ceiling_rows(results)),
        Table("Linear layers of tiles on a GPU", "useful share of dense speed", PRODUCTS_NOTE, _tile_rows(results)),
        Table("Linear layers of tiles, copied by TMA", "useful share", TMA_NOTE, _tile_rows(results, BY_NAME)),
        Table("Linear layers of single weights on a GPU", "sparse / dense", "As above.", _single_rows(results)),
        Table("Other sizes of programs", "best / chosen", "4096→4096, 16384 tokens, bf16.", _size_rows(results)),
        Table("Optimizer step on a GPU", "bandwidth / that of a copy", STEP_NOTE, _step_rows(results)),
        Table("Gradient and update in one kernel", "one / two", FUSED_NOTE, _fused_rows(results)),
        Table("Host time of a call", "seconds", "Launches that are not waited for.", _host_rows(results)),
        Table(
            "A step in a CUDA graph",
            "replayed / called",
            "Products and update; forward, backward and update.",
            _graph_rows(results),
        ),
        Table("Counters of the hardware", "—", "Launches of real size under Nsight Compute.", _counter_rows(results)),
        *model_tables(results),
    ]


def _ceiling_rows(results: Results) -> list[Row]:
    units = {
        "copy": ("bytes_a_second", "TB/s"),
        "product": ("operations_a_second", "TFLOP/s"),
        "L2": ("bytes_a_second", "TB/s"),
    }
    rows = []
    for what, (field, unit) in units.items():
        read = functools.partial(_ceiling_row, what, field, unit)
        rows.append(row(what, results.last("ceilings", what), read))
    return rows


def _ceiling_row(what: str, field: str, unit: str, line: Line) -> Row:
    return Row(what, more={"value": f"{line[field] / 1e12:.3g} {unit}"})


def _product_line(results: Results, size: Size, block: int, part: str, by: str | None = None) -> Line | None:
    return results.last("products", "product", size=str(size), block=block, part=part, by=by)


def _tile_rows(results: Results, by: str | None = None) -> list[Row]:
    l2 = results.last("ceilings", "L2")
    bandwidth = None if l2 is None else l2.get("bytes_a_second")
    rows = []
    for size in products.SIZES:
        for block, share in USEFUL_SHARE.items():
            for part in (part for part in PRODUCTS if computes(by or "", part, block)):
                what, target = f"{part}, {block} tiles, {size}", at_least(share)
                line = _product_line(results, size, block, part, by)
                read = functools.partial(_tile_row, what, block, bandwidth, target)
                rows.append(row(what, line, read, target))
    return rows


def _tile_row(what: str, block: int, bandwidth: float | None, target: Target, line: Line) -> Row:
    shares = [line["density"] / ratio for ratio in line["ratios"]]
    dense = line["dense_operations_a_second"]
    more = {"dense TFLOP/s": f"{dense / 1e12:.3g}", "sparse / dense time": f"{statistics.median(line['ratios']):.3f}"}
    if bandwidth is not None:
        more["L2 bound"] = f"{min(1, l2_bound(block, bandwidth) / dense):.2f}"
    return Row(what, line["kernels"], shares, target, more)


def l2_bound(block: int, bandwidth: float) -> float:
    """Returns the operations a second of programs that read all they multiply from L2, ``bandwidth`` bytes a second."""
    return bandwidth * PROGRAM_SIDE * block / (PROGRAM_SIDE + block)


def _single_rows(results: Results) -> list[Row]:
    rows = []
    for size in products.SIZES:
        for part in PRODUCTS:
            what = f"{part}, {size}"
            read = functools.partial(_single_row, what)
            rows.append(row(what, _product_line(results, size, 1, part), read, SINGLE_WEIGHTS))
    return rows


def _single_row(what: str, line: Line) -> Row:
    return Row(what, line["kernels"], line["ratios"], SINGLE_WEIGHTS)


def _size_rows(results: Results) -> list[Row]:
    """Returns a row for each side and product: the fastest sizes beside those that are chosen now."""
    rows = []
    for block in products.SIDES_OF_SWEEP:
        for part in PRODUCTS:
            what = f"{part}, {block} tiles"
            lines = [each for each in results.all("products", "sizes") if _is_of(each, block, part)]
            chosen = _product_line(results, products.SIZES[0], block, part)
            best = min(lines, key=lambda line: line["seconds"], default=None)
            if best is not None and chosen is not None:
                best = best | {"chosen": chosen["seconds"]}
            rows.append(row(what, best if chosen else None, functools.partial(_best_row, what)))
    return rows


def _is_of(line: Line, block: int, part: str) -> bool:
    return line["part"] == part and line["case"].startswith(f"{block} tiles") and "seconds" in line


def _best_row(what: str, line: Line) -> Row:
    sizes = ", ".join(f"{name} {number}" for name, number in line["sizes"].items())
    more = {"best": sizes, "ms": f"{1e3 * line['seconds']:.3g}"}
    return Row(what, ratios=[line["seconds"] / line["chosen"]], more=more)


def _step_rows(results: Results) -> list[Row]:
    lines = {line["case"]: line for line in results.all("optimizer", "step")}
    names = dict.fromkeys([*optimizer.STATES, *lines])
    return [row(name, lines.get(name), functools.partial(_step_row, name), OVER_COPY) for name in names]


def _step_row(what: str, line: Line) -> Row:
    more = {
        "copy, GB/s": f"{line['copy_bytes_a_second'] / 1e9:.0f}",
        "step, ms": f"{1e3 * line['seconds']:.3g}",
        "host, ms": f"{1e3 * line['host_seconds']:.3g}",
        "launches": str(line["launches"]),
    }
    return Row(what, line["kernel"], line["over_copy"], OVER_COPY, more)


def _fused_rows(results: Results) -> list[Row]:
    rows = []
    for block, counts in optimizer.TILES.items():
        for tokens in counts:
            what = f"{block} tiles, {tokens} tokens"
            line = results.last("optimizer", "fused", block=block, tokens=tokens)
            rows.append(row(what, line, functools.partial(_fused_row, what)))
    return rows


def _fused_row(what: str, line: Line) -> Row:
    if not line["is_one"]:
        return Row(what, unmeasured="the product is split, so it takes two")
    more = {"two, ms": f"{1e3 * line['two_seconds']:.3g}", "one, ms": f"{1e3 * line['one_seconds']:.3g}"}
    return Row(what, ratios=line["ratios"], more=more)


def _host_rows(results: Results) -> list[Row]:
    lines = results.latest("host", "call", lambda line: [line["case"], line.get("block")])
    if not lines:
        return [Row("products, unpack, pack", target=HOST_SECONDS, unmeasured=AWAITS_GPU)]
    return [_host_row(line) for line in lines]


def _host_row(line: Line) -> Row:
    if "block" not in line:
        what, target = f"optimizer step, {line.get('parameters', 'many')} parameters", None
    else:
        kind = "single weights" if line["block"] == 1 else f"{line['block']} tiles"
        what, target = f"{line['case']}, {kind}", HOST_SECONDS
    return row(what, line, lambda line: Row(what, ratios=[line["seconds"]], target=target), target)


def _graph_rows(results: Results) -> list[Row]:
    rows = []
    for block in (64, 1):
        what = "single weights" if block == 1 else f"{block} tiles"
        line = results.last("graphs", "graph", block=block)
        rows.append(row(what, line, functools.partial(_graph_row, what), NO_LONGER))
    what, line = "64 tiles, compiled training step", results.last("graphs", "reduce-overhead", block=64)
    return [*rows, row(what, line, functools.partial(_graph_row, what), NO_LONGER)]


def _graph_row(what: str, line: Line) -> Row:
    ratio = line["replay_seconds"] / line["eager_seconds"]
    bits = {"bits": "equal" if line["passed"] else "different", "replayed, ms": f"{1e3 * line['replay_seconds']:.3g}"}
    return Row(what, ratios=[ratio], target=NO_LONGER, more=bits)


def _counter_rows(results: Results) -> list[Row]:
    lines = results.latest("counters", "counters", lambda line: line.get("launch"))
    if not lines:
        return [Row("products and update", unmeasured=AWAITS_GPU)]
    return [row(line.get("kernel", "products and update"), line, _counter_row) for line in lines]


def _counter_row(line: Line) -> Row:
    return Row(line["kernel"], more={name: line["values"][name] for name in COUNTERS if name in line["values"]})
