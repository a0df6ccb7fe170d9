"""Converts a checkpoint between whole weights, which a file holds, and the parts of them that ranks hold.

A file has the rows of a compact weight in the order of the whole weight, so that any number of ranks, or one, can load
it. Ranks hold them part by part. Where no weight is cut, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from smet_compile.format import Part, count_active, slabs, unpack_bits
from smet_compile.ops import Site, find_sites
from smet_compile.ops.growth import NO_GRADIENT, Collected
from smet_compile.ops.loaded import kind_of
from smet_compile.ops.sites import names_of_sites
from smet_compile.runtime.tree import Reordered
from smet_compile.shards import is_sharded


def join_parts(model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns what a file holds of a run; ``saved`` is that of the parts. Every rank has to call."""
    bits = {name: part.bits_of_all(site.compact.topology) for name, site, part in _cut_sites(model)}
    if not bits:
        return saved
    entries = dict(saved["model"])
    names = names_of_sites(model)
    for name, _, part in _cut_sites(model):
        rows = Reordered(entries[_values_name(name)], partial(part.in_order, bits=bits[name]))
        for each in names[name]:
            entries[_values_name(each)], entries[_topology_name(each)] = rows, bits[name]

    def join(name: str, part: Part, value: Any) -> Any:
        is_rows = isinstance(value, Tensor) and is_sharded(value)
        return Reordered(value, partial(part.in_order, bits=bits[name])) if is_rows else value

    others = [_with_states(model, entry, join) for entry in saved["other_optimizers"]]
    optimizer = _with_states(model, saved["optimizer"], join)
    return saved | {"model": entries, "optimizer": optimizer, "other_optimizers": others}


def split_parts(model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns what a file holds of a run in the order that the parts of weights have on ranks; the inverse.

    Raises ValueError for a topology that is none of this model's.
    """
    cut = list(_cut_sites(model))
    if not cut:
        return saved
    entries, bits, names = dict(saved["model"]), {}, names_of_sites(model)
    for name, site, part in cut:
        bits[name] = _check_bits(name, site, part, entries.get(_topology_name(name)))
        bits_here = part.split_bits(bits[name])
        rows = _by_part(site, part, bits[name], entries.get(_values_name(name)))
        for each in names[name]:
            entries[_values_name(each)], entries[_topology_name(each)] = rows, bits_here
    sites = {name: site for name, site, _ in cut}

    def split(name: str, part: Part, value: Any) -> Any:
        return _by_part(sites[name], part, bits[name], value)

    optimizer = _with_states(model, saved["optimizer"], split)
    others = [_with_states(model, entry, split) for entry in saved.get("other_optimizers", [])]
    return saved | {"model": entries, "optimizer": optimizer, "other_optimizers": others}


def join_collected(site: Site, collected: Collected) -> Collected:
    """Returns the collected gradients of the whole weight; every rank of tensor parallelism has to call."""
    part = site.part
    if part is None:
        return collected
    positions = collected.positions.where(collected.positions == NO_GRADIENT, part.band.place(collected.positions))
    active_sums = collected.active_sums
    if active_sums.numel():
        active_sums = part.in_order(part.gather(active_sums), part.bits_of_all(site.compact.topology))
    return Collected(part.gather(positions), part.gather(collected.sums), active_sums)


def split_collected(site: Site, collected: Collected) -> Collected:
    """Returns this rank's part of the collected gradients of a whole weight; every rank has to call."""
    part = site.part
    if part is None:
        return collected
    here = part.band.number
    positions, sums = (each.chunk(part.count)[here] for each in collected[:2])
    positions = positions.where(positions == NO_GRADIENT, part.band.within(positions))
    active_sums = collected.active_sums
    if active_sums.numel():
        active_sums = part.by_part(active_sums, part.bits_of_all(site.compact.topology)).chunk(part.count)[here]
    return Collected(positions, sums, active_sums)


def _cut_sites(model: nn.Module) -> Iterator[tuple[str, Site, Part]]:
    for name, site in find_sites(model).items():
        if site.part is not None:
            yield name, site, site.part


def _values_name(name: str) -> str:
    return f"{_prefix(name)}.original"


def _topology_name(name: str) -> str:
    return f"{_prefix(name)}.0.topology"


def _prefix(name: str) -> str:
    module, _, tensor_name = name.rpartition(".")
    return f"{module}.parametrizations.{tensor_name}".removeprefix(".")


def _with_states(model: nn.Module, entry: Any, convert: Callable[[str, Part, Any], Any]) -> Any:
    """Returns an optimizer's entry with the state of weights that are cut converted; one of another form as it is."""
    match entry:
        case {"names": list(names), "state": {"param_groups": list(groups), "state": dict(states)}}:
            pass
        case _:
            return entry
    cut = {_values_name(name): (name, part) for name, _, part in _cut_sites(model)}
    named: dict[Any, tuple[str, Part]] = {}
    for its_names, group in zip(names, groups, strict=False):
        numbers = group.get("params", []) if isinstance(group, dict) else []
        for its_name, number in zip(its_names if isinstance(its_names, list) else [], numbers, strict=False):
            if its_name in cut:
                named[number] = cut[its_name]
    converted = {
        number: {key: convert(*named[number], value) if key not in ("births", "scales") else value
                 for key, value in state.items()}
        if number in named and isinstance(state, dict)
        else state
        for number, state in states.items()
    }  # fmt: skip
    return entry | {"state": entry["state"] | {"state": converted}}


def _by_part(site: Site, part: Part, bits: Tensor, value: Any) -> Any:
    """Returns rows part by part; anything that is no row for each active block of the whole weight as it is."""
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == site.num_active_in_whole
    return part.by_part(value, bits) if has_rows else value


def _check_bits(name: str, site: Site, part: Part, bits: Any) -> Tensor:
    expected, whole = -(-part.whole.num_blocks // 8), part.whole
    if not isinstance(bits, Tensor) or tuple(bits.shape) != (expected,) or bits.dtype != site.compact.topology.dtype:
        raise ValueError(
            f"{name}: topology: expected {expected} bytes for {whole.num_blocks} blocks, got {kind_of(bits)}; sparsify "
            "with the same block_shape, density and slabs"
        )
    count = count_active(bits)
    error = slabs.mask_error(unpack_bits(bits, whole.num_blocks), site.compact.pattern, whole)
    if count != site.num_active_in_whole:
        error = f"expected {site.num_active_in_whole} active blocks, got {count}"
    if error is not None:
        raise ValueError(f"{name}: topology: {error}; sparsify with the same density, pattern and slabs")
    return bits
