"""The bytes of ``plan.stored`` as formulas in density, batch, sequence and block size.

They are the counts in the reals: exact ones round each weight's active blocks to a whole number, and the lists of an
index to whole entries. ``rounding_bytes`` bounds the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smet_compile.format import Layout
from smet_compile.plan.stored import Recipe, Stored, bytes_of, total_bytes
from smet_compile.plan.timeline import Amount

if TYPE_CHECKING:
    from sympy import Expr, Symbol

Shares = dict[str, float | None]
"""Name of a compact weight → its density beside the model's, None where it does not follow that."""
_GROUP, _LIST_ENTRY = 1024, 4


def symbols() -> tuple[Symbol, Symbol, Symbol, Symbol]:
    """d, b, s, B: density, batch, sequence, weights of a block."""
    import sympy

    return sympy.symbols("d b s B", positive=True)


class Formulas:
    """Args:
        parameters, shares, recipe: what is stored, how its density follows the model's, and by which recipe.

    Attributes:
        values: of the symbols that count weights, n_sparse and its like, and of B.
    """

    def __init__(self, parameters: Sequence[Stored], shares: Shares, recipe: Recipe, buffers: int) -> None:
        self.recipe = recipe
        self.buffers = buffers
        self.values: dict[Symbol, float] = {}
        self._sites = [each for each in parameters if each.layout is not None]
        self._plain = [each for each in parameters if each.layout is None]
        self._shares = shares
        self._sizes = sorted({each.dtype.itemsize for each in parameters})

    def by_kind(self) -> dict[str, Expr]:
        """Kind → formula, of all kinds of ``plan.stored.KINDS``."""
        import sympy

        kept = [] if self.recipe.fused_update else self._sites
        trained = [each for each in self._plain if each.trained]
        moment = {each.dtype.itemsize: self.recipe.moment_dtype(each.dtype).itemsize for each in self._all()}
        return {
            "weights": self._sum(self._sites, self._plain, {size: size for size in self._sizes}),
            "gradients": self._sum(kept, trained, {size: size for size in self._sizes}),
            "moments": self._sum(self._sites, trained, {k: 2 * v for k, v in moment.items()}) + self._scales(trained),
            "ages": self._ages(trained),
            "index": self._index(),
            "buffers": sympy.Integer(self.buffers),
        }

    def _all(self) -> list[Stored]:
        return [*self._sites, *self._plain]

    def _sum(self, sites: Sequence[Stored], plain: Sequence[Stored], bytes: dict[int, int]) -> Expr:
        """Values of ``sites`` and ``plain`` times their bytes each, by the size of their dtype."""
        import sympy

        total = sympy.Integer(0)
        for size in self._sizes:
            same_sites = [each for each in sites if each.dtype.itemsize == size]
            trained = [each for each in plain if each.dtype.itemsize == size and each.trained]
            frozen = [each for each in plain if each.dtype.itemsize == size and not each.trained]
            total += bytes.get(size, 0) * (
                self._active(same_sites, size)
                + self._count("n_dense", size, sum(each.num_weights for each in trained))
                + self._count("n_frozen", size, sum(each.num_weights for each in frozen))
            )
        return sympy.expand(total)

    def _count(self, name: str, size: int | None, count: float) -> Expr:
        """The symbol for ``count``, by dtype where there are several; 0 for none."""
        import sympy

        if not count:
            return sympy.Integer(0)
        suffix = f"_{size}" if size is not None and len(self._sizes) > 1 else ""
        symbol = sympy.Symbol(name + suffix, positive=True)
        self.values[symbol] = count
        return symbol

    def _active(self, sites: Sequence[Stored], size: int | None) -> Expr:
        """Their stored weights, as a function of d."""
        shared = sum(share * _padded(each) for each in sites if (share := self._shares[each.name]) is not None)
        fixed = sum(each.num_values for each in sites if self._shares[each.name] is None)
        return symbols()[0] * self._count("n_sparse", size, shared) + self._count("n_ruled", size, fixed)

    def _block(self) -> Expr:
        import sympy

        weights = math.prod(self._sites[0].layout.block_shape) if self._sites and self._sites[0].layout else 1
        if weights == 1:
            return sympy.Integer(1)
        self.values[symbols()[3]] = weights
        return symbols()[3]

    def _blocks(self) -> Expr:
        """Of all compact weights together, active or not."""
        total = sum(map(_padded, self._sites))
        follow = all(self._shares[each.name] == 1 for each in self._sites)
        of_one_size = len({each.dtype.itemsize for each in self._sites}) == 1
        size = self._sites[0].dtype.itemsize if of_one_size else None
        return self._count("n_sparse" if follow and of_one_size else "n_sites", size, total) / self._block()

    def _active_blocks(self) -> Expr:
        by_size = {each.dtype.itemsize for each in self._sites}
        return sum(self._active([e for e in self._sites if e.dtype.itemsize == size], size) for size in by_size) / (
            self._block()
        )

    def _ages(self, trained: Sequence[Stored]) -> Expr:
        import sympy

        constant = sum(bytes_of(each, self.recipe)["ages"] for each in trained)
        if self.recipe.by_torch or not self._sites:
            return sympy.Integer(constant)
        return (
            self._active_blocks()
            + constant
            + sum(bytes_of(each, self.recipe)["ages"] - each.num_active for each in self._sites)
        )

    def _index(self) -> Expr:
        import sympy

        if not self._sites:
            return sympy.Integer(0)
        layouts = [each.layout for each in self._sites if each.layout is not None]
        bits = self._blocks() / 8
        if layouts[0].tiles:
            return sympy.expand(
                bits + 2 * _LIST_ENTRY * self._active_blocks() + _LIST_ENTRY * sum(map(_lines, layouts))
            )
        starts = _LIST_ENTRY * (self._blocks() / layouts[0].blocks_per_group + len(layouts))
        positions = 0 if layouts[0].single_weights else _LIST_ENTRY * self._active_blocks()
        return sympy.expand(bits + starts + positions)

    def _scales(self, trained: Sequence[Stored]) -> Expr:
        import sympy

        if not any(self.recipe.scales_of(each.dtype) for each in self._all()):
            return sympy.Integer(0)
        groups = sympy.Integer(0)
        for size in self._sizes:
            same = [each for each in trained if each.dtype.itemsize == size]
            groups += self._count("n_dense", size, sum(each.num_weights for each in same)) / _GROUP
        if self._sites and self._sites[0].layout:
            groups += self._blocks() / self._sites[0].layout.blocks_per_group
        return sympy.expand(8 * groups)


def _padded(site: Stored) -> int:
    """Weights of all blocks, what hangs over an edge among them."""
    assert site.layout is not None
    return site.layout.num_blocks * math.prod(site.layout.block_shape)


def _lines(layout: Layout) -> int:
    """Entries of the lists of where block rows and block columns start."""
    return layout.num_matrices * (layout.block_rows + layout.block_cols) + 2


def rounding_bytes(parameters: Sequence[Stored], recipe: Recipe) -> float:
    """The most by which the formulas' sum differs from the exact bytes: half a block of each weight (a whole one where
    one block is the least), and a list's last entries."""
    most = 0.0
    for each in parameters:
        if each.layout is None:
            most += 8 * recipe.scales_of(each.dtype)
            continue
        one = Stored(each.name, each.num_weights, each.dtype, each.layout, 1, each.trained)
        two = Stored(each.name, each.num_weights, each.dtype, each.layout, 2, each.trained)
        block = total_bytes([two], recipe), total_bytes([one], recipe)
        most += sum(block[0].values()) - sum(block[1].values()) + 1 + 2 * _LIST_ENTRY + 8
    return most


def expression(amount: Amount, density: float) -> Expr:
    """The polynomial in b, s, and d: compact terms were read at ``density``."""
    import sympy

    d, b, s, _ = symbols()
    total = sympy.Integer(0)
    for term, coefficient in amount.items():
        share = coefficient / density if term.compact else coefficient
        total += round(share) * b**term.batch * s**term.sequence * (d if term.compact else 1)
    return total
