"""Measures the gradient of a row over its fan-in, by norm and initialisation, and looks for what skews it.

The hidden layer of a small network has rows of 4 to 96 active weights. Where it is not batch norm that skews its
gradients, parts of the network are held at their start to find the one that does.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smet_compile as smet
from benchmarks.studies.records import Records
from examples.image_data import NUM_CLASSES, made_images
from smet_compile.ops import find_sites

NORMS = {"batch norm": nn.BatchNorm1d, "layer norm": nn.LayerNorm, "no norm": nn.Identity}
STARTS = ("dense fan-in", "active fan-in")
STEPS = (0, 200)
WIDTH, SEEDS = 192, range(3)
HELD: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "the hidden layer": ("2.",),
    "the layer after it": ("5.",),
    "the layer after it, and the norm's scale and shift": ("3.", "5."),
}
"""Names of parameters, by their beginning, that stay as they were drawn."""


@dataclass(frozen=True)
class Case:
    """Describes one measurement; ``held`` names the parts of the network that are not trained."""

    norm: str
    start: str
    num_steps: int
    held: str = "nothing"

    @property
    def key(self) -> str:
        more = "" if self.held == "nothing" else f", {self.held} held"
        return f"skew {self.norm}, {self.start}, {self.num_steps}{more}"


@dataclass(frozen=True)
class Rows:
    """Holds what was measured of each row: its active weights, its gradient's rms, what reads it, and its output."""

    fan_in: Tensor
    gradient: Tensor
    outgoing: Tensor
    output: Tensor


def cases() -> list[Case]:
    """Returns every norm, start and time, then layer norm with parts held."""
    found = [Case(norm, start, steps) for start, norm, steps in itertools.product(STARTS, NORMS, STEPS)]
    return found + [Case("layer norm", STARTS[0], STEPS[1], held) for held in list(HELD)[1:]]


def mlp(norm: str, start: str, seed: int) -> nn.Module:
    """Returns a network whose hidden layer has rows of 4 to 96 active weights, drawn by the chosen initialisation."""
    torch.manual_seed(seed)
    hidden = nn.Linear(WIDTH, WIDTH, bias=False)
    before = nn.Linear(768, WIDTH), nn.ReLU()
    model = nn.Sequential(*before, hidden, NORMS[norm](WIDTH), nn.ReLU(), nn.Linear(WIDTH, NUM_CLASSES))
    fan_in = torch.logspace(math.log10(4), math.log10(96), WIDTH).round()[torch.randperm(WIDTH)]
    mask = torch.rand(WIDTH, WIDTH).argsort(1).argsort(1) < fan_in[:, None]
    scale = fan_in.mean() if start == "dense fan-in" else fan_in
    with torch.no_grad():
        hidden.weight.copy_(torch.randn(WIDTH, WIDTH) * (2 / scale.expand(WIDTH)).sqrt()[:, None])
    return smet.sparsify(model, masks={"2.weight": mask})


def measure(case: Case, seed: int, data: tuple[Tensor, Tensor]) -> Rows:
    """Trains, and then measures gradients over 20 batches."""
    images, labels = data
    model = mlp(case.norm, case.start, seed)
    site = find_sites(model)["2.weight"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(HELD[case.held] or ("none",)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    mask = site.mask()
    fan_in, squares = mask.view(WIDTH, WIDTH).sum(1), torch.zeros(WIDTH)
    for step in range(case.num_steps + 20):
        if step == case.num_steps:
            site.values.requires_grad_()
        rows = torch.randint(len(labels), (128,), generator=generator)
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        if step < case.num_steps:
            optimizer.step()
        else:
            dense = torch.zeros(WIDTH * WIDTH).masked_scatter_(mask, site.values.grad.square())
            squares += dense.view(WIDTH, WIDTH).sum(1) / fan_in
        model.zero_grad()
    with torch.no_grad():
        output = model[:5](images[:1000]).square().mean(0).sqrt()
    return Rows(fan_in, (squares / 20).sqrt(), model[5].weight.detach().norm(dim=0), output)


def exponent(fan_in: Tensor, sizes: Tensor) -> float:
    """Returns the slope of log size over log fan-in, by least squares; rows of size zero are left out."""
    kept = sizes > 0
    x, y = fan_in[kept].double().log(), sizes[kept].double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def run_skew(records: Records, picture: Any) -> None:
    """Measures every case with three seeds, keeps what is new, and draws the picture."""
    images, labels = made_images(2000, seed=1)
    data = F.avg_pool2d(images, 2).flatten(1), labels
    found = {case: [measure(case, seed, data) for seed in SEEDS] for case in cases()}
    for case, rows in found.items():
        record = {
            "key": case.key,
            "exponents": [exponent(each.fan_in, each.gradient) for each in rows],
            "outgoing": [exponent(each.fan_in, each.outgoing) for each in rows],
            "output": [exponent(each.fan_in, each.output) for each in rows],
            "apart": [exponent(each.fan_in, each.gradient / each.outgoing) for each in rows],
        }
        print(case.key, {k: f"{statistics.fmean(v):+.2f}" for k, v in record.items() if k != "key"}, flush=True)
        if case.key not in records:
            records.add(record)
    _draw(found, picture)


def _draw(found: dict[Case, list[Rows]], picture: Any) -> None:
    from benchmarks.studies.reports.page import new_figure

    figure = new_figure(11, 6)
    axes = figure.subplots(len(STARTS), len(NORMS), sharex=True)
    for axis, (start, norm) in zip(axes.flat, itertools.product(STARTS, NORMS), strict=True):
        for num_steps in STEPS:
            rows = found[Case(norm, start, num_steps)]
            mean = statistics.fmean(exponent(each.fan_in, each.gradient) for each in rows)
            sizes = rows[0].gradient
            relative = sizes / sizes[sizes > 0].log().mean().exp()
            axis.loglog(rows[0].fan_in, relative, ".", ms=3, label=f"{num_steps} steps: {mean:+.2f}")
        axis.set_title(f"{norm}, {start} initialisation", fontsize=9)
        axis.legend(fontsize=8)
    figure.supxlabel("active fan-in of a row")
    figure.supylabel("rms of the row's gradient, relative")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
