"""Gradient skew under batch norm, and training with SparseOpt's correction and without.

    python -m benchmarks.studies.batch_norm skew     the gradient of a row over its fan-in, and a picture
    python -m benchmarks.studies.batch_norm train    ResNets on made images: RigL and SET, with and without
    python -m benchmarks.studies.batch_norm page     writes docs/results/batch_norm.md from the records

A study that was stopped goes on where it was: every finished run is a line of docs/results/studies/batch_norm.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smet_compile as smet
from smet_compile.ops import find_sites

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs/results/studies/batch_norm.jsonl"
PICTURE = ROOT / "docs/results/figures/batch_norm_skew.png"
PAGE = ROOT / "docs/results/batch_norm.md"
sys.path.insert(0, str(ROOT / "examples"))

from image_data import NUM_CLASSES, made_images  # noqa: E402
from train_resnet import resnet  # noqa: E402

NORMS = {"batch norm": nn.BatchNorm1d, "layer norm": nn.LayerNorm, "no norm": nn.Identity}
STARTS = ("dense fan-in", "active fan-in")
DENSITIES = (0.1, 0.05, 0.03)
GROWTHS = {"RigL": "gradient", "SET": "random"}
EPOCHS, NUM_IMAGES, NUM_HELD_OUT, BATCH, RATE = 6, 4000, 3000, 64, 0.1


def mlp(norm: str, start: str, seed: int) -> nn.Module:
    """Returns a network whose hidden layer has rows of 4 to 96 active weights, drawn by the chosen initialisation."""
    torch.manual_seed(seed)
    hidden = nn.Linear(192, 192, bias=False)
    model = nn.Sequential(
        nn.Linear(768, 192), nn.ReLU(), hidden, NORMS[norm](192), nn.ReLU(), nn.Linear(192, NUM_CLASSES)
    )
    fan_in = torch.logspace(math.log10(4), math.log10(96), 192).round()[torch.randperm(192)]
    mask = torch.rand(192, 192).argsort(1).argsort(1) < fan_in[:, None]
    scale = fan_in.mean() if start == "dense fan-in" else fan_in
    with torch.no_grad():
        hidden.weight.copy_(torch.randn(192, 192) * (2 / scale.expand(192)).sqrt()[:, None])
    return smet.sparsify(model, masks={"2.weight": mask})


def skew(norm: str, start: str, seed: int, num_steps: int, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the fan-in of each row, and the rms of its active weights' gradients over 20 batches after training."""
    images, labels = data
    model = mlp(norm, start, seed)
    site = find_sites(model)["2.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(192)
    fan_in = site.mask().view(192, 192).sum(1)
    for step in range(num_steps + 20):
        rows = torch.randint(len(labels), (128,), generator=generator)
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        if step < num_steps:
            optimizer.step()
        else:
            dense = torch.zeros(192 * 192).masked_scatter_(site.mask(), site.values.grad.square())
            squares += dense.view(192, 192).sum(1) / fan_in
        optimizer.zero_grad()
    return fan_in, (squares / 20).sqrt()


def exponent(fan_in: Tensor, rms: Tensor) -> float:
    """Returns the slope of log rms over log fan-in, by least squares; rows without any gradient are left out."""
    kept = rms > 0
    x, y = fan_in[kept].double().log(), rms[kept].double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def run_skew() -> None:
    """Measures every case with three seeds, draws the picture, and writes a record for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images, labels = made_images(2000, seed=1)
    data = F.avg_pool2d(images, 2).flatten(1), labels
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True)
    for row, (start, norm) in zip(itertools.count(), itertools.product(STARTS, NORMS)):
        axis = axes.flat[row]
        for num_steps in (0, 200):
            found = [skew(norm, start, seed, num_steps, data) for seed in range(3)]
            slopes = [exponent(*each) for each in found]
            record = {"kind": "skew", "norm": norm, "start": start, "num_steps": num_steps, "exponents": slopes}
            add(record)
            fan_in, rms = found[0]
            mean = sum(slopes) / 3
            axis.loglog(
                fan_in, rms / rms[rms > 0].log().mean().exp(), ".", ms=3, label=f"{num_steps} steps: {mean:+.2f}"
            )
            print(norm, start, num_steps, [round(slope, 3) for slope in slopes], flush=True)
        axis.set_title(f"{norm}, {start} initialisation", fontsize=9)
        axis.legend(fontsize=8)
    figure.supxlabel("active fan-in of a row")
    figure.supylabel("rms of the row's gradient, relative")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def train(density: float, growth: str, corrects: bool, seed: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Trains one network, and returns its record: held-out accuracy by epoch, and the ITOP rate."""
    images, labels, held_out, held_out_labels = data
    torch.manual_seed(seed)
    model = smet.sparsify(resnet(NUM_CLASSES, 16, 1), density, include="conv", distribution="erk", seed=seed)
    steps = len(labels) // BATCH
    optimizer = smet.ActiveSGD(model, lr=RATE, momentum=0.9, weight_decay=1e-4, warmup_steps=0)
    if corrects:
        smet.correct_gradients(model, optimizer, images[:BATCH])
    manager = smet.TopologyManager(
        model, optimizer, total_steps=EPOCHS * steps, every=15, grow=GROWTHS[growth], drop_fraction=0.1, seed=seed
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / (EPOCHS * steps)))
    ever = {name: site.mask() for name, site in find_sites(model).items()}
    start, accuracies = time.perf_counter(), []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if manager.step() is not None:
                ever = {name: ever[name] | site.mask() for name, site in find_sites(model).items()}
        model.eval()
        with torch.no_grad():
            accuracies.append(float((model(held_out).argmax(1) == held_out_labels).float().mean()))
        model.train()
    return {
        "kind": "train",
        "density": density,
        "growth": growth,
        "corrects": corrects,
        "seed": seed,
        "accuracies": accuracies,
        "itop": sum(int(m.sum()) for m in ever.values()) / sum(m.numel() for m in ever.values()),
        "seconds": time.perf_counter() - start,
    }


def rate_at(part: float) -> float:
    """Returns the schedule of ImageNet runs in short: a warm-up over 5%, then a cosine to zero."""
    return min(1.0, part / 0.05 + 1e-3) * 0.5 * (1 + math.cos(math.pi * part))


def run_train(seeds: int, minutes: float) -> None:
    """Trains what is missing, seed by seed so that comparisons stay paired, until the minutes are over."""
    end = time.monotonic() + 60 * minutes
    data = (*made_images(NUM_IMAGES, seed=1), *made_images(NUM_HELD_OUT, seed=2))
    done = {(r["density"], r["growth"], r["corrects"], r["seed"]) for r in records("train")}
    for seed, density, growth in itertools.product(range(seeds), DENSITIES, GROWTHS):
        for corrects in (False, True):
            if (density, growth, corrects, seed) in done:
                continue
            if time.monotonic() > end:
                return
            record = train(density, growth, corrects, seed, data)
            add(record)
            accuracies = [round(each, 3) for each in record["accuracies"]]
            print(
                seed,
                density,
                growth,
                "corrected" if corrects else "plain",
                accuracies,
                f"{record['seconds']:.0f} s",
                flush=True,
            )


def records(kind: str) -> list[dict[str, Any]]:
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def add(record: dict[str, Any]) -> None:
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")


_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def interval(numbers: list[float]) -> str:
    """Returns mean and 95% interval by Student's t; without interval where there is one number."""
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return f"{mean:+.1f}"
    deviation = math.sqrt(sum((n - mean) ** 2 for n in numbers) / (len(numbers) - 1))
    return f"{mean:+.1f} ± {_T_95[len(numbers) - 1] * deviation / math.sqrt(len(numbers)):.1f}"


def write_page() -> None:
    """Writes the tables of both studies from their records."""
    lines = ["# Batch norm: skewed gradients and their correction", "", INTRODUCTION, "", "## The skew", "", SKEW, ""]
    lines += ["| norm | initialisation | fresh | after 200 steps |", "|---|---|---|---|"]
    skews = {(r["norm"], r["start"], r["num_steps"]): r["exponents"] for r in records("skew")}
    for start, norm in itertools.product(STARTS, NORMS):
        cells = [f"{sum(s := skews[norm, start, n]) / 3:+.2f} ({min(s):+.2f} to {max(s):+.2f})" for n in (0, 200)]
        lines.append(f"| {norm} | {start} | {' | '.join(cells)} |")
    lines += ["", "![Gradient over fan-in](figures/batch_norm_skew.png)", "", "## Training", "", TRAINING, ""]
    lines += [f"| density | growth | runs | {' | '.join(f'epoch {e + 1}' for e in range(EPOCHS))} | ITOP |"]
    lines += ["|" + "---|" * (EPOCHS + 4)]
    found = {(r["density"], r["growth"], r["seed"], r["corrects"]): r for r in records("train")}
    for density, growth in itertools.product(DENSITIES, GROWTHS):
        seeds = [s for s in range(5) if all((density, growth, s, c) in found for c in (False, True))]
        if not seeds:
            continue
        plain, corrected = ([found[density, growth, s, c] for s in seeds] for c in (False, True))
        means = [sum(r["accuracies"][e] for r in plain) / len(seeds) for e in range(EPOCHS)]
        gains = [
            interval([100 * (c["accuracies"][e] - p["accuracies"][e]) for p, c in zip(plain, corrected, strict=True)])
            for e in range(EPOCHS)
        ]
        itop = [sum(r["itop"] for r in rows) / len(seeds) for rows in (plain, corrected)]
        cells = [f"{100 * mean:.1f}, {gain}" for mean, gain in zip(means, gains, strict=True)]
        lines.append(f"| {density} | {growth} | {len(seeds)} | {' | '.join(cells)} | {itop[0]:.3f}, {itop[1]:.3f} |")
    hours = sum(r["seconds"] for r in records("train")) / 3600
    lines += ["", f"{len(records('train'))} runs, {hours:.1f} hours of one thread. torch {torch.__version__}.", ""]
    PAGE.write_text("\n".join(lines))


INTRODUCTION = """What batch norm does to the gradients of rows with different fan-in, and whether correcting them helps
([how it works](../batch_norm.md)). Made by `python -m benchmarks.studies.batch_norm skew`,
`python -m benchmarks.studies.batch_norm train` and `python -m benchmarks.studies.batch_norm page`; records:
`docs/results/studies/batch_norm.jsonl`."""
SKEW = """The hidden layer of a small network has 192 rows of 4 to 96 active weights. The table shows the exponent a in
rms(gradient of a row) ∝ fan-in^a, fitted by least squares, mean and range of three seeds; SparseOpt's derivation says
-0.5 under batch norm. With dense fan-in initialisation the weights of all rows have one variance, as those of a dense
layer that was made sparse. With active fan-in initialisation those of a row begin with the variance 2/k, so that all
outputs have one size and the skew is absent at the start. Without batch norm rows of many weights get the larger
gradients after 200 steps; why was not looked into."""
TRAINING = f"""A ResNet of three blocks, {NUM_IMAGES:,} made images of {NUM_CLASSES} classes, {EPOCHS} epochs, SGD with
momentum, rate {RATE} with a warm-up and a cosine to zero as ImageNet runs have, ERK shares. A cell holds
the held-out accuracy in percent of runs without the correction, and what the correction adds in points: mean and 95%
interval (Student's t) over seeds, paired. Of many intervals one in twenty excludes zero by chance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["skew", "train", "page"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begins no run after them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "skew":
        run_skew()
    elif args.what == "train":
        run_train(args.seeds, args.minutes)
    else:
        write_page()


if __name__ == "__main__":
    main()
