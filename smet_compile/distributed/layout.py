"""Describes how the tensors of a run lie on its ranks, in a form that other ranks can be told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.distributed.space import Placed, Region
from smet_compile.format import Layout
from smet_compile.format.part import order_of_parts
from smet_compile.ops import canonical_name, find_sites
from smet_compile.shards import ends_of_parts, is_sharded


@dataclass(frozen=True)
class Parts:
    """Says into how many parts a compact weight is cut, along which dimension; ``whole`` is its layout, as text."""

    name: str
    whole: str
    dim: int = 0
    count: int = 1

    def order(self, bits: Tensor) -> Tensor | None:
        """Returns the logical row of each stored row; None where they are the same. ``bits``: of the whole weight."""
        if self.count == 1 or self.dim == 0:
            return None
        return order_of_parts(Layout.from_text(self.whole), self.dim, self.count, bits).argsort()


@dataclass(frozen=True)
class TensorNote:
    """Describes one tensor.

    Args:
        shape: the shape of the whole tensor.
        dtype: its dtype.
        regions: the region of each rank, by rank.
        parts: the parts of a compact weight; None for any other tensor.
        state: shape and dtype of each state that lies as a parameter does, by its key.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: dict[int, Region]
    parts: Parts | None = None
    state: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    def placed(self, bits: dict[str, Tensor]) -> Placed:
        """Says where it lies, given the topologies of whole weights."""
        return Placed(self.regions, None if self.parts is None else self.parts.order(bits[self.parts.name]))


def describe_model(model: nn.Module, mesh: Any) -> dict[str, TensorNote]:
    """Describes the parameters and plain buffers of a model that trains on ``mesh``, by their names.

    Args:
        mesh: the ``DeviceMesh`` of all its ranks.
    """
    sites = {id(site.values): site for site in find_sites(model).values()}
    notes = {}
    for name, parameter in model.named_parameters():
        site, parts = sites.get(id(parameter)), None
        if site is not None:
            part = site.part
            cut = (0, 1) if part is None else (part.band.dim, part.count)
            parts = Parts(site.name, site.whole.text, *cut)
        regions = regions_of(parameter, mesh)
        notes[canonical_name(model, name)] = TensorNote(tuple(parameter.shape), parameter.dtype, regions, parts)
    for name, _, buffer in plain_buffers(model):
        notes[buffer_name(name)] = TensorNote(tuple(buffer.shape), buffer.dtype, regions_of(buffer, mesh))
    return notes


def plain_buffers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str], Tensor]]:
    """Yields the buffers that are no topology: canonical name, module and name there, and tensor."""
    ours = {id(buffer) for site in find_sites(model).values() for buffer in site.compact.buffers()}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in ours:
                yield canonical_name(model, f"{prefix}.{name}" if prefix else name), (module, name), buffer


def buffer_name(name: str) -> str:
    """Returns the name of a buffer among the tensors of a run."""
    return f"buffer {name}"


def regions_of(tensor: Any, mesh: Any) -> dict[int, Region]:
    """Returns the region of each rank of ``mesh`` that stores a part of a parameter or buffer.

    A parameter may be cut over some dimensions of the mesh alone; along the others ranks store the same. Tensor
    parallelism cuts first, and ``fully_shard`` what that has left.
    """
    ranks = mesh.mesh
    num_rows = tensor.shape[0] if tensor.dim() else 1
    if not is_sharded(tensor):
        return {int(rank): Region(0, num_rows) for rank in ranks.flatten()}
    dims = _dims_of(tensor.device_mesh, mesh)
    cuts = [(dims[i], each.dim) for i, each in enumerate(tensor.placements) if not each.is_replicate()]
    is_wide = any(dim == 1 for _, dim in cuts)
    found = {}
    for at in itertools.product(*(range(size) for size in ranks.shape)):
        rows, columns = (0, num_rows), (0, tensor.shape[1] if is_wide else 1)
        for mesh_dim, dim in reversed(cuts):
            number, size = at[mesh_dim], ranks.shape[mesh_dim]
            if dim == 0:
                rows = _part(*rows, number, size)
            else:
                columns = _part(*columns, number, size)
        found[int(ranks[at])] = Region(*rows, columns[0], columns[1] if is_wide else None)
    return found


def _part(low: int, high: int, number: int, size: int) -> tuple[int, int]:
    """Returns the part ``number`` of ``size`` of an interval, as torch cuts it."""
    first, end = ends_of_parts(high - low, size)[number : number + 2]
    return low + first, low + end


def _dims_of(own: Any, mesh: Any) -> list[int]:
    """Returns which dimension of ``mesh`` each dimension of a parameter's own mesh is."""
    if own.ndim == mesh.ndim and torch.equal(own.mesh, mesh.mesh):
        return list(range(mesh.ndim))
    if mesh.mesh_dim_names is None or own.mesh_dim_names is None or set(own.mesh_dim_names) - set(mesh.mesh_dim_names):
        raise ValueError(
            f"mesh: expected parameters cut over dimensions of {mesh}, got {own}; cut them over mesh[name] of the mesh "
            "that build is given, whose dimensions have names"
        )
    return [mesh.mesh_dim_names.index(name) for name in own.mesh_dim_names]
