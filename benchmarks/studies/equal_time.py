"""Asks: which sparse model is ahead of the dense one after as much time?

Static tiles make a step shorter, so that a sparse model reads more text in the time that the dense one takes; or they
make a wider model as fast. Tried are tiles at two densities, tiles in feed-forward layers alone beside dense attention,
tiles for four fifths of the steps of which the last fifth is dense, tiles that cover other units in each layer (by
permutations, charged as if they took no time), larger tiles in a model twice as wide, and single weights. No topology
moves. The time of a step is that of a compiled one in one thread, measured by turns with the dense model's
(`equal_time_steps.json`). Every run has a schedule of its own length. Peak rates are factors of .106 / (d · width) for
linear layers, tried by twos in one seed until a lower and a higher one are worse. Three seeds, five of dense models and
of tiles, permuted or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.studies import rates
from benchmarks.studies.case import Case, Shape
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import PLAIN_RATE, rate_of
from benchmarks.studies.step_costs import step_costs

NAME = "equal_time"
STEPS = "equal_time_steps.json"
_DENSE_FROM = 0.8
_STATIC: dict[str, Any] = {"every": 0}
_QUARTER = _STATIC | {"density": 0.25, "block": "16"}


@dataclass(frozen=True)
class Rival:
    """Describes a contestant: the width of its model over the dense one's, and fields of its case."""

    name: str
    widening: int
    options: dict[str, Any]

    def case(self, scale: Scale, steps: int, factor: float = 1.0, seed: int = 0) -> Case:
        shape = wider(scale.timed[0], self.widening)
        rate = factor * rate_of(shape)
        return Case(shape=shape, steps=steps, rate=rate, plain_rate=PLAIN_RATE, seed=seed, **self.options)


DENSE = Rival("dense", 1, {})
TILES = Rival("tiles of 16, d 0.25", 1, _QUARTER)
SINGLE = Rival("single weights, d 0.25", 1, _QUARTER | {"block": "1"})
THEN_DENSE = Rival("tiles of 16, d 0.25, then dense", 1, _QUARTER | {"dense_from": _DENSE_FROM})
IN_FEED_FORWARD = Rival("tiles of 16, d 0.25, in feed-forward", 1, _QUARTER | {"sparse": "feed_forward"})
IN_ORDER = TILES, IN_FEED_FORWARD
PERMUTED = tuple(Rival(f"{rival.name}, permuted", 1, rival.options | {"permuted": True}) for rival in IN_ORDER)
RIVALS = (
    DENSE,
    Rival("tiles of 16, d 0.5", 1, _QUARTER | {"density": 0.5}),
    TILES,
    PERMUTED[0],
    THEN_DENSE,
    IN_FEED_FORWARD,
    PERMUTED[1],
    Rival("tiles of 32, d 0.25, twice as wide", 2, _QUARTER | {"block": "32"}),
    SINGLE,
)
_IN_MANY_SEEDS = DENSE, TILES, PERMUTED[0]


def wider(shape: Shape, factor: int) -> Shape:
    """Returns the shape with more heads of the same size, and a wider intermediate layer."""
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate, "heads": shape.heads}
    return replace(shape, **{name: factor * size for name, size in sizes.items()})


def prepare(scale: Scale, folder: Path) -> None:
    """Measures the steps of all contestants, once."""
    if (folder / STEPS).exists():
        return
    timed = [rival for rival in RIVALS if rival not in (THEN_DENSE, *PERMUTED)]
    measured = step_costs([rival.case(scale, 1) for rival in timed], scale.eager)
    folder.mkdir(parents=True, exist_ok=True)
    found = {rival.name: cost for rival, cost in zip(timed, measured, strict=True)}
    (folder / STEPS).write_text(json.dumps(found, indent=1) + "\n")


def costs(folder: Path) -> dict[str, float]:
    """Returns by contestant the time of a step, on average over a run, over that of the dense model's."""
    found = json.loads((folder / STEPS).read_text())
    found[THEN_DENSE.name] = _DENSE_FROM * found[TILES.name] + (1 - _DENSE_FROM)
    for rival, permuted in zip(IN_ORDER, PERMUTED, strict=True):
        found[permuted.name] = found[rival.name]
    return found


def steps_of(scale: Scale, cost: float) -> int:
    """Returns the number of steps that take as long as those of the dense model."""
    return round(scale.timed[1] / cost)


def search(scale: Scale, rival: Rival, cost: float, records: Records) -> Search:
    return rates.search(lambda factor: rival.case(scale, steps_of(scale, cost), factor, scale.seeds[0]), records)


def cases(scale: Scale, folder: Path) -> list[Case]:
    """Returns the runs that can be named by now: rates of all contestants, then seeds of those whose rate is known."""
    records, measured = Records(folder / f"{NAME}.jsonl"), costs(folder)
    searches = [(rival, search(scale, rival, measured[rival.name], records)) for rival in RIVALS]
    found = [case for _, each in searches for case in each.cases]
    for seed in scale.many_seeds:
        found += [
            rival.case(scale, steps_of(scale, measured[rival.name]), each.best, seed)
            for rival, each in searches
            if each.best is not None and (seed in scale.seeds or rival in _IN_MANY_SEEDS)
        ]
    return list(dict.fromkeys(found))


def losses(scale: Scale, rival: Rival, cost: float, records: Records) -> dict[int, float]:
    """Returns the losses at the best rate by seed, of the seeds that ended."""
    best = search(scale, rival, cost, records).best
    if best is None:
        return {}
    return rates.losses([rival.case(scale, steps_of(scale, cost), best, seed) for seed in scale.many_seeds], records)
