"""Asks how much the settings of the rule matter: one at a time, the others at their defaults.

The rate of linear layers is .106 / (d · width) (`benchmarks/studies/settings.py`). Newcomers are protected for two
updates, or for one where half of the blocks go.
"""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import by_width

NAME = "sensitivity"
DENSITY = 0.25

# Setting → the values to try beside the default, by the words of a reader.
FACTORS: dict[str, dict[str, dict]] = {
    "warm-up W": {str(steps): {"block_warmup": steps} for steps in (0, 25, 200)},
    "steps between updates ΔT": {str(steps): {"every": steps} for steps in (25, 200)} | {"static": {"every": 0}},
    "drop fraction ζ at the start": {str(share): {"drop_fraction": share} for share in (0.05, 0.5)},
    "initial values": {"not rescaled": {"rescale": False}},
    "moments of grown blocks": {
        "m = 0, v seeded, no age": {"seeded_moments": True},
        "zero, no age, W = 0 (naive)": {"local_age": False, "block_warmup": 0},
    },
    "protection of newcomers": {"none": {"min_age": 0}},
    "growth": {"gradient": {"grow": "gradient"}},
}
DEFAULTS = {
    "warm-up W": "100", "steps between updates ΔT": "100", "drop fraction ζ at the start": "0.2",
    "initial values": "rescaled by 1/√d", "moments of grown blocks": "zero, local age", "growth": "random",
    "protection of newcomers": "2 ΔT",
}  # fmt: skip


def case(scale: Scale, seed: int, **options) -> Case:
    return by_width(scale.tiny, scale.tiny_steps, DENSITY, "1", seed, **options)


def cases(scale: Scale) -> list[Case]:
    changes = [change for values in FACTORS.values() for change in values.values()]
    return [case(scale, seed, **change) for seed in scale.seeds for change in ({}, *changes)]
