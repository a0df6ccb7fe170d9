"""Measures the host time from the call of an op to its launch, for Triton's and C++ kernels, with stub launches.

    python -m benchmarks.host_cost [--calls 1000]

No GPU is needed: a launch, or a call of C++, is replaced by nothing, so what is left is Python's and the dispatcher's.
Each row is the median of the process time of single calls, with the tenth and the ninetieth percentile. Gradients are
not recorded, as in a compiled graph. ``new_empty`` is the cost of making one tensor, which every product does, and
``an op`` that of an op of eight arguments that does nothing: no op in Python can take less.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LIMITS = {"masked_matmul": 15.0, "sampled_matmul": 15.0, "unpack": 15.0, "pack": 15.0, "optimizer step": 1500.0}
NUM_PARAMETERS = 168
_PATHS = ("triton", "cpp")


class Stub:
    """Stands for a kernel, a grid's launcher and a library of functions, and does nothing."""

    def __getitem__(self, grid: Any) -> Stub:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Stub:
        return self


def microseconds(call: Callable[[], Any], calls: int) -> tuple[float, float, float]:
    """Returns the median, the tenth and the ninetieth percentile of the process time of single calls."""
    clock = time.process_time_ns
    for _ in range(20):
        call()
    empty, found = [], []
    for _ in range(calls):
        start = clock()
        empty.append(clock() - start)
        start = clock()
        call()
        found.append(clock() - start)
    overhead = statistics.median(empty)
    tenths = statistics.quantiles(found, n=10)
    median, low, high = ((each - overhead) / 1000 for each in (statistics.median(found), tenths[0], tenths[-1]))
    return median, low, high


def ops_of(site: Any) -> dict[str, Callable[[], Any]]:
    """Returns a call of each op with a compact weight."""
    smet, compact, values = torch.ops.smet, site.compact, site.values.detach()
    topology = compact.topology, compact.lists, site.layout.text
    rows, cols = site.layout.matrix
    left, right, dense = torch.randn(64, rows), torch.randn(64, cols), torch.randn(rows, cols)
    num_active = compact.num_active
    return {
        "masked_matmul": lambda: smet.masked_matmul.default(right, values, *topology, True),
        "sampled_matmul": lambda: smet.sampled_matmul.default(left, right, *topology, num_active),
        "unpack": lambda: smet.unpack.default(values, *topology, None, None, False),
        "pack": lambda: smet.pack.default(dense, *topology, num_active),
    }


def step_of_many(count: int = NUM_PARAMETERS, device: str | torch.device = "cpu") -> Callable[[], Any]:
    """Returns an optimizer step of ``count`` small parameters: compact weights, biases and norms."""
    import smet_compile as smet

    layers = [m for _ in range(count // 4) for m in (nn.Linear(32, 32), nn.LayerNorm(32))]
    model = smet.sparsify(nn.Sequential(*layers).to(device), 0.5, block_shape=16)
    optimizer = smet.ActiveAdamW(model, lr=1e-3)
    parameters = list(model.parameters())
    assert len(parameters) == count
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer.step


def stub_launches(path: str) -> None:
    """Replaces what launches by nothing."""
    if path == "triton":
        from smet_compile.ops.kernels.triton import supports

        supports.on_device = lambda kernel, device: Stub()
        return
    from smet_compile.ops.kernels.native import adamw, expand, tiles

    for module in (adamw, expand, tiles):
        module.library = functools.partial(_stub_of, module.library)


def _stub_of(real: Callable[[str], Any], name: str) -> Any:
    """Returns a library that answers what it can do, and computes nothing."""
    library, stub = real(name), Stub()
    if library is not None:
        stub.__dict__.update({each: getattr(library, each) for each in ("lanes", "has_bf16") if name == "tiles"})
    return None if library is None else stub


def measure(path: str, calls: int) -> None:
    """Prints a row for each op, in a process of its own."""
    import smet_compile as smet
    from smet_compile.ops import find_sites

    torch.set_num_threads(1)
    real_step = step_of_many() if path == "cpp" else None
    stub_launches(path)
    rows: dict[str, tuple[float, float, float]] = {}
    with torch.no_grad():
        for block, kind in ((16, "tiles"), (1, "single weights")):
            layer = smet.sparsify(nn.Linear(64, 64, bias=False), 0.5, block_shape=block)
            (site,) = find_sites(layer).values()
            for name, call in ops_of(site).items():
                if kind == "single weights" and name.endswith("matmul"):
                    continue  # a vendor's dense product is part of it
                rows[f"{name}, {kind}"] = microseconds(call, calls)
        rows[f"optimizer step, {NUM_PARAMETERS} parameters"] = microseconds(step_of_many(), max(20, calls // 20))
        if real_step is not None:
            rows["optimizer step, C++ included"] = microseconds(real_step, max(20, calls // 20))
        x = torch.randn(4)
        rows["new_empty"] = microseconds(lambda: x.new_empty(64, 64), calls)
        rows["an op"] = microseconds(_op_of_eight(), calls)
    for name, (median, low, high) in rows.items():
        limit = LIMITS.get(name.split(",")[0]) if "included" not in name else None
        wanted = "" if limit is None else f"{limit:.0f}: {'met' if median <= limit else 'not met'}"
        print(f"| {path} | {name} | {median:.1f} | {low:.1f}-{high:.1f} | {wanted} |", flush=True)


def _op_of_eight() -> Callable[[], Any]:
    library = torch.library.Library("smet_host_cost", "DEF")
    library.define("nothing(Tensor a, Tensor b, Tensor c, Tensor d, str e, bool f, Tensor? g, Tensor? h) -> Tensor")
    library.impl("nothing", _first, "CompositeExplicitAutograd")
    x = torch.randn(4)
    op = torch.ops.smet_host_cost.nothing.default
    keep = library  # its ops go with it
    return lambda: op(x, x, x, x, "", True, None, None) if keep else None


def _first(first: Tensor, *others: Any) -> Tensor:
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--path", choices=_PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.path:
        measure(args.path, args.calls)
        return
    print("| kernels | call | median, µs | 10%-90% | limit |\n|---|---|---|---|---|", flush=True)
    for path in _PATHS:
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if path == "triton" else {})
        command = [sys.executable, "-m", "benchmarks.host_cost", "--path", path, "--calls", str(args.calls)]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
