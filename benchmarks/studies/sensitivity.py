"""Asks how much the settings of the rule matter: one at a time, the others at their defaults.

The rate of linear layers is .106 / (d · width) (`benchmarks/studies/settings.py`). Newcomers are protected for two
updates, or for one where half of the blocks go. More levels of the same settings, in smaller models and five seeds, are
in the study of topology updates.
"""

from __future__ import annotations

from benchmarks.studies.case import Case
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import by_width

NAME = "sensitivity"
DENSITY = 0.25

# Setting → the values to try beside the default, by the words of a reader.
FACTORS: dict[str, dict[str, dict]] = {
    "topology": {"static": {"every": 0}},
    "warm-up W": {"0": {"block_warmup": 0}},
    "moments of grown blocks": {"zero, no age, W = 0 (naive)": {"local_age": False, "block_warmup": 0}},
    "growth": {"gradient": {"grow": "gradient"}},
    "protection of newcomers": {"none": {"min_age": 0}},
    "initial values": {"not rescaled": {"rescale": False}},
    "drop fraction ζ at the start": {"0.5": {"drop_fraction": 0.5}},
}
DEFAULTS = {
    "topology": "an update every 100 steps", "warm-up W": "100", "moments of grown blocks": "zero, local age",
    "growth": "random", "protection of newcomers": "2 ΔT", "initial values": "rescaled by 1/√d",
    "drop fraction ζ at the start": "0.2",
}  # fmt: skip


def case(scale: Scale, seed: int, **options) -> Case:
    return by_width(scale.tiny, scale.tiny_steps, DENSITY, "1", seed, **options)


def cases(scale: Scale) -> list[Case]:
    changes = [change for values in FACTORS.values() for change in values.values()]
    return [case(scale, seed, **change) for seed in scale.seeds for change in ({}, *changes)]
