"""Trains several cases in turns, step by step, each on a clock of its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks.measuring import processor
from benchmarks.studies.case import Case
from benchmarks.studies.cloze import Cloze
from benchmarks.studies.records import Records
from benchmarks.studies.trainer import Feed, Step, Trainee, build, compiled, corpus_of, held_out_loss, two_calls

NUM_POINTS = 20
CURVE_WINDOWS, FINAL_WINDOWS, CLOZE_WINDOWS = 64, 256, 128
_COMPILING_STEPS = 3
_BATCH = 16


@dataclass
class Rival:
    """Holds one of the models, the processor seconds and the loss of every step, and held-out losses by step."""

    case: Case
    trainee: Trainee
    step: Step
    feed: Feed
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case, eager: bool) -> Rival:
        trainee = build(case)
        if case.density == 1:
            groups = [{"params": group["params"], "lr": group["lr"]} for group in trainee.optimizer.param_groups]
            trainee.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        step = two_calls(trainee.model, trainee.optimizer) if eager else compiled(trainee)
        feed = Feed(case, corpus_of(case), [group["lr"] for group in trainee.optimizer.param_groups])
        return cls(case, trainee, step, feed)

    def advance(self, step: int) -> None:
        """Makes step ``step`` (from 0), charged in processor time. Topologies are static."""
        began = time.process_time()
        self.losses.append(self.feed.advance(self.step, self.trainee.optimizer, step))
        self.seconds.append(time.process_time() - began)

    def charged(self, num_steps: int) -> float:
        """Returns the seconds of the first steps; those that compile count as the median of all that do not."""
        later = self.seconds[_COMPILING_STEPS:]
        if not later:
            return sum(self.seconds[:num_steps])
        compiling = min(num_steps, _COMPILING_STEPS)
        return compiling * statistics.median(later) + sum(self.seconds[compiling:num_steps])

    def look(self, windows: torch.Tensor) -> None:
        """Adds a point to the curve."""
        self.points.append((len(self.losses), self.held_out(windows)))

    def held_out(self, windows: torch.Tensor) -> float:
        on_device = windows.to(self.case.shape.device)
        return held_out_loss(self.trainee.model, on_device, _BATCH) / self.feed.corpus.bytes_per_token

    def record(self) -> dict:
        """Returns the record of the run, as `train` makes it, with the processor time of each point of the curve."""
        corpus = self.feed.corpus
        loss = self.held_out(corpus.held_out(FINAL_WINDOWS))
        return {
            "key": self.case.key,
            "case": asdict(self.case),
            "loss": loss if math.isfinite(loss) else None,
            "cloze": Cloze.of(corpus, CLOZE_WINDOWS).ask(self.trainee.model, self.case.shape.device),
            "text": corpus.describe(),
            "curve": [[step, round(self.charged(step), 3), loss] for step, loss in self.points],
            "train": [round(loss, 4) for loss in self.losses],
            "step_seconds": [round(seconds, 4) for seconds in self.seconds],
            "density": self.case.density,
            "seconds": round(self.charged(len(self.seconds)), 1),
            "torch": torch.__version__,
            "processor": processor(),
        }


def race(cases: Sequence[Case], points: int, eager: bool = False) -> list[dict]:
    """Trains cases of one length in turns, and returns their records, each with a curve of so many points."""
    torch._dynamo.reset()
    rivals = [Rival.of(case, eager) for case in cases]
    steps, corpus = cases[0].steps, rivals[0].feed.corpus
    some = corpus.held_out(CURVE_WINDOWS)
    for rival in rivals:
        rival.look(some)
    for step in range(steps):
        for rival in rivals:
            rival.advance(step)
        if (step + 1) % max(1, steps // points) == 0 or step + 1 == steps:
            for rival in rivals:
                rival.look(some)
            told = ", ".join(f"{each.points[-1][1]:.4f} in {each.charged(step + 1):.0f} s" for each in rivals)
            print(f"step {step + 1} of {steps}: {told}", flush=True)
    return [rival.record() for rival in rivals]


def run_race(
    cases: Callable[[], Sequence[Case]],
    records: Records,
    workers: int,
    minutes: float = float("inf"),
    eager: bool = False,
) -> None:
    """Trains what is missing, one race after another on one thread; after ``minutes`` no further race is begun.

    ``cases`` is asked again after each race, since results may decide what is run next.
    """
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and (missing := [case for case in cases() if case.key not in records]):
        add_race(_first_race(missing), records, eager)


def _first_race(cases: Sequence[Case]) -> list[Case]:
    """Returns the first cases for as long as they are of one seed and of different models."""
    models: list[str] = []
    for case in cases:
        model = replace(case, rate=0.0).key
        if model in models or case.seed != cases[0].seed:
            break
        models.append(model)
    return list(cases[: len(models)])


def add_race(cases: Sequence[Case], records: Records, eager: bool) -> None:
    """Trains cases in a process of its own, with one thread, and keeps their records."""
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[name] = "1"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for record in pool.apply(_work, (list(cases), eager)):
            records.add(record)


def _work(cases: list[Case], eager: bool) -> list[dict]:
    torch.set_num_threads(1)
    return race(cases, NUM_POINTS, eager)
