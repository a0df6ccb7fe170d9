"""Places a planned run on a mesh: says which part of it a rank of tensor parallelism has, and what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from smet_compile.format import Slabs
from smet_compile.plan.mesh import Mesh
from smet_compile.plan.part_of_model import run_of_part
from smet_compile.plan.per_rank import PerRank, per_rank, recipe_of
from smet_compile.plan.run import PlannedRun
from smet_compile.plan.step_time import Work
from smet_compile.plan.stored import Stored
from smet_compile.shards.styles import Style, styles_of

_DIM_OF: dict[Style, int] = {"colwise": 0, "rowwise": 1}
"""Maps a style to the dimension along which it cuts the weight."""


@dataclass(frozen=True)
class State:
    """Describes one parameter, with all that a rank stores for each of its rows.

    Args:
        parameter: all of it. dim: the dimension along which tensor parallelism cuts it; None where it does not.
        row_bytes: those of a row of the tensor, of its moments, and of the age of a block.
    """

    parameter: Stored
    dim: int | None
    row_bytes: int


@dataclass(frozen=True)
class Placement:
    """Counts what a rank of any mesh stores, sends and computes in one run, at one batch."""

    run: PlannedRun
    batch: int
    _runs_of_parts: dict[int, PlannedRun] = field(default_factory=dict, repr=False, compare=False)

    def on(self, mesh: Mesh) -> PerRank:
        """Raises ValueError where tensor parallelism cannot cut the model among so many ranks."""
        run, stored = self.run, self.run.stored()
        sent_by_layers = 0
        sparse, dense = stored, [each.dense() for each in stored]
        if mesh.parts > 1:
            styles = self.styles()
            dims = _dims_of_cuts(stored, styles)
            sparse = _cut(self._with_slabs(stored, dims, mesh.parts), dims, mesh.parts)
            dense = _cut(dense, dims, mesh.parts)
            sent_by_layers = round(run.layer_bytes(styles, run.point(self.batch)))
        return per_rank(sparse, dense, run.recipe, run.buffers, mesh, sent_by_layers)

    def state(self, parts: int) -> list[State]:
        """Returns what a switch moves, with slabs that so many ranks of tensor parallelism can share out."""
        stored = self.run.stored()
        dims = _dims_of_cuts(stored, self.styles()) if parts > 1 else {}
        if parts > 1:
            stored = self._with_slabs(stored, dims, parts)
        return [State(each, dims.get(each.name), self._row_bytes(each)) for each in stored]

    def work(self, mesh: Mesh) -> Work:
        """Counts what a rank computes.

        Raises:
            ValueError: as ``on``, or where the model cannot be run with the part of its layers that a rank has.
        """
        run = self.run if mesh.parts == 1 else self._run_of_part(mesh.parts)
        point, bytes_of = run.point(self.batch), Counter[int]()
        for each in run.stored():
            bytes_of[each.dtype.itemsize] += each.num_values * each.dtype.itemsize
        itemsize = max(bytes_of, key=bytes_of.__getitem__, default=1)
        operations, activations = point.value(run.operations()), point.value(run.timeline.saved)
        return Work(operations, sum(bytes_of.values()), itemsize, round(activations))

    def _run_of_part(self, parts: int) -> PlannedRun:
        if parts not in self._runs_of_parts:
            styles, stored = self.styles(), self.run.stored()
            dims = _dims_of_cuts(stored, styles)
            here = _cut(self._with_slabs(stored, dims, parts), dims, parts)
            self._runs_of_parts[parts] = run_of_part(self.run, here, dims, parts)
        return self._runs_of_parts[parts]

    def styles(self) -> dict[str, Style]:
        """Returns the layers that tensor parallelism cuts; raises ValueError where no plan says which."""
        return styles_of(self.run.request.model, self.run.request.tp_plan)

    def _row_bytes(self, parameter: Stored) -> int:
        recipe = recipe_of(parameter, self.run.recipe)
        moments = recipe.slots(parameter) * recipe.dtype_of_moments(parameter.dtype).itemsize
        has_ages = parameter.layout is not None and parameter.trained and recipe.has_ages(parameter)
        return parameter.row_values * (parameter.dtype.itemsize + moments) + has_ages

    def _with_slabs(self, stored: Sequence[Stored], dims: Mapping[str, int], count: int) -> list[Stored]:
        """Returns the parameters as they are where each compact weight that is cut consists of slabs."""
        run = self.run
        if all(each.layout is None for each in stored):
            return list(stored)
        if run.requested_density is None:
            for each in stored:
                if each.name in dims and each.layout is not None:
                    _check_slabs(each.name, each.layout.slabs, count, dims[each.name])
            return list(stored)
        slabs = {name: Slabs(count, dim) for name, dim in dims.items()}
        choices = {
            each.weight.name: each for each in run.request.choices(run.dense_model, run.requested_density, slabs)
        }
        found = []
        for each in stored:
            choice = choices.get(each.name)
            is_compact = each.layout is not None and choice is not None
            found.append(
                replace(each, layout=choice.layout, num_active=choice.num_active)
                if is_compact and choice is not None
                else each.dense()
            )
        return found


def _dims_of_cuts(stored: Sequence[Stored], styles: Mapping[str, Style]) -> dict[str, int]:
    """Returns the name of each parameter that is cut → the dimension. The bias of a "rowwise" layer stays whole."""
    dims = {}
    for each in stored:
        module, _, tensor = each.name.rpartition(".")
        style = styles.get(module)
        if style is not None and (tensor == "weight" or (tensor == "bias" and style == "colwise")):
            dims[each.name] = _DIM_OF[style]
    return dims


def _cut(stored: Sequence[Stored], dims: Mapping[str, int], count: int) -> list[Stored]:
    """Returns the part that a rank has of each parameter. Raises ValueError where ``count`` does not divide a size."""
    found = []
    for each in stored:
        if each.name not in dims:
            found.append(each)
            continue
        dim = dims[each.name]
        size = each.num_rows if dim == 0 else each.num_weights // each.num_rows
        if size % count:
            raise ValueError(
                f"{each.name}: expected {('rows', 'columns')[dim]} that tp={count} divides, got {size}; plan for "
                "another number of ranks, or leave the layer out of tp_plan="
            )
        found.append(each.part(dim, count))
    return found


def _check_slabs(name: str, slabs: Slabs | None, count: int, dim: int) -> None:
    if slabs is None or slabs.dim != dim or slabs.num % count:
        raise ValueError(
            f"{name}: expected slabs along dimension {dim} whose number tp={count} divides, got {slabs}; sparsify with "
            f'slabs={{"{name}": ({count}, {dim})}}, or pass the dense model and density='
        )
