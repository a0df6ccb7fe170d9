"""Reports which weights of a model are compact, why the others are not, and how many bytes they take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from smet_compile.convert.choose import KEEPS_EVERY_BLOCK
from smet_compile.convert.find_weights import ALREADY_COMPACT, find_weights
from smet_compile.format import arguments, block_sizes, count_active, positions_of
from smet_compile.notebook import frame_of, html_lines, html_table, html_view
from smet_compile.ops import CompactWeight, Site, find_sites
from smet_compile.ops.sites import forget_dense, mark_dense
from smet_compile.tables import table_lines

_REASONS = "_smet_dense_reasons"
_HEADINGS = ("weight", "shape", "block", "blocks", "active", "density", "bytes", "index bytes")


@dataclass(frozen=True)
class SiteReport:
    """Describes one compact weight.

    Args:
        bytes: the size of its values.
        index_bytes: the size of its topology and of the lists derived from that.
        pattern: "fan_in", "2:4" and the like; None where any blocks may be active.
        correction: what ``correct_gradients`` decided for it; None where it was not called.
    """

    name: str
    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    num_blocks: int
    num_active: int
    density: float
    bytes: int
    index_bytes: int
    pattern: str | None = None
    correction: str | None = None

    def cells(self) -> tuple[str, ...]:
        """Returns a row of the table."""
        return (
            self.name,
            _by_x(self.shape),
            " ".join((_by_x(self.block_shape), *([self.pattern] if self.pattern else []))),
            f"{self.num_blocks:,}",
            f"{self.num_active:,}",
            f"{self.density:.4f}",
            f"{self.bytes:,}",
            f"{self.index_bytes:,}",
        )


@dataclass(frozen=True)
class DenseReport:
    """Describes one weight that was left dense, and why."""

    name: str
    shape: tuple[int, ...]
    num_weights: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class Report:
    """Holds the result of ``report(model)``; ``print`` shows it as a table."""

    sites: list[SiteReport]
    skipped: list[DenseReport]
    num_weights: int
    num_active_weights: int

    @property
    def density(self) -> float:
        """Returns the density of the model's matrices as a whole, the dense ones included."""
        return self.num_active_weights / max(1, self.num_weights)

    @property
    def values_bytes(self) -> int:
        return sum(site.bytes for site in self.sites)

    @property
    def index_bytes(self) -> int:
        return sum(site.index_bytes for site in self.sites)

    @property
    def dense_bytes(self) -> int:
        return sum(weight.bytes for weight in self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self) | {"density": self.density}

    def to_pandas(self) -> Any:
        """Returns a ``DataFrame`` with a row for each weight; a list of dicts where pandas is not installed.

        A dense weight has its reason in ``dense_reason`` and no blocks; a compact one has None there.
        """
        compact = [asdict(site) | {"dense_reason": None} for site in self.sites]
        blank = dict.fromkeys((field.name for field in fields(SiteReport)), None)
        dense = [
            blank
            | {"name": w.name, "shape": w.shape, "density": 1.0, "bytes": w.bytes, "index_bytes": 0}
            | {"dense_reason": w.reason}
            for w in self.skipped
        ]
        return frame_of(compact + dense)

    def _totals(self) -> tuple[str, str]:
        return (
            f"{len(self.sites)} compact weights: {self.values_bytes:,} bytes of values, "
            f"{self.index_bytes:,} of index; {self.dense_bytes:,} bytes of dense matrices",
            f"density of all matrices: {self.density:.4f} ({self.num_active_weights:,} of {self.num_weights:,})",
        )

    def _corrections(self) -> list[tuple[str, str]]:
        return [(site.name, site.correction) for site in self.sites if site.correction is not None]

    def __str__(self) -> str:
        lines = [*table_lines([_HEADINGS, *(site.cells() for site in self.sites)], left=(0, 1, 2)), *self._totals()]
        if corrections := self._corrections():
            rows: list[tuple[str, ...]] = [("  " + name, correction) for name, correction in corrections]
            lines += ["gradients, for batch norm:", *table_lines(rows, left=range(3))]
        if self.skipped:
            lines += ["left dense:"]
            rows = [("  " + w.name, _by_x(w.shape), w.reason) for w in self.skipped]
            lines += table_lines(rows, left=range(3))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        values, density = self._totals()
        corrections = [f"{name}: gradient {correction}" for name, correction in self._corrections()]
        dense = [(w.name, _by_x(w.shape), w.reason) for w in self.skipped]
        return html_view(
            density,
            html_table(_HEADINGS, [site.cells() for site in self.sites], left=(0, 1, 2)),
            html_lines([values, *corrections]),
            html_table(("left dense", "shape", "reason"), dense, left=range(3)) if dense else "",
        )


def _by_x(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def remember_reasons(model: nn.Module, reasons: dict[str, str]) -> None:
    """Keeps with the model why its other weights stayed dense; a second sparsify adds to the first."""
    model.__dict__[_REASONS] = model.__dict__.get(_REASONS, {}) | reasons
    modules = dict(model.named_modules())
    for name, reason in reasons.items():
        if reason == KEEPS_EVERY_BLOCK:
            mark_dense(modules[name.rpartition(".")[0]])


def forget_reasons(module: nn.Module) -> None:
    module.__dict__.pop(_REASONS, None)
    forget_dense(module)


def report(model: nn.Module) -> Report:
    """Reports which weights of ``model`` are compact, which were left dense, and why.

    Densities are read back from the topologies. On the meta device, where a topology has no
    data, the number of active blocks is the number of values.

    Raises: ValueError for anything but a model.
    """
    arguments.module("report", model)
    sites = find_sites(model).values()
    reasons = model.__dict__.get(_REASONS, {})
    dense, seen = [], set()
    for name, weight in find_weights(model).items():
        if weight.never_reason == ALREADY_COMPACT:
            continue
        reason = reasons.get(name) or weight.reason or "not sparsified"
        tensor = weight.tensor
        if nn.parameter.is_lazy(tensor):
            dense.append(DenseReport(name, (), 0, 0, reason))
            continue
        num_bytes = 0 if id(tensor) in seen else tensor.numel() * tensor.element_size()
        seen.add(id(tensor))
        dense.append(DenseReport(name, tuple(tensor.shape), tensor.numel(), num_bytes, reason))
    num_dense = sum(row.num_weights for row in dense if row.bytes)
    total = sum(site.whole.num_weights for site in sites)
    active = sum(num_active_weights(site.compact) for site in sites)
    return Report([_site_report(site) for site in sites], dense, total + num_dense, active + num_dense)


def num_active_weights(compact: CompactWeight) -> int:
    """Returns how many single weights lie inside active blocks; a block at the edge has fewer.

    On the meta device, and where tensor parallelism leaves a part of the weight here, the number is an estimate.
    """
    layout, num_parts = compact.layout, 1 if compact.part is None else compact.part.count
    if layout.single_weights:
        return num_parts * compact.num_active
    if compact.topology.is_meta:
        return round(num_parts * compact.num_active / layout.num_blocks * layout.num_weights)
    return num_parts * int(block_sizes(layout, positions_of(compact.mask())).sum())


def _site_report(site: Site) -> SiteReport:
    compact, layout, num_parts = site.compact, site.whole, 1 if site.part is None else site.part.count
    num_active = num_parts * (site.num_active if compact.topology.is_meta else count_active(compact.topology))
    index = sum(t.numel() * t.element_size() for t in (compact.topology, compact.lists))
    return SiteReport(
        site.name,
        layout.shape,
        layout.block_shape,
        layout.num_blocks,
        num_active,
        num_active / layout.num_blocks,
        site.values.numel() * site.values.element_size(),
        index,
        compact.pattern,
        compact.correction,
    )
