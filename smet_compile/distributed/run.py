"""Says how a run is made for a mesh, and holds what one rank has of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import distributed, nn
from torch.optim import Optimizer

from smet_compile.distributed.layout import TensorNote, describe_model
from smet_compile.runtime import TopologyManager
from smet_compile.shards import train_on

_SAME_DATA = ("tp",)
"""Dimensions of meshes along which ranks read the same data."""


@dataclass
class Run:
    """Holds what one rank has of a run.

    Args:
        model: the model.
        optimizer: its optimizer, or a list of them.
        manager: its topology manager; None in dense training.
        mesh: the ``DeviceMesh`` of all ranks that train.
        forward: what a step calls; the model, or what ``Blueprint.wrap`` made of it.
        others: further objects with a state, such as a learning-rate scheduler or a place in the data, by name.
    """

    model: nn.Module
    optimizer: Any
    manager: TopologyManager | None
    mesh: Any
    forward: Callable[..., Any]
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Returns all of its optimizers."""
        return [self.optimizer] if isinstance(self.optimizer, Optimizer) else list(self.optimizer)


@dataclass(frozen=True)
class Blueprint:
    """Says how a run is made for any mesh.

    Args:
        build: takes a ``DeviceMesh``, and returns the model on the meta device: sparsify, parallelize,
            ``fully_shard``.
        optimize: takes that model, which has its weights by then, and returns its optimizer, or a list of several, and
            its manager (None in dense training). It may return a third: a dict of further objects with ``state_dict``
            and ``load_state_dict``, which travel too.
        wrap: takes the model and the mesh, and returns what a step calls: ``DistributedDataParallel`` over
            ``mesh.get_group()``, or a compiled model. None for the model itself.
        initialize: gives a new model its weights, the same on every rank; by default ``smet_compile.materialize`` with
            ``seed=0``.
    """

    build: Callable[[Any], nn.Module]
    optimize: Callable[[nn.Module], tuple[Any, ...]]
    wrap: Callable[[nn.Module, Any], Callable[..., Any]] | None = None
    initialize: Callable[[nn.Module], Any] | None = None

    def begin(self, mesh: Any) -> Run | None:
        """Makes a run that has not trained; None on a rank that has no part in it."""
        prepared = self.prepare(mesh)
        if prepared.model is None:
            return None
        if self.initialize is None:
            from smet_compile.convert import materialize

            materialize(prepared.model, seed=0)
        else:
            self.initialize(prepared.model)
        return prepared.finish(prepared.model)

    def prepare(self, mesh: Any) -> Prepared:
        """Makes the model of a mesh on the meta device, and describes it; nothing else has to wait for that."""
        if not bool((mesh.mesh == distributed.get_rank()).any()):
            return Prepared(self, mesh, None, None)
        model = self.build(mesh)
        return Prepared(self, mesh, model, describe_model(model, mesh))


@dataclass(frozen=True)
class Prepared:
    """Holds a model on the meta device that a run can move into; None on a rank that has no part in it."""

    blueprint: Blueprint
    mesh: Any
    model: nn.Module | None
    tensors: dict[str, TensorNote] | None

    def finish(self, model: nn.Module) -> Run:
        """Makes the rest of the run, once the model has its weights."""
        return self.wrapped(self.optimized(model))

    def optimized(self, model: nn.Module) -> Run:
        """Makes the rest of the run but for what ``wrap`` makes."""
        train_on(model, self.mesh)
        optimizer, manager, *more = self.blueprint.optimize(model)
        others = more[0] if more else {}
        for name, each in others.items():
            if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
                raise ValueError(
                    f"optimize: expected an object with state_dict and load_state_dict for {name!r}, got "
                    f"{type(each).__name__}; leave it out, or give it both"
                )
        return Run(model, optimizer, manager, self.mesh, model, others)

    def wrapped(self, run: Run) -> Run:
        """Has the steps of a run call what ``wrap`` makes of its model."""
        wrap = self.blueprint.wrap
        return run if wrap is None else replace(run, forward=wrap(run.model, self.mesh))


def data_rank(mesh: Any, rank: int | None = None) -> tuple[int, int]:
    """Returns which share of the data a rank of a mesh reads, and of how many: all dimensions but "tp" divide it.

    Args:
        rank: its number; default: this rank's.
    """
    table, names = mesh.mesh, mesh.mesh_dim_names or ()
    at = (table == (distributed.get_rank() if rank is None else rank)).nonzero()[0].tolist()
    number, count = 0, 1
    for dim, size in enumerate(table.shape):
        if not names or names[dim] not in _SAME_DATA:
            number, count = number * size + at[dim], count * size
    return number, count
