"""Measures training steps of networks with batch norm: memory beside dense, and what the correction costs.

    python -m benchmarks.image_steps memory [--out docs/results/convolutions.md]
    python -m benchmarks.image_steps correction [--out docs/results/convolutions.md]

Memory: a ResNet of the size of ResNet-18 (``examples/resnet.py``), images of 32x32, SGD with momentum, each run in a
process of its own, measured as ``benchmarks/compiled_step.py`` does. Correction: steps with it and without, in turns in
one process, and the time of its op alone. ``--out`` writes the section of the page, and leaves the others.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import smet_compile as smet
from benchmarks.measuring import MIB, machine, peaks, run_json, spread
from benchmarks.ratios import Clock, Pairs, Work, in_turns
from examples.resnet import resnet
from smet_compile.ops import find_sites

RETURNED_FROM = 384 * 1024
"""Bytes from which on freed memory goes back to the system at once."""
NUM_CLASSES, DENSITIES = 24, (1.0, 0.25, 0.1)
MODES = ("eager", "compiled")


def large() -> nn.Module:
    """Returns the network of ResNet-18's widths and blocks."""
    return resnet(NUM_CLASSES, 64, 2, stages=4)


def linears() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 1024), *layers, nn.Linear(1024, NUM_CLASSES))


class ProcessorClock(Clock):
    """Measures the processor's time of this process, which waits for other processes change little."""

    def seconds(self, work: Work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start


class Case(NamedTuple):
    """Holds a network whose correction is timed, and how it is made sparse."""

    name: str
    make: Callable[[], nn.Module]
    block: int
    batch: int
    modes: tuple[str, ...] = MODES


CASES = (
    Case("ResNet of the example, single weights", lambda: resnet(NUM_CLASSES, 16, 1), 1, 64),
    Case("ResNet of ResNet-18's size, single weights", large, 1, 32, ("eager",)),
    Case("ResNet of ResNet-18's size, tiles of 8", large, 8, 32, ("eager",)),
    Case("four linears of 1024, single weights", linears, 1, 64),
    Case("four linears of 1024, tiles of 16", linears, 16, 64),
)


class Training:
    """Trains a network on one batch of random images; the compiled one updates in backward where it is sparse."""

    def __init__(self, model: nn.Module, batch: int, is_compiled: bool, corrects: bool = False) -> None:
        self.model = model
        self.images, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(NUM_CLASSES, (batch,))
        self.is_sparse = bool(find_sites(model))
        if self.is_sparse:
            self.optimizer: torch.optim.Optimizer = smet.ActiveSGD(model, lr=1e-3, momentum=0.9)
        else:
            self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if corrects:
            smet.correct_gradients(model, self.optimizer, self.images)
        self.step = self._fused() if is_compiled and self.is_sparse else self._two_calls(is_compiled)

    def _fused(self) -> Callable[[], Any]:
        self.fused = smet.compile_train_step(self.model, self.optimizer, _loss)
        return lambda: self.fused((self.images, self.labels))

    def _two_calls(self, is_compiled: bool) -> Callable[[], Any]:
        run = torch.compile(self.model) if is_compiled else self.model

        def step() -> None:
            cross_entropy(run(self.images), self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def formula(self, is_compiled: bool) -> int:
        """Counts the bytes of weights, gradients and momentum; of compact weights also their index and ages."""
        compact = {id(site.values): site.num_active for site in find_sites(self.model).values()}
        total = sum(buffer.nbytes for buffer in self.model.buffers()) + sum(compact.values())  # an age is a byte
        for parameter in self.model.parameters():
            total += parameter.nbytes * (2 if is_compiled and id(parameter) in compact else 3)
        return total


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels)


def sparse(make: Callable[[], nn.Module], density: float, block: int) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    if density == 1:
        return model
    return smet.sparsify(model, density, include="conv", block_shape=block, distribution="erk")


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Measures in the child process."""
    is_compiled = args.child[1] == "compiled"
    training = Training(sparse(large, float(args.child[0]), 1), args.batch, is_compiled)
    formula = training.formula(is_compiled)
    resident, allocated = peaks(training.step, 3)
    return {"resident": resident, "allocated": allocated, "formula": formula}


def memory(args: argparse.Namespace) -> str:
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for number, mode, density in itertools.product(range(args.repeats), args.modes, DENSITIES):
        child = "--child", str(density), mode, "--batch", str(args.batch)
        environment = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED_FROM), "OMP_NUM_THREADS": "1"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{args.caches}/{mode}-{density}"
        result = run_json("-m", "benchmarks.image_steps", "memory", *child, **environment)
        runs.setdefault((mode, density), []).append(result)
        print(number, mode, density, result, file=sys.stderr, flush=True)
    headings = ["step", "weights", "resident, MiB", "allocated, MiB", "weights, gradients, momentum, MiB"]
    lines = [f"| {' | '.join([*headings, 'resident / dense', 'allocated / dense'])} |", "|" + "---|" * 7]
    for (mode, density), results in runs.items():
        cells = [mode, "dense" if density == 1 else f"density {density:g}"]
        cells.append(spread([each["resident"] / MIB for each in results], ".0f"))
        cells += [f"{statistics.median(e[q] for e in results) / MIB:.0f}" for q in ("allocated", "formula")]
        for quantity in ("resident", "allocated"):
            ratios = [a[quantity] / b[quantity] for a, b in zip(results, runs[mode, 1.0], strict=True)]
            cells.append(spread(ratios, ".2f"))
        lines.append(f"| {' | '.join(cells)} |")
    return MEMORY.format(batch=args.batch, repeats=args.repeats, table="\n".join(lines), machine=machine())


def correction(args: argparse.Namespace) -> str:
    lines = ["| network | step | step, ms | with / without (95% interval of the median) | op alone / step |"]
    lines.append("|" + "---|" * 5)
    for case in CASES:
        for mode in case.modes:
            if mode in args.modes:
                lines.append(correction_row(case, mode, args.rounds))
                print(lines[-1], flush=True)
    return CORRECTION.format(table="\n".join(lines), rounds=args.rounds, machine=machine(), load=os.getloadavg()[0])


def correction_row(case: Case, mode: str, rounds: int) -> str:
    model = sparse(case.make, 0.1, case.block)
    plain, corrected = (
        Training(each, case.batch, mode == "compiled", corrects)
        for each, corrects in ((model, False), (copy.deepcopy(model), True))
    )
    work = [(torch.randn_like(s.values), s.compact) for s in find_sites(corrected.model).values()]
    work = [(grad, compact) for grad, compact in work if compact.scales_rows]

    def op_alone() -> None:
        for grad, compact in work:
            torch.ops.smet.scale_rows(grad, compact.topology, compact.lists, compact.layout.text)

    steps, alone = in_turns(
        plain.step, (corrected.step, op_alone), rounds, ProcessorClock(torch.device("cpu")), warmup=3
    )
    seconds, low, high = statistics.median(steps.baseline), *median_interval(steps)
    share = statistics.median(alone.candidate) / seconds
    ratio = f"{statistics.median(steps.costs):.3f} ({low:.3f}-{high:.3f})"
    return f"| {case.name} | {mode} | {1000 * seconds:.1f} | {ratio} | {share:.2%} |"


def median_interval(pairs: Pairs) -> tuple[float, float]:
    """Returns the 95% interval of the median of the ratios, by the order of their numbers."""
    ratios = sorted(pairs.costs)
    reach = round(0.98 * len(ratios) ** 0.5)
    middle = len(ratios) // 2
    return ratios[max(0, middle - reach)], ratios[min(len(ratios) - 1, middle + reach)]


MEMORY = """## Memory of a training step

Peak of a step from the third on of a ResNet of the size of ResNet-18 (`examples/resnet.py`, width 64, two blocks in
each of four stages), {batch} images of 32x32, SGD with momentum, fp32, single weights, ERK shares. *Resident*: the
high-water mark of a fresh process, less what is resident when every tensor has been emptied. *Allocated*: the same peak
by torch's allocator, exact, without libraries' own scratch. The rest beside weights, gradients and momentum is
activations, and the unpacked weight and dense gradient of one layer at a time. Compiled sparse steps update in backward
and keep no compact gradient. Medians of {repeats} processes, and the least and largest.

Made by `python -m benchmarks.image_steps memory --out docs/results/convolutions.md`;
{machine}.

{table}
"""
CORRECTION = """## Cost of the correction

Training steps with `correct_gradients` and without, at density 0.1, in turns in one process of one thread: medians of
{rounds} turns, in the processor's time. The last column is the time of the op alone, which writes to
new memory; eager linear layers scale the gradient over itself. Compiled steps update in backward.

Made by `python -m benchmarks.image_steps correction --out docs/results/convolutions.md`;
{machine}; load of the machine at the end: {load:.0f}.

{table}
"""


def replace_section(page: Path, section: str) -> None:
    """Writes a section of a page in the place of the one with the same heading, or at the end."""
    parts = page.read_text().split("\n## ")
    heading, _, content = section.removeprefix("## ").partition("\n")
    kept = [part for part in parts[1:] if part.partition("\n")[0] != heading]
    page.write_text("\n## ".join([parts[0], *kept, f"{heading}\n{content}"]).rstrip("\n") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "correction"))
    parser.add_argument("--batch", type=int, default=32, help="memory: images in a step")
    parser.add_argument("--repeats", type=int, default=3, help="memory: processes of each kind")
    parser.add_argument("--rounds", type=int, default=40, help="correction: turns of each pair")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, help="the page that has the section")
    parser.add_argument("--child", nargs=2, metavar=("DENSITY", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure_memory(args)))
        return
    with tempfile.TemporaryDirectory() as args.caches:
        section = {"memory": memory, "correction": correction}[args.what](args)
    print(section)
    if args.out is not None:
        replace_section(args.out, section)


if __name__ == "__main__":
    main()
