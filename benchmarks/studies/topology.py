"""Asks which settings of topology updates are worth being defaults, with small models that train side by side.

Every comparison is of pairs: the same seed gives both runs the same initial values, text and, as far as they have any,
random choices. A run reads at least 20 bytes of text for every weight of its linear layers, active or not. The peak
rate of linear layers is .106 / (d · width), which fits the best rates of all earlier sweeps with an interior optimum
within a factor of 1.16; main comparisons are repeated at rates 1.5 times lower and higher. Counts of blocks to drop
accumulate, W is 100 and p is 1, unless a row says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.studies.case import Shape
from benchmarks.studies.estimate import linear_weights
from benchmarks.studies.replica import Replica
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import PLAIN_RATE, RATE_FACTORS, rate_of

NAME = "topology"
NUM_SEEDS = 5
BYTES_PER_WEIGHT = 20
DENSITIES = (0.25, 0.1)
EVERY, DROP_FRACTION, WINDOW = 100, 0.2, 50
STATIC: dict[str, Any] = {"every": 0}
UNPROTECTED: dict[str, Any] = {}
PROTECTED: dict[str, Any] = {"min_age": 2 * EVERY}


@dataclass(frozen=True)
class Row:
    """Compares a run with others, all in every seed; ``case`` and ``references`` are those of seed 0.

    Rows of a lower ``turn`` run first. A reference is None where the comparison says nothing.
    """

    label: str
    case: Replica
    references: tuple[Replica | None, ...]
    turn: int


@dataclass(frozen=True)
class Question:
    """Asks one thing: rows of runs, and the names of what they are compared with."""

    title: str
    text: str
    compared_with: tuple[str, ...]
    rows: tuple[Row, ...]


def steps_of(shape: Shape) -> int:
    """Returns the number of steps that read enough text for every weight."""
    return math.ceil(BYTES_PER_WEIGHT * linear_weights(shape) / (shape.batch * shape.sequence))


def run_of(shape: Shape, density: float, *changes: dict[str, Any]) -> Replica:
    """Returns the run of seed 0 with the settings that all share and the given changes."""
    settings: dict[str, Any] = {
        "shape": shape, "steps": steps_of(shape), "rate": rate_of(shape), "plain_rate": PLAIN_RATE,
        "density": density, "every": EVERY, "drop_fraction": DROP_FRACTION, "accumulate_counts": True,
    }  # fmt: skip
    for change in changes:
        settings |= change
    return Replica(**settings)


def narrower(shape: Shape, hidden: float, intermediate: float) -> Shape:
    """Returns the shape with a width and an intermediate width of these shares, and heads of the same size."""
    width = round(hidden * shape.hidden)
    heads = max(1, width * shape.heads // shape.hidden)
    return replace(shape, hidden=width, intermediate=round(intermediate * shape.intermediate), heads=heads)


def wider(shape: Shape, factor: float) -> Shape:
    return narrower(shape, factor, factor)


def for_tiles(shape: Shape) -> Shape:
    """Returns the shape in which a quarter of the tiles of 4 are four in a row of tiles."""
    return wider(shape, 4 / 3)


def of_seeds(case: Replica) -> list[Replica]:
    return [replace(case, seed=seed) for seed in range(NUM_SEEDS)]


def questions(scale: Scale) -> list[Question]:
    """Returns the questions in the order in which they are answered on the page."""
    shape = scale.replicas
    first = [protection(shape), rates(shape), cold_start(shape), policies(shape)]
    return [*first, tiles(for_tiles(shape)), plain_rates(shape)]


def cases(scale: Scale) -> list[Replica]:
    """Returns the runs, those of the first turn first, and of each turn every setting in all seeds."""
    by_turn: dict[int, list[Replica]] = {TRANSFER_TURN: transfer(scale)}
    for row in (row for question in questions(scale) for row in question.rows):
        settings = [reference for reference in row.references if reference] + [row.case]
        by_turn.setdefault(row.turn, []).extend(case for setting in settings for case in of_seeds(setting))
    return list(dict.fromkeys(case for turn in sorted(by_turn) for case in by_turn[turn]))


def _protection_turn(density: float, every: int, drop_fraction: float, updates: int) -> int:
    """Returns 0 for the default with and without protection, more for what says less."""
    if every == EVERY and drop_fraction == DROP_FRACTION and updates < 4:
        return 0
    if every == EVERY and (drop_fraction == DROP_FRACTION or (drop_fraction == 0.5 and updates < 4)):
        return 1 if density == DENSITIES[0] else 8
    is_single_change = drop_fraction == DROP_FRACTION or every == EVERY
    return 8 if is_single_change and updates < 4 and drop_fraction != 0.1 else 9


def protection(shape: Shape) -> Question:
    rows = []
    for density in DENSITIES:
        static = run_of(shape, density, STATIC)
        for every in (EVERY, 25, 400):
            for drop_fraction in (DROP_FRACTION, 0.5, 0.05, 0.1):
                change = {"every": every, "drop_fraction": drop_fraction}
                unprotected = run_of(shape, density, change)
                for updates in (0, 2, 4):
                    case = run_of(shape, density, change, {"min_age": updates * every})
                    label = f"d {density:g}, ΔT {every}, ζ {drop_fraction:g}, min_age {updates * every}"
                    references = (static, unprotected if updates else None)
                    rows.append(Row(label, case, references, _protection_turn(density, every, drop_fraction, updates)))
    return Question(
        "How often, how much, and protected how long",
        "Single weights. A block may be dropped from the age `min_age` on; 0 and ΔT are then the same, since a block "
        "is ΔT steps old when it is first judged.",
        ("static", "min_age 0"),
        tuple(rows),
    )


def rates(shape: Shape) -> Question:
    rows = []
    for density in DENSITIES:
        for factor in RATE_FACTORS:
            change = {"rate": factor * rate_of(shape)}
            static, unprotected, protected = (
                run_of(shape, density, change, kind) for kind in (STATIC, UNPROTECTED, PROTECTED)
            )
            label = f"d {density:g}, rate x {factor:.2f}"
            rows.append(Row(f"{label}, static", static, (run_of(shape, density, STATIC), None, None), 7))
            rows.append(Row(f"{label}, min_age 0", unprotected, (None, static, None), 7))
            rows.append(Row(f"{label}, min_age {2 * EVERY}", protected, (None, static, unprotected), 7))
    return Question(
        "The same at other rates",
        f"ΔT {EVERY}, ζ {DROP_FRACTION:g}, at rates 1.5 times lower and higher. The first column says what the other "
        "rate costs.",
        ("static at the rate of all others", "static at this rate", "min_age 0 at this rate"),
        tuple(rows),
    )


def cold_start(shape: Shape) -> Question:
    """Crosses age, W of newcomers and W of the first blocks, at three widths."""
    rows = []
    for width, first_turn, other_turn in ((shape, 2, 7), (narrower(shape, 0.5, 0.5), 7, 7), (wider(shape, 2), 10, 10)):
        default = run_of(width, 0.25, PROTECTED)
        for local_age, warmup, first_warmup in COLD_STARTS[1:]:
            case = cold_start_run(width, local_age, warmup, first_warmup)
            label = f"width {width.hidden}, {'age' if local_age else 'no age'}, W {warmup}, first W {first_warmup}"
            is_first = (local_age, warmup, first_warmup) in _FIRST_COLD_STARTS
            rows.append(Row(label, case, (default,), first_turn if is_first else other_turn))
    return Question(
        "Cold start: which part of the rule matters",
        f"Single weights, d 0.25, ΔT {EVERY}, ζ {DROP_FRACTION:g}, min_age {2 * EVERY}. Age: bias correction by the "
        "age of a block, or by the step count; W of newcomers; W of the blocks that are active from the start.",
        (f"age, W {EVERY}, first W {EVERY}",),
        tuple(rows),
    )


COLD_STARTS = tuple((age, new, first) for age in (True, False) for new in (EVERY, 0) for first in (EVERY, 0))
_FIRST_COLD_STARTS = ((False, 100, 100), (True, 0, 100), (True, 100, 0), (False, 0, 100), (False, 0, 0))


def cold_start_run(shape: Shape, local_age: bool, warmup: int, first_warmup: int) -> Replica:
    """Returns a run of the cross; a W of the first blocks that equals that of newcomers is left at its default."""
    first = {} if first_warmup == warmup else {"first_warmup": first_warmup}
    return run_of(shape, 0.25, PROTECTED, {"local_age": local_age, "block_warmup": warmup}, first)


POLICIES: dict[str, dict[str, Any]] = {
    f"drop by saliency, {WINDOW} steps": PROTECTED | {"drop": "saliency", "window": WINDOW},
    "grow by gradient": PROTECTED | {"grow": "gradient"},
    f"grow by gradient, {WINDOW} steps": PROTECTED | {"grow": "gradient", "window": WINDOW},
    "grow by momentum": PROTECTED | {"grow": "momentum", "window": WINDOW},
    "drop by momentum": PROTECTED | {"drop": "momentum"},
    "drop by magnitude relative to age": PROTECTED | {"drop": "relative"},
    "drop by magnitude relative to age, min_age 0": {"drop": "relative"},
}
_FIRST_POLICIES = 4


def policies(shape: Shape) -> Question:
    rows = []
    for density in DENSITIES:
        references = (run_of(shape, density, PROTECTED), run_of(shape, density, STATIC))
        for number, (label, change) in enumerate(POLICIES.items()):
            turn = 3 if density == DENSITIES[0] and number < _FIRST_POLICIES else 9
            rows.append(Row(f"d {density:g}, {label}", run_of(shape, density, change), references, turn))
    return Question(
        "Other rules to drop and to grow",
        f"Single weights, ΔT {EVERY}, ζ {DROP_FRACTION:g}, min_age {2 * EVERY} unless a row says 0.",
        ("drop by magnitude, grow at random", "static"),
        tuple(rows),
    )


def tiles(shape: Shape) -> Question:
    """Compares tiles of 4 at d = .25, four in a row of tiles at a width of 64, with what else has as many weights."""
    small = list(zip(_patterns(shape), _PATTERN_TURNS, strict=True))
    large = [(pattern, 10) for pattern in _patterns(wider(shape, 2))]
    rows = []
    for width, kinds in ((shape, small), (wider(shape, 2), large)):
        references = (run_of(width, 0.25, STATIC, _TILES), run_of(width, 0.25, STATIC))
        rows += [Row(f"width {width.hidden}, {label}", case, references, turn) for (label, case), turn in kinds]
    return Question(
        "Tiles, and what else as many weights can be",
        "d 0.25. Tiles of 4 x 4 in these widths leave as many in a row of tiles as tiles of 64 x 64 do in widths of "
        f"1,024 and 2,048. Moving: ΔT {EVERY}, ζ {DROP_FRACTION:g}. Dense models of N and of 2N weights are narrower; "
        "N is the number of active weights of the sparse ones.",
        ("tiles of 4, static", "single weights, static"),
        tuple(rows),
    )


_TILES: dict[str, Any] = {"block": "4"}
_PATTERN_TURNS = (4, 4, 4, *6 * (5,), *4 * (7,))


def _patterns(shape: Shape) -> list[tuple[str, Replica]]:
    text = {"steps": steps_of(shape)}
    protected, static = f"moving, min_age {2 * EVERY}", "static"
    half, most = narrower(shape, 0.5, 0.5), narrower(shape, 0.75, 0.625)
    kinds: dict[str, tuple[dict[str, Any], ...]] = {
        f"tiles of 4, {protected}": (_TILES, PROTECTED),
        "dense, N weights": ({"shape": half, "rate": rate_of(half), "density": 1.0}, STATIC, text),
        "dense, 2N weights": ({"shape": most, "rate": rate_of(most), "density": 1.0}, STATIC, text),
        "tiles of 4, moving, min_age 0": (_TILES,),
        f"tiles of 4 in a random order, {static}": (_TILES, STATIC, {"permuted": True}),
        f"single weights, equal fan-in, {static}": (STATIC, {"pattern": "fan_in"}),
        f"single weights, {protected}": (PROTECTED,),
        f"tiles of 4 in feed-forward, dense attention, {static}": (_TILES, STATIC, {"sparse": "feed_forward"}),
        f"single weights in feed-forward, dense attention, {static}": (STATIC, {"sparse": "feed_forward"}),
        f"single weights, equal fan-in, {protected}": (PROTECTED, {"pattern": "fan_in"}),
        f"tiles of 4 in a random order, {protected}": (_TILES, PROTECTED, {"permuted": True}),
        f"tiles of 4, equal fan-in, {protected}": (_TILES, PROTECTED, {"pattern": "fan_in"}),
        "dense, 4N weights": (STATIC, {"density": 1.0}),
    }
    return [(label, run_of(shape, 0.25, *changes)) for label, changes in kinds.items()]


def plain_rates(shape: Shape) -> Question:
    rows = []
    for density, kind in ((1.0, STATIC), (0.25, PROTECTED)):
        reference = run_of(shape, density, kind)
        others = {"that of linear layers before 1/d": reference.rate, "0.008": 8e-3, "0.016": 1.6e-2}
        for label, rate in others.items():
            case = run_of(shape, density, kind, {"plain_rate": rate})
            rows.append(Row(f"d {density:g}, {label}", case, (reference,), 5))
    return Question(
        "A rate of their own for embeddings and norms",
        f"Rates of embeddings, output embeddings and norms, beside {PLAIN_RATE:g}. The sparse model is protected.",
        (f"{PLAIN_RATE:g}",),
        tuple(rows),
    )


# SμPar (arXiv 2405.15743): rates by 1 / (d width), initial spread by 1 / √(d width), logits by 1 / width, from a base
# width on. With p = 1 and rescaled initial values a run at one width has these already.
TRANSFER_TURN = 6
TRANSFER_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the base rate
TRANSFER_DENSITIES = (1.0, 0.5, 0.25, 0.1)
TRANSFER_WIDTHS = (1, 2, 4)  # over that of `for_tiles`
_OF_LARGEST_WIDTH = (1.0, 0.25)  # the densities there: a run at the largest width takes sixteen times as long
TRANSFER_STEPS = 1000


def transfer_run(scale: Scale, density: float, width: int, factor: float) -> Replica:
    """Returns a run by SμPar's rules whose base rate is ``factor`` times that of all others. Static."""
    shape = wider(for_tiles(scale.replicas), width)
    change = {
        "steps": TRANSFER_STEPS, "rate": factor * rate_of(shape), "spread": width**-0.5,
        "head_scale": 1 / width,
    }  # fmt: skip
    return run_of(shape, density, STATIC, change)


def transfer(scale: Scale) -> list[Replica]:
    """Returns the runs of the question whether the best base rate is one for all, in one seed."""
    return [
        transfer_run(scale, density, width, factor)
        for width in TRANSFER_WIDTHS
        for density in (_OF_LARGEST_WIDTH if width == TRANSFER_WIDTHS[-1] else TRANSFER_DENSITIES)
        for factor in TRANSFER_FACTORS
    ]
