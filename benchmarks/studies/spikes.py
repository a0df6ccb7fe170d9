"""Asks: does growing blocks shake the loss, and which part of SMET's rule prevents it?

Constant rate after warm-up, a constant drop fraction of 0.1 to the end: every window is then like every other, and the
late ones meet mature moments, for which the naive rule's first step is up to 3.16 times too large. The metric is that
of `probe.py`, fixed before any run.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import EXPONENTS, PLAIN_RATE, RATE

NAME = "spikes"
DROP_FRACTION = 0.1
DEFAULT = (100, 0.25)
SETTINGS = (DEFAULT, (25, 0.25), (100, 0.1))  # ΔT, density

PROTECTED_UPDATES = 2

# What each method takes from SMET: local age, warm-up, rate scaled by density; ``min_age`` in updates.
_NAIVE = {"local_age": False, "block_warmup": 0, "exponent": 0.0}
METHODS: dict[str, dict] = {
    "naive SET": _NAIVE,
    "SMET": {},
    "SMET, protected": {"min_age": PROTECTED_UPDATES},
    "naive RigL": _NAIVE | {"grow": "gradient"},
    "SMET, gradient growth": {"grow": "gradient"},
    "age only": _NAIVE | {"local_age": True},
    "warm-up only": _NAIVE | {"block_warmup": 100},
    "rate scaling only": _NAIVE | {"exponent": EXPONENTS["1"]},
    "SMET without rate scaling": {"exponent": 0.0},
    "static": {"every": 0},
    "dense": {"density": 1.0, "every": 0},
}
IN_ALL_SETTINGS = ("naive SET", "SMET", "naive RigL", "rate scaling only", "SMET, protected")


def case(scale: Scale, method: str, every: int, density: float, seed: int) -> Case:
    options = {
        "shape": scale.small,
        "steps": scale.spike_steps,
        "rate": RATE,
        "plain_rate": PLAIN_RATE,
        "decay": "constant",
        "every": every,
        "density": density,
        "exponent": EXPONENTS["1"],
        "block_warmup": 100,
        "drop_fraction": DROP_FRACTION,
        "final_drop_fraction": DROP_FRACTION,
        "stop_fraction": 1.0,
        "probe": True,
        "seed": seed,
    }
    found = Case(**(options | METHODS[method]))
    return replace(found, min_age=found.min_age * every)


def cases(scale: Scale) -> list[Case]:
    """Returns the runs: those of the conclusions in five seeds, all other methods and settings in three."""
    found = [case(scale, method, *DEFAULT, seed) for seed in scale.many_seeds for method in IN_ALL_SETTINGS]
    found += [case(scale, method, *DEFAULT, seed) for seed in scale.seeds for method in METHODS]
    found += [
        case(scale, method, *setting, seed)
        for seed in scale.seeds
        for setting in SETTINGS[1:]
        for method in IN_ALL_SETTINGS
    ]
    return list(dict.fromkeys(found))
