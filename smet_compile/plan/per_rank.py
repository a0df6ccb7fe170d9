"""Counts what a rank of a sharded run stores, and what FSDP2 makes whole there while it works.

FSDP2 cuts each parameter along its first dimension into chunks of equally many rows; the first rank holds as many as
any. A compact weight has one row for each active block. Slots and ages are cut alike. What says where the rows lie is
on every rank: the bits and lists of the whole weight, and those of the rank's own rows, which its optimizer steps read.

Tensor parallelism cuts weights before that, into parts with as many active blocks each. Bits and lists are then those
of a part; the optimizer steps still read where the rank's own rows lie in the whole weight, and scales of 8-bit moments
are those of the whole weight on every rank.

Modules are sharded in the usual way: each layer, which is an element of an ``nn.ModuleList``, by a call of
``fully_shard``, then the model, which makes one group of the rest: embeddings, head, norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from smet_compile.format import Layout, empty_lists
from smet_compile.plan.mesh import Mesh
from smet_compile.plan.stored import SCALE_BYTES, Bytes, Recipe, Stored, ages_bytes, slot_names
from smet_compile.plan.traffic import Traffic, traffic_of

_PLAIN, _GRADIENTS = "plain parameters", "gradients"
_CUT = ("values", _PLAIN, _GRADIENTS)
_REST = ("scales", "ages", "bits", "lists", "own rows", "buffers")
_OF_TOPOLOGY = ("bits", "lists", "own rows")


@dataclass(frozen=True)
class RankCost:
    """Holds the bytes of one rank, of each kind the most that any rank has.

    Args:
        stored: bytes by kind when a step ends: values (of compact weights), plain parameters, gradients, each slot by
            its name, scales, ages (with step counts), bits and lists (of topologies, whole or of tensor parallelism's
            parts), own rows (bits and lists of the topologies of the rank's rows alone), buffers. With updates in
            backward, gradients are those of the largest group, which come together and are used one by one.
        whole_parameters: what FSDP2 has gathered at the fullest moment: the largest layer, and the rest of the model,
            which stays whole from forward to backward; of weights that tensor parallelism cuts, the part. Prefetching
            gathers up to one more layer, and communication buffers hold copies; neither is counted.
        whole_gradients: the most that the gradients of these parameters take before they are reduced.
        traffic: what the rank sends.
    """

    stored: Bytes
    whole_parameters: int
    whole_gradients: int
    traffic: Traffic

    @property
    def persistent(self) -> int:
        """Returns the bytes that are stored when a step ends, before gradients are let go."""
        return sum(self.stored.values())

    @property
    def parameters(self) -> int:
        """Returns the bytes of the rank's share of all parameters."""
        return self.stored["values"] + self.stored[_PLAIN]

    @property
    def moments(self) -> int:
        """Returns the bytes of the moments of these parameters, without scales."""
        return sum(count for kind, count in self.stored.items() if kind not in (*_CUT, *_REST))

    @property
    def topology(self) -> int:
        """Returns the bytes that tell where rows lie: those that hardly fall with the number of ranks."""
        return sum(self.stored[kind] for kind in _OF_TOPOLOGY)


@dataclass(frozen=True)
class PerRank:
    """Holds the costs of a rank in this run, and in dense training on the same mesh."""

    mesh: Mesh
    sparse: RankCost
    dense: RankCost


def per_rank(
    parameters: Sequence[Stored],
    dense: Sequence[Stored],
    recipe: Recipe,
    buffers: int,
    mesh: Mesh,
    sent_by_layers: int,
) -> PerRank:
    """Counts the bytes of a rank, and those in dense training by torch's AdamW.

    Args:
        parameters, dense: those of the run and of dense training; of tensor parallelism the parts of a rank.
        buffers: the bytes of buffers outside topologies, which every rank has.
        sent_by_layers: the bytes of the activations that tensor parallelism adds up over its ranks in a step.
    """
    by_torch = Recipe(fused_update=False, by_torch=True)
    return PerRank(
        mesh,
        rank_cost(parameters, recipe, mesh, buffers, sent_by_layers),
        rank_cost(dense, by_torch, mesh, buffers, sent_by_layers),
    )


def rank_cost(
    parameters: Sequence[Stored], recipe: Recipe, mesh: Mesh, buffers: int, sent_by_layers: int = 0
) -> RankCost:
    """Counts the bytes of a rank by one recipe; ``per_rank`` describes the arguments."""
    recipes = [recipe_of(each, recipe) for each in parameters]
    slots = {name for each in parameters for name in _slots(each, recipe)}
    found = dict.fromkeys([*_CUT, *sorted(slots), *_REST], 0) | {"buffers": buffers}
    for parameter, its_recipe in zip(parameters, recipes, strict=True):
        for kind, count in _bytes_here(parameter, its_recipe, mesh).items():
            found[kind] += count
    trained = [each for each in parameters if each.trained]
    if recipe.fused_update:
        found[_GRADIENTS] = _largest_arriving(trained, mesh)
    num_gathered = mesh.shards if mesh.calls_fully_shard else 0
    return RankCost(
        stored=found,
        whole_parameters=num_gathered * _fullest(_by_group(parameters, mesh)),
        whole_gradients=num_gathered * _fullest(_by_group(trained, mesh)),
        traffic=traffic_of(parameters, recipes, mesh, sent_by_layers),
    )


def has_cut_codes(parameter: Stored, recipe: Recipe) -> bool:
    """Tells whether a shard may cut a group of 8-bit codes that share a scale, which optimizers refuse."""
    is_tiles = parameter.layout is not None and parameter.layout.tiles
    return not is_tiles and parameter.trained and recipe.has_scales(parameter.dtype)


def recipe_of(parameter: Stored, recipe: Recipe) -> Recipe:
    """Returns the recipe of a parameter: moments in bf16 where 8-bit codes would be cut."""
    return replace(recipe, moment_dtype=torch.bfloat16) if has_cut_codes(parameter, recipe) else recipe


def _slots(parameter: Stored, recipe: Recipe) -> list[str]:
    return slot_names(recipe.optimizer, parameter) if parameter.trained else []


def _bytes_here(parameter: Stored, recipe: Recipe, mesh: Mesh) -> Bytes:
    """Returns the bytes of one parameter, its optimizer state and its topology, by kind."""
    num_rows, layout = mesh.chunk(parameter.num_stored_rows), parameter.layout
    count = num_rows * parameter.row_values
    found = {_PLAIN if layout is None else "values": count * parameter.dtype.itemsize}
    if layout is not None:
        found |= _topology_bytes(parameter, num_rows if mesh.shards > 1 or parameter.whole else None)
    if parameter.trained:
        found[_GRADIENTS] = count * parameter.dtype.itemsize
        found |= dict.fromkeys(_slots(parameter, recipe), count * recipe.dtype_of_moments(parameter.dtype).itemsize)
        scales = parameter.num_scales if recipe.has_scales(parameter.dtype) else 0
        found["scales"] = recipe.slots(parameter) * scales * SCALE_BYTES
        found["ages"] = ages_bytes(parameter, recipe, num_rows)
    return found


def _topology_bytes(parameter: Stored, num_rows: int | None) -> Bytes:
    """Returns the bytes of a topology and of that of ``num_rows`` alone; None where a rank has all of them."""
    layout, whole = parameter.layout, parameter.whole
    assert layout is not None
    found = {"bits": _bits_bytes(layout), "lists": _lists_bytes(layout, parameter.num_active)}
    if num_rows is not None and whole is not None:
        found["own rows"] = _bits_bytes(whole) + _lists_bytes(whole, num_rows)
    elif num_rows is not None:
        # One row alone is all rows on its rank, which needs no topology beside the whole one; the others hold none.
        num_listed = num_rows if num_rows < parameter.num_active else 0
        found["own rows"] = found["bits"] + _lists_bytes(layout, num_listed)
    return found


def _bits_bytes(layout: Layout) -> int:
    return -(-layout.num_blocks // 8)


def _lists_bytes(layout: Layout, num_active: int) -> int:
    return empty_lists(layout, num_active, torch.device("meta")).nbytes


def _largest_arriving(trained: Sequence[Stored], mesh: Mesh) -> int:
    """Returns the most bytes of gradients that come together: those of a group of FSDP2, else one alone."""
    if mesh.calls_fully_shard:
        return max(_by_group(trained, mesh).values(), default=0)
    return max((each.num_stored_rows * each.row_bytes for each in trained), default=0)


def _by_group(parameters: Iterable[Stored], mesh: Mesh) -> Bytes:
    """Returns the bytes of a rank's rows of the parameters of each layer, and of the rest under an empty name."""
    found: Bytes = {}
    for each in parameters:
        found[each.layer] = found.get(each.layer, 0) + mesh.chunk(each.num_stored_rows) * each.row_bytes
    return found


def _fullest(by_group: Bytes) -> int:
    """Returns the bytes of the largest layer and of the rest."""
    return by_group.get("", 0) + max((count for layer, count in by_group.items() if layer), default=0)
