"""Finds the dense model that takes as many bytes as a planned sparse run, and compares the two by predicted loss.

It is the same model, narrower: as many layers, and every width times one factor. Weights, bytes and operations of
linear layers go with the factor's square, those of embeddings, head, norms and attention with the factor itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from smet_compile.format import arguments
from smet_compile.ops.tile_speed import tile_speed
from smet_compile.optim.parameters import Parameter, describe_parameters
from smet_compile.plan.advantage import Advantage
from smet_compile.plan.run import PlannedRun
from smet_compile.plan.scaling_law import FITTED_DENSITIES, FITTED_TOKENS, FITTED_WEIGHTS
from smet_compile.plan.stored import Recipe, Stored, bytes_of
from smet_compile.plan.timeline import Amount

_PRODUCTS, _OPERATIONS_OF_A_PRODUCT = 3, 2
"""A linear layer multiplies forward and for two gradients; each weight is multiplied and added for every token."""
_Described = tuple[Stored, Parameter]


@dataclass(frozen=True)
class ByWidth:
    """Holds an amount as a function of the width, which is 1 for the model that was planned."""

    squared: float
    linear: float

    def at(self, width: float) -> float:
        return self.squared * width**2 + self.linear * width

    def width_of(self, amount: float) -> float:
        """Returns the width with this amount."""
        root = math.sqrt(self.linear**2 + 4 * self.squared * amount)
        return 2 * amount / (self.linear + root)


@dataclass(frozen=True)
class Operations:
    """Counts the operations of a step, as a measure of its time.

    Args:
        compact: those of products with compact weights, active blocks alone.
        others: all others of the sparse model.
        twin: those of the dense model that is as wide.
        dense: those of the dense model of as many bytes.
    """

    compact: float
    others: float
    twin: float
    dense: float

    def time_ratio(self, sparse_efficiency: float | None) -> float:
        """Returns the time of the sparse model over that of the dense one.

        It is at most that with the products of the dense twin, which None stands for.
        """
        if sparse_efficiency is None:
            return self.twin / self.dense
        return min(self.twin, self.compact / sparse_efficiency + self.others) / self.dense

    def efficiency_of(self, time_ratio: float) -> float:
        """Returns the least efficiency with at most this ratio of times: 0 where any will do, infinity where none."""
        if time_ratio * self.dense >= self.twin:
            return 0.0
        left = time_ratio * self.dense - self.others
        return self.compact / left if left > 0 else math.inf


@dataclass(frozen=True)
class EqualBytes:
    """Holds what a planned run and a dense model of as many bytes come to.

    Args:
        advantage: their sizes, and what the scaling law predicts of them.
        operations: those of a step of each.
        num_bytes: what each of them stores when a step ends: weights, moments, ages, index, and gradients where they
            are kept.
        width: the width of the dense model over that of the planned one.
        blocks: "single weights", "runs" or "tiles".
        sparse_efficiency: the assumed rate of products with compact weights over that of dense ones; None where they
            take as long as those of the dense twin.
        unlike_fit: what the model has that no model of the law's fit had.
    """

    advantage: Advantage
    operations: Operations
    num_bytes: int
    width: float
    blocks: str
    sparse_efficiency: float | None
    unlike_fit: tuple[str, ...] = ()

    @property
    def break_even_efficiency(self) -> float:
        """Returns the ``sparse_efficiency`` at which neither is ahead at equal time; infinity where none is enough."""
        return self.operations.efficiency_of(self.advantage.break_even_time)

    @property
    def outside_fit(self) -> list[str]:
        """Returns in what the run lies outside those that the law was fitted to."""
        one = self.advantage
        of_fit = (
            ("weights", (one.dense_weights, one.num_weights), FITTED_WEIGHTS),
            ("tokens", (one.tokens, one.dense_tokens_in_time), FITTED_TOKENS),
            ("density", (one.density,), FITTED_DENSITIES),
        )
        found = [
            f"{name}: {' and '.join(map(count_text, numbers))}, fitted from {count_text(least)} to {count_text(most)}"
            for name, numbers, (least, most) in of_fit
            if min(numbers) < least or max(numbers) > most
        ]
        return [*found, *self.unlike_fit]

    def at(self, tokens: float, sparse_efficiency: float | None = None) -> EqualBytes:
        """Returns the same two models after other tokens, and at another efficiency if given.

        Raises ValueError for a number out of range.
        """
        tokens, sparse_efficiency = check_comparison(tokens, sparse_efficiency)
        if sparse_efficiency is None:
            return replace(self, advantage=replace(self.advantage, tokens=tokens))
        ratio = self.operations.time_ratio(sparse_efficiency)
        advantage = replace(self.advantage, tokens=tokens, time_ratio=ratio)
        return replace(self, advantage=advantage, sparse_efficiency=sparse_efficiency)


def check_comparison(tokens: float, sparse_efficiency: float | None) -> tuple[float, float | None]:
    """Returns the two arguments as floats."""
    tokens = arguments.number("tokens", tokens, at_least=1, at_most=1e18, advice="pass 20e9, say")
    if sparse_efficiency is not None:
        advice = "pass the rate of products with compact weights over that of dense ones"
        sparse_efficiency = arguments.number(
            "sparse_efficiency", sparse_efficiency, above=0, at_most=100, advice=advice
        )
    return tokens, sparse_efficiency


def compare_at_equal_bytes(run: PlannedRun, batch: int, tokens: float, sparse_efficiency: float | None) -> EqualBytes:
    """Compares a run with the dense model of as many bytes.

    Args:
        tokens: those that the run reads.
        sparse_efficiency: the rate of products with compact weights over that of dense ones; None for the default.

    Raises ValueError for a model without linear layers.
    """
    first = next(iter(run.sites.values()))
    layout = first.layout
    blocks = "tiles" if layout.tiles else "single weights" if layout.single_weights else "runs"
    if layout.tiles and sparse_efficiency is None:
        sparse_efficiency = tile_speed(first.values.dtype, layout)
    described = list(zip(run.stored(), describe_parameters(run.model).values(), strict=True))
    layers = [stored for stored, known in described if _is_layer(known)]
    num_in_layers = sum(each.num_weights for each in layers)
    if not num_in_layers:
        raise ValueError(
            "tokens: expected a language model with linear layers beside its embedding and its output head, got one "
            "without; leave it out"
        )
    weights = _by_width(described, _weights_in_law)
    num_bytes = sum(sum(bytes_of(stored, run.recipe).values()) for stored, _ in described)
    width = _by_width(described, lambda stored, _: _dense_bytes(stored, run.recipe)).width_of(num_bytes)
    operations = _operations(run, batch, described, width)
    advantage = Advantage(
        num_weights=weights.at(1),
        density=min(1.0, sum(each.num_weights * each.density for each in layers) / num_in_layers),
        dense_weights=weights.at(width),
        tokens=tokens,
        time_ratio=operations.time_ratio(sparse_efficiency),
    )
    unlike_fit = tuple(_unlike_fit(described))
    return EqualBytes(advantage, operations, num_bytes, width, blocks, sparse_efficiency, unlike_fit)


def _unlike_fit(described: Iterable[_Described]) -> Iterator[str]:
    if not all(stored.trained for stored, _ in described):
        yield "weights that are not trained"
    if any(known.layout is not None and known.layout.num_matrices > 1 for _, known in described):
        yield "a mixture of experts"


def _operations(run: PlannedRun, batch: int, described: list[_Described], width: float) -> Operations:
    point, sparse, dense = run.point(batch), run.operations(), run.operations(dense=True)
    compact = point.value({term: count for term, count in sparse.items() if term.compact})
    twin, attention = point.value(dense), point.value(_of_pairs(dense))
    head = sum(stored.num_weights for stored, known in described if known.is_head)
    products = _PRODUCTS * _OPERATIONS_OF_A_PRODUCT * head * point.batch * point.sequence
    linear = min(twin, attention + products)
    return Operations(compact, point.value(sparse) - compact, twin, ByWidth(twin - linear, linear).at(width))


def _of_pairs(amount: Amount) -> Amount:
    """Returns the terms that grow with the square of the sequence: those of attention."""
    return {term: count for term, count in amount.items() if term.sequence > 1}


def _is_layer(known: Parameter) -> bool:
    return known.layout is not None and not known.is_embedding and not known.is_head


def _by_width(described: Iterable[_Described], count: Callable[[Stored, Parameter], float]) -> ByWidth:
    squared = linear = 0.0
    for stored, known in described:
        if _is_layer(known):
            squared += count(stored, known)
        else:
            linear += count(stored, known)
    return ByWidth(squared, linear)


def _weights_in_law(stored: Stored, known: Parameter) -> int:
    """Counts all weights but those of an output head that is no embedding too."""
    return 0 if known.is_head and not known.is_embedding else stored.num_weights


def _dense_bytes(stored: Stored, recipe: Recipe) -> int:
    """Counts what the dense parameter takes by the same recipe, without a gradient where the compact one has none."""
    found = bytes_of(stored.dense(), recipe)
    if stored.layout is not None and recipe.fused_update:
        found["gradients"] = 0
    return sum(found.values())


def count_text(number: float) -> str:
    """Returns a text such as "1.34B" for 1.34e9."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{name}"
    return f"{number:.3g}"
