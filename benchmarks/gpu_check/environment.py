"""Says where the run takes place, and compiles all kernels of the other stages in many processes at once.

A worker makes the very calls of the other stages, but Triton only compiles where it would launch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_check import correctness, optimizer, products
from benchmarks.gpu_check.cases import SIDES, Case, calls_of
from benchmarks.gpu_check.records import Check
from benchmarks.gpu_check.tools import tool
from benchmarks.measuring import processor
from smet_compile.ops.kernels.triton import supports

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist", "hypothesis", "datasets")
TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi", "ptxas")
WORKERS, DRY_WORKERS = 14, 1
_SPARE_SECONDS = 5
"""No task is begun so shortly before the end."""
LARGEST_TREE = 64 * 2**20
_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"
_HOPPER = ("cuda", 90, 32)

Task = tuple[str, Callable[[], object]]


def run(check: Check) -> None:
    check.record("software", python=platform.python_version(), packages=_versions(), tools={t: tool(t) for t in TOOLS})
    with check.attempt("tree"):
        size = tree_bytes(Path(__file__).parents[2])
        check.record("tree", bytes=size, passed=size <= LARGEST_TREE)
    taken = multiprocessing.get_context("fork").Value("i", 0)
    workers = _start_workers(check, taken)
    with check.attempt("card"):
        check.record("card", **_card(check))
    for worker in workers:
        worker.join()
    number = len(tasks(check))
    check.record("all compiled", tasks=number, taken=min(number, taken.value - len(workers)))


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _card(check: Check) -> dict[str, Any]:
    machine = {"processor": processor(), "cores": os.cpu_count()}
    if check.dry:
        return {"name": "none", **machine}
    facts = torch.cuda.get_device_properties(check.device)
    smi = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    return {
        "name": facts.name,
        "capability": [facts.major, facts.minor],
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "L2_bytes": facts.L2_cache_size,
        "cuda": torch.version.cuda,
        "nvidia_smi": dict(zip(_QUERY.split(","), subprocess.check_output(smi, text=True).split(", "), strict=False)),
        **machine,
    }


def tree_bytes(root: Path) -> int:
    """Returns the bytes of the files that git tracks or does not ignore; without git, of all below ``root``."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
        files = [root / name for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        files = list(root.rglob("*"))
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def tasks(check: Check) -> list[Task]:
    """Returns the calls whose kernels are compiled, those of the first stages first."""
    found: list[Task] = []
    for case in correctness.cases(check):
        found.append((str(case), functools.partial(_products, case, check)))
    for kind in (*correctness.kinds(check), *optimizer.kinds(check)):
        side = kind.block if kind.block > 1 else 32
        make = functools.partial(optimizer.aged, check, kind, 2 * side, 2)
        found.append((kind.name, functools.partial(_step, make)))
    for size in check.size(products.SIZES, ()):
        for block in SIDES:
            case = Case(size.rows, size.cols, block, size.tokens)
            found.append((str(case), functools.partial(_products, case, check)))
    for block, counts in check.size(optimizer.TILES, {}).items():
        found += [(f"fused {block}, {t} tokens", functools.partial(_fused, check, block, t)) for t in counts]
    for block in check.size(products.SIDES_OF_SWEEP, ()):
        for part, sizes in products.candidates(check):
            found.append((f"{block} tiles, {part}, {sizes}", functools.partial(_candidate, check, block, part, sizes)))
    return found[:1] if check.dry else found


def _products(case: Case, check: Check) -> None:
    for call in calls_of(case, check.device):
        call()


def _step(make: Callable[[], torch.optim.Optimizer]) -> None:
    make().step()


def _fused(check: Check, block: int, tokens: int) -> None:
    two, one, _ = optimizer.fused_calls(check, block, tokens)
    two()
    one()


@functools.lru_cache(maxsize=1)
def _layer_of_sweep(check: Check, block: int) -> Any:
    return products.sweep_layer(check, block)


def _candidate(check: Check, block: int, part: str, sizes: products.Sizes) -> None:
    layer = _layer_of_sweep(check, block)
    with products.with_sizes(layer, sizes):
        layer.product(part, "triton_tiles")


def _start_workers(check: Check, taken: Any) -> Sequence[BaseProcess]:
    """Starts processes that take one task after another. They are forked before this one has started CUDA."""
    context = multiprocessing.get_context("fork")
    count = check.size(WORKERS, DRY_WORKERS)
    workers = [context.Process(target=_work, args=(check, taken)) for _ in range(count)]
    for worker in workers:
        worker.start()
    return workers


def _work(check: Check, taken: Any) -> None:
    with compiling_only(check) as compiled:
        all_tasks = tasks(check)
        while True:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(all_tasks) or check.left() < _SPARE_SECONDS:
                return
            name, call = all_tasks[number]
            with check.attempt("compiled", case=name):
                _compile(check, name, call, compiled)


def _compile(check: Check, name: str, call: Callable[[], object], compiled: list[Any]) -> None:
    compiled.clear()
    start = time.perf_counter()
    call()
    kernels = {f"{kernel.name} {kernel.hash[:8]}": _resources(check, kernel) for kernel in compiled}
    check.record("compiled", case=name, seconds=time.perf_counter() - start, kernels=kernels)


def _resources(check: Check, kernel: Any) -> dict[str, int]:
    """Returns what a kernel takes of a multiprocessor: as the driver says, so only on a card but for its memory."""
    found = {"shared_bytes": kernel.metadata.shared}
    if not check.dry:
        kernel._init_handles()
        found |= {"registers": kernel.n_regs, "spills": kernel.n_spills}
    return found


@contextmanager
def compiling_only(check: Check) -> Iterator[list[Any]]:
    """Lets Triton compile instead of launch, and collects its kernels; without a card for sm_90, as if on one."""
    from triton.runtime import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", only_compile), _as_on_a_card(check):
        yield compiled


class _NoCard:
    """Stands for the driver of a card that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*_HOPPER)


@contextmanager
def _as_on_a_card(check: Check) -> Iterator[None]:
    if not check.dry:
        yield
        return
    from triton.runtime import driver

    driver.set_active(_NoCard())
    with (
        mock.patch.object(supports, "runs_on", lambda _: True),
        mock.patch.object(supports, "architecture", lambda _: "hopper"),
    ):
        yield
