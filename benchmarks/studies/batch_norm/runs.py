"""Trains small ResNets on made images: what a run is, which runs there are, and in which order they are made."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import smet_compile as smet
from benchmarks.studies.records import Records
from examples.image_data import NUM_CLASSES, made_images
from examples.resnet import accuracy, resnet
from smet_compile.ops import find_sites

DENSITIES = (0.1, 0.05, 0.03)
GROWTHS = {"RigL": "gradient", "SET": "random"}
RATES = (0.05, 0.1, 0.2, 0.4)
SWEEP_SEEDS, FRESH_SEEDS = range(3), range(3, 15)
BATCH, NUM_HELD_OUT = 64, 3000


@dataclass(frozen=True)
class Run:
    """Describes one training; ``density`` 1 is the dense baseline, which has no growth and no correction."""

    density: float
    growth: str | None
    corrects: bool
    rate: float
    seed: int
    epochs: int = 6
    num_images: int = 4000
    width: int = 16

    @property
    def key(self) -> str:
        return "train " + " ".join(str(value) for value in asdict(self).values())


@functools.cache
def data(num_images: int) -> tuple[Tensor, Tensor]:
    """Returns images to train on: a larger number begins with the images of a smaller one."""
    return made_images(num_images, seed=1)


@functools.cache
def held_out() -> tuple[Tensor, Tensor]:
    return made_images(NUM_HELD_OUT, seed=2)


def rate_at(part: float) -> float:
    """Returns the schedule of ImageNet runs in short: a warm-up over 5%, then a cosine to zero."""
    return min(1.0, part / 0.05 + 1e-3) * 0.5 * (1 + math.cos(math.pi * part))


def train(run: Run) -> dict[str, Any]:
    """Trains one network, and returns its record: held-out accuracy by epoch, and the ITOP rate."""
    images, labels = data(run.num_images)
    torch.manual_seed(run.seed)
    model, steps = resnet(NUM_CLASSES, run.width, 1), len(labels) // BATCH
    manager, optimizer = None, torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9, weight_decay=1e-4)
    if run.growth is not None:
        model = smet.sparsify(model, run.density, include="conv", distribution="erk", seed=run.seed)
        optimizer = smet.ActiveSGD(model, lr=run.rate, momentum=0.9, weight_decay=1e-4, warmup_steps=0)
        growth, total = GROWTHS[run.growth], run.epochs * steps
        manager = smet.TopologyManager(
            model,
            optimizer,
            auto_step=False,
            total_steps=total,
            every=15,
            grow=growth,
            drop_fraction=0.1,
            seed=run.seed,
        )
    if run.corrects:
        smet.correct_gradients(model, optimizer, images[:BATCH])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / (run.epochs * steps)))
    ever = {name: site.mask() for name, site in find_sites(model).items()}
    start, accuracies, losses = time.perf_counter(), [], []
    for _ in range(run.epochs):
        losses.append(0.0)
        for rows in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses[-1] += loss.item() / steps
            if manager is not None and manager.step() is not None:
                ever = {name: ever[name] | site.mask() for name, site in find_sites(model).items()}
        accuracies.append(accuracy(model, *held_out()))
    return {
        "key": run.key,
        **asdict(run),
        "accuracies": accuracies,
        "losses": losses,
        "itop": sum(int(m.sum()) for m in ever.values()) / max(1, sum(m.numel() for m in ever.values())),
        "seconds": time.perf_counter() - start,
    }


def sweep(density: float, growth: str | None, corrects: bool, rates: list[float]) -> list[Run]:
    return [Run(density, growth, corrects, rate, seed) for rate, seed in itertools.product(rates, SWEEP_SEEDS)]


def tried_rates(records: Records, density: float, growth: str | None, corrects: bool) -> list[float]:
    """Returns the rates of the sweep, with one more at an end as long as the best of them lies there."""
    rates = list(RATES)
    while all(run.key in records for run in sweep(density, growth, corrects, rates)):
        best = best_rate(records, density, growth, corrects, rates)
        if best == rates[0]:
            rates.insert(0, rates[0] / 2)
        elif best == rates[-1]:
            rates.append(rates[-1] * 2)
        else:
            break
    return rates


def best_rate(records: Records, density: float, growth: str | None, corrects: bool, rates: list[float]) -> float:
    """Returns the rate of the best mean accuracy at the end."""
    return max(rates, key=lambda rate: mean_at_the_end(records, sweep(density, growth, corrects, [rate])))


def mean_at_the_end(records: Records, runs: list[Run]) -> float:
    return statistics.fmean(records[run.key]["accuracies"][-1] for run in runs)


def sides() -> list[tuple[float, str | None, bool]]:
    """Returns what has a sweep of its own: density, growth, and whether the gradients are corrected."""
    return [*((0.1, growth, corrects) for growth in GROWTHS for corrects in (False, True)), (1.0, None, False)]


def tuned(records: Records) -> dict[tuple[str | None, bool], float]:
    """Returns the rate of each side whose sweep is finished, with its best rate inside."""
    found = {}
    for density, growth, corrects in sides():
        rates = tried_rates(records, density, growth, corrects)
        if all(run.key in records for run in sweep(density, growth, corrects, rates)):
            found[growth, corrects] = best_rate(records, density, growth, corrects, rates)
    return found


def pairs(records: Records, density: float, seeds: range) -> list[Run]:
    """Returns runs of fresh seeds, each side at the rate that was tuned for it at density 0.1."""
    rates = tuned(records)
    kinds = list(itertools.product(seeds, GROWTHS, (False, True)))
    return [Run(density, growth, corrects, rates[growth, corrects], seed) for seed, growth, corrects in kinds]


DENSE_CHANGES: dict[str, dict[str, int]] = {
    "as in the study": {},
    "4 times the epochs": {"epochs": 24},
    "4 times the images, a third of the epochs": {"num_images": 16000, "epochs": 2},
    "4 times the images, as many epochs": {"num_images": 16000},
    "twice the width": {"width": 32},
    "4 times the images and the epochs": {"num_images": 16000, "epochs": 24},
}


def dense_runs(records: Records) -> dict[str, list[Run]]:
    """Returns runs of the dense baseline as it is (fresh seeds) and with something changed (one), at its tuned rate."""
    rate = tuned(records)[None, False]
    return {
        name: [Run(1.0, None, False, rate, seed, **change) for seed in FRESH_SEEDS[: 1 if change else 3]]
        for name, change in DENSE_CHANGES.items()
    }


def all_runs(records: Records) -> Iterator[Run]:
    """Yields every run in order of importance; later ones depend on the records of earlier ones."""
    while True:  # a sweep may grow as its records come in
        missing = [
            run
            for density, growth, corrects in sides()
            for run in sweep(density, growth, corrects, tried_rates(records, density, growth, corrects))
            if run.key not in records
        ]
        if not missing:
            break
        yield from missing
    yield from pairs(records, 0.1, FRESH_SEEDS[:5])
    yield from itertools.chain.from_iterable(dense_runs(records).values())
    for density in DENSITIES[1:]:
        yield from pairs(records, density, FRESH_SEEDS[:5])
    yield from pairs(records, 0.1, FRESH_SEEDS[5:])


def run_missing(records: Records, minutes: float) -> None:
    """Makes the runs that have no record yet; begins none after so many minutes."""
    end = time.monotonic() + 60 * minutes
    for run in all_runs(records):
        if run.key in records:
            continue
        if time.monotonic() > end:
            return
        record = train(run)
        records.add(record)
        print(run.key, [round(each, 3) for each in record["accuracies"]], f"{record['seconds']:.0f} s", flush=True)
