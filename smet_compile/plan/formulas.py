"""Writes the bytes of ``stored`` as formulas in density, batch, sequence and block size.

They are counts in real numbers. Exact counts round each weight's active blocks to a whole number, and the lists of an
index to whole entries. ``rounding_bytes`` bounds the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from smet_compile.format import WEIGHTS_OF_A_GROUP, Layout
from smet_compile.plan.stored import SCALE_BYTES, Recipe, Stored, bytes_of
from smet_compile.plan.timeline import Amount

if TYPE_CHECKING:
    from sympy import Expr, Symbol

Shares = dict[str, float | None]
"""Maps the name of a compact weight to its density divided by the model's, to None where a rule sets it."""
_LIST_ENTRY = 4


def symbols() -> tuple[Symbol, Symbol, Symbol, Symbol]:
    """Returns d, b, s, B: density, batch, sequence, weights of a block."""
    import sympy

    return sympy.symbols("d b s B", positive=True)


class Formulas:
    """Writes the bytes of each kind as a formula.

    Args:
        parameters, recipe: what is stored, and by which recipe.
        shares: how the density of each compact weight follows the model's.
        buffers: the bytes of buffers.

    Attributes:
        values: the numbers that symbols stand for: the counts of weights (n_sparse and others) and B.
    """

    def __init__(self, parameters: Sequence[Stored], shares: Shares, recipe: Recipe, buffers: int) -> None:
        self.recipe = recipe
        self.buffers = buffers
        self.values: dict[Symbol, float] = {}
        self._parameters = parameters
        self._sites = _compact(parameters)
        self._shares = shares
        self._sizes = sorted({each.dtype.itemsize for each in parameters})

    def by_kind(self) -> dict[str, Expr]:
        """Returns kind → formula, for all ``stored.KINDS``."""
        import sympy

        trained = [each for each in self._parameters if each.trained]
        kept = [each for each in trained if each.layout is None or not self.recipe.fused_update]
        return {
            "weights": sympy.expand(self._sum(self._parameters, _weight_bytes)),
            "gradients": sympy.expand(self._sum(kept, _weight_bytes, "_trained")),
            "moments": sympy.expand(self._moments(trained)),
            "ages": sympy.sympify(self._ages()),
            "index": sympy.expand(self._index()),
            "buffers": sympy.Integer(self.buffers),
        }

    def _sum(self, parameters: Sequence[Stored], bytes_each: Callable[[Stored], int], subset: str = "") -> Expr:
        """Sums the values of ``parameters`` times their bytes each, which depend on the size of the dtype alone.

        Args:
            subset: what is added to the name of a symbol that counts a part of the compact or of the dense weights.
        """
        total: Expr = 0
        for size in self._sizes:
            same = [each for each in parameters if each.dtype.itemsize == size]
            if same:
                total += bytes_each(same[0]) * (
                    self._num_active(same, size, subset) + self._num_dense(same, size, subset)
                )
        return total

    def _moments(self, trained: Sequence[Stored]) -> Expr:
        """Sums moments, by the number of them that the optimizer stores for each entry."""
        total: Expr = 0
        for slots in sorted({self.recipe.slots(each) for each in trained} - {0}):
            same = [each for each in trained if self.recipe.slots(each) == slots]
            subset = f"_{slots}_slot{'s' if slots > 1 else ''}"
            total += slots * self._sum(same, self._moment_bytes, subset)
            total += slots * SCALE_BYTES * self._num_scales(same, subset)
        return total

    def _moment_bytes(self, parameter: Stored) -> int:
        return self.recipe.dtype_of_moments(parameter.dtype).itemsize

    def _num_scales(self, parameters: Sequence[Stored], subset: str) -> Expr:
        """Counts groups of 8-bit moments that share a scale."""
        groups: Expr = 0
        if not any(self.recipe.has_scales(each.dtype) for each in self._parameters):
            return groups
        for size in self._sizes:
            same = [each for each in parameters if each.dtype.itemsize == size]
            groups += self._num_dense(same, size, subset) / WEIGHTS_OF_A_GROUP
        if sites := _compact(parameters):
            groups += self._num_blocks(sites, subset) / _layout(sites[0]).blocks_per_group
        return groups

    def _count(self, name: str, size: int | None, count: float) -> Expr:
        """Returns the symbol for ``count``, one for each size of dtype where there are several; 0 for none."""
        import sympy

        if not count:
            return sympy.Integer(0)
        suffix = f"_{size}" if size is not None and len(self._sizes) > 1 else ""
        symbol = sympy.Symbol(name + suffix, positive=True)
        assert self.values.setdefault(symbol, count) == count, "a symbol counts one thing"
        return symbol

    def _num_dense(self, parameters: Sequence[Stored], size: int, subset: str) -> Expr:
        """Counts the weights of those of ``parameters``, all of one size, that are dense."""
        total: Expr = 0
        for name, is_trained in (("n_dense", True), ("n_frozen", False)):
            all_of_them = _plain(self._parameters, size, is_trained)
            part = _plain(parameters, size, is_trained)
            suffix = subset if len(part) < len(all_of_them) else ""
            total += self._count(name + suffix, size, sum(each.num_weights for each in part))
        return total

    def _num_active(self, parameters: Sequence[Stored], size: int, subset: str = "") -> Expr:
        """Counts the stored weights of those of ``parameters``, all of one size, that are compact: a function of d."""
        sites = _compact(parameters)
        suffix = subset if len(sites) < sum(each.dtype.itemsize == size for each in self._sites) else ""
        shared = sum(share * _padded(each) for each in sites if (share := self._shares[each.name]) is not None)
        fixed = sum(each.num_values for each in sites if self._shares[each.name] is None)
        ruled = self._count("n_ruled" + suffix, size, fixed)
        return symbols()[0] * self._count("n_sparse" + suffix, size, shared) + ruled

    def _block(self) -> Expr:
        """Returns B, the number of weights of a block; 1 for single weights."""
        weights = math.prod(_layout(self._sites[0]).block_shape)
        if weights == 1:
            return 1
        self.values[symbols()[3]] = weights
        return symbols()[3]

    def _num_blocks(self, sites: Sequence[Stored], subset: str = "") -> Expr:
        """Counts the blocks of ``sites``, active or not."""
        suffix = subset if len(sites) < len(self._sites) else ""
        sizes = {each.dtype.itemsize for each in sites}
        follow = len(sizes) == 1 and all(self._shares[each.name] == 1 for each in sites)
        name = "n_sparse" if follow else "n_sites"
        return self._count(name + suffix, min(sizes) if len(sizes) == 1 else None, sum(map(_padded, sites))) / (
            self._block()
        )

    def _num_active_blocks(self) -> Expr:
        sizes = sorted({each.dtype.itemsize for each in self._sites})
        active = (self._num_active([e for e in self._sites if e.dtype.itemsize == size], size) for size in sizes)
        return sum(active) / self._block()

    def _ages(self) -> Expr:
        constant = sum(bytes_of(each, self.recipe)["ages"] for each in self._parameters)
        if not any(map(self.recipe.has_ages, self._sites)):
            return constant
        return self._num_active_blocks() + constant - sum(each.num_active for each in self._sites)

    def _index(self) -> Expr:
        if not self._sites:
            return 0
        layouts = [_layout(each) for each in self._sites]
        bits = self._num_blocks(self._sites) / 8
        if layouts[0].tiles:
            return bits + 3 * _LIST_ENTRY * self._num_active_blocks() + _LIST_ENTRY * sum(map(_num_starts, layouts))
        starts = _LIST_ENTRY * (self._num_blocks(self._sites) / layouts[0].blocks_per_group + len(layouts))
        positions = 0 if layouts[0].single_weights else _LIST_ENTRY * self._num_active_blocks()
        return bits + starts + positions


def _compact(parameters: Iterable[Stored]) -> list[Stored]:
    return [each for each in parameters if each.layout is not None]


def _plain(parameters: Iterable[Stored], size: int, is_trained: bool) -> list[Stored]:
    return [e for e in parameters if e.layout is None and e.dtype.itemsize == size and e.trained == is_trained]


def _weight_bytes(parameter: Stored) -> int:
    return parameter.dtype.itemsize


def _layout(site: Stored) -> Layout:
    assert site.layout is not None
    return site.layout


def _padded(site: Stored) -> int:
    """Counts the weights of all blocks; those that hang over an edge count in full."""
    return _layout(site).num_blocks * math.prod(_layout(site).block_shape)


def _num_starts(layout: Layout) -> int:
    """Counts the entries of the lists of where block rows and block columns start."""
    return layout.num_matrices * (layout.block_rows + layout.block_cols) + 2


def rounding_bytes(parameters: Sequence[Stored], recipe: Recipe) -> float:
    """Returns the most by which the sum of the formulas differs from the exact bytes.

    It is half a block of each weight (a whole one where one block is the least), and the last entries of lists.
    """
    most = 0.0
    for each in parameters:
        if each.layout is None:
            most += 2 * SCALE_BYTES * recipe.has_scales(each.dtype)
            continue
        one, two = (sum(bytes_of(replace(each, num_active=count), recipe).values()) for count in (1, 2))
        most += two - one + 1 + 2 * _LIST_ENTRY + 2 * SCALE_BYTES
    return most


def density_shares(
    parameters: Iterable[Stored], density: float, rules: Mapping[str, float] | None, follows: bool
) -> Shares:
    """Returns how each compact weight's density follows the model's ``density``.

    It is None where a rule sets it, else 1 where all follow the model's, else the weight's share at this density.
    """
    shares: Shares = {}
    for site in _compact(parameters):
        names = site.name, site.name.rpartition(".")[0]
        is_ruled = any(fnmatchcase(name, glob) for name in names for glob in rules or ())
        shares[site.name] = None if is_ruled else 1.0 if follows else site.density / density
    return shares


def expression(amount: Amount, density: float) -> Expr:
    """Returns the polynomial in b, s and d; compact terms were read at ``density``."""
    import sympy

    d, b, s, _ = symbols()
    total = sympy.Integer(0)
    for term, coefficient in amount.items():
        share = coefficient / density if term.compact else coefficient
        total += round(share) * b**term.batch * s**term.sequence * (d if term.compact else 1)
    return total
