"""Asks whether the method keeps its place beside dense training and the naive rule as models grow, without tuning.

Three sizes with the same settings: the peak rate of linear layers is .106 / (d · width) for every method, which other
studies found for other models (docs/results/topology.md); embeddings and norms have one rate; ΔT and W are 50 steps,
and newcomers are protected for two updates. Naive methods train at the same rate per density, without local age,
warm-up or protection. At the smallest size rates are searched as well, until a lower and a higher one are worse, and
every method trains at its own best; and two other texts are read: natural language
(`python -m benchmarks.studies.debian_text texts/debian`), and all Python source of the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.studies import rates
from benchmarks.studies.case import Case
from benchmarks.studies.corpus import ENVIRONMENT
from benchmarks.studies.rates import Search
from benchmarks.studies.records import Records
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import PLAIN_RATE, RATE_FACTORS, rate_of

NAME = "sizes"
EVERY = 50
DENSITIES = (0.25, 0.1)
_NAIVE: dict[str, Any] = {"local_age": False, "block_warmup": 0}
METHODS: dict[str, dict[str, Any]] = {
    "SMET": {"min_age": 2 * EVERY},
    "naive SET": _NAIVE,
    "naive RigL": _NAIVE | {"grow": "gradient"},
}
Kind = tuple[str, float]
DENSE: Kind = ("dense", 1.0)
KINDS: tuple[Kind, ...] = (DENSE, *((method, density) for density in DENSITIES for method in METHODS))
TEXTS = ("texts/debian", ENVIRONMENT)
OF_TEXTS: tuple[Kind, ...] = (DENSE, ("SMET", 0.25), ("naive SET", 0.25))
OF_RATES: tuple[Kind, ...] = (DENSE, *((method, 0.25) for method in METHODS))


def case(scale: Scale, size: int, kind: Kind, seed: int, rate_factor: float = 1.0, **options: Any) -> Case:
    """Returns a run of the size of that number, of a method at a density."""
    (shape, steps), (method, density) = scale.sizes[size], kind
    if density < 1:
        options |= {"density": density, "every": EVERY, "block_warmup": EVERY} | METHODS[method]
    return Case(
        shape=shape, steps=steps, rate=rate_factor * rate_of(shape), plain_rate=PLAIN_RATE, seed=seed, **options
    )


def search(scale: Scale, kind: Kind, records: Records) -> Search:
    """Looks for the best rate of a method at the smallest size."""
    factors = sorted((*RATE_FACTORS, 1.0))
    return rates.search(lambda factor: case(scale, 0, kind, scale.seeds[0], factor), records, factors)


def cases(scale: Scale, folder: Path) -> list[Case]:
    """Returns the runs that can be named by now.

    The largest size at the lowest density comes last, and is the first to be cut.
    """
    records = Records(folder / f"{NAME}.jsonl")
    *smaller, largest = range(len(scale.sizes))
    first, last = ([kind for kind in KINDS if (kind[1] == DENSITIES[-1]) == is_last] for is_last in (False, True))
    found = [case(scale, size, kind, seed) for size in smaller for seed in scale.seeds for kind in KINDS]
    found += [case(scale, largest, kind, seed) for seed in scale.seeds for kind in first]
    for kind in OF_RATES:
        looked = search(scale, kind, records)
        found += looked.cases
        if looked.best is not None:
            found += [case(scale, 0, kind, seed, looked.best) for seed in scale.seeds]
    found += [case(scale, 0, kind, seed, text=text) for text in TEXTS for seed in scale.seeds for kind in OF_TEXTS]
    found += [case(scale, largest, kind, seed) for seed in scale.seeds for kind in last]
    return list(dict.fromkeys(found))
