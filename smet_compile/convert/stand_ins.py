"""Lets initialisations write compact weights as dense tensors, and shards as whole parameters, and keeps the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from smet_compile.convert.active_blocks import Start, select_blocks
from smet_compile.format import unpack, unpack_bits
from smet_compile.ops import Site
from smet_compile.shards import is_sharded, local, make_whole, part_of


class StandIns:
    """Holds the dense tensors that stand in for the compact weights which an initialisation reads.

    A stand-in is NaN where nothing is known: everywhere at first, and outside the active blocks once there are some.

    Args:
        seed: that of the random selection of active blocks.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._read: dict[str, tuple[Site, Tensor, Tensor | None]] = {}

    @contextmanager
    def of(self, sites: Iterable[Site]) -> Iterator[None]:
        """Makes the sites read as stand-ins."""
        sites = list(sites)
        for site in sites:
            site.compact.stand_in = partial(self._stand_in, site)
        try:
            yield
        finally:
            for site in sites:
                site.compact.stand_in = None

    def _stand_in(self, site: Site) -> Tensor:
        if site.name not in self._read:
            device, dtype = site.compact.topology.device, site.values.dtype
            dense, before = torch.full(site.whole.shape, math.nan, dtype=dtype, device=device), None
            if site.compact.fingerprint is not None:
                before = site.rows.gather(local(site.values.detach())).to(device) / _scale(site)
                dense = _fill(site, dense, before)
            self._read[site.name] = site, dense, before
        return self._read[site.name][1]

    def keep(self) -> None:
        """Writes the active blocks of what was written since the last call to the values.

        The active blocks are selected once all of a weight is known. Where only active weights are, they stay active.
        """
        for site, dense, before in self._read.values():
            here = dense if site.part is None else site.part.band.cut_dense(dense)
            if not dense.isnan().any():
                self._select(site, here)
            elif before is None:
                continue
            values = _pack(site, here)
            if before is None or not torch.equal(values, before):
                local(site.values).copy_(values.mul_(_scale(site))[site.rows.here])
        self._read.clear()

    def _select(self, site: Site, dense: Tensor) -> None:
        compact = site.compact
        start = Start(compact.name, site.layout, site.num_active, compact.select, compact.pattern, self._seed)
        compact.set_mask(select_blocks(start, dense))


def _fill(site: Site, dense: Tensor, rows: Tensor) -> Tensor:
    """Returns the dense weight, of all ranks, with its active blocks; ``rows`` are those of this rank's part of it."""
    bits = site.bits_of_whole(site.compact.topology)
    if site.part is not None:
        rows = site.part.in_order(site.part.gather(rows), bits)
    active = unpack_bits(bits, site.whole.num_blocks)
    inside = unpack(torch.ones_like(rows, dtype=torch.bool), active, site.whole)
    return torch.where(inside, unpack(rows, active, site.whole), dense)


def _pack(site: Site, dense: Tensor) -> Tensor:
    compact = site.compact
    packed: Tensor = torch.ops.smet.pack(
        dense, compact.topology, compact.lists, compact.layout.text, compact.num_active
    )
    return packed


def _scale(site: Site) -> float:
    return math.sqrt(site.layout.num_blocks / site.num_active) if site.compact.rescale else 1.0


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Makes the sharded parameters of one module whole, and keeps this rank's rows of what they hold at the end."""
    shards = {name: parameter for name, parameter in module._parameters.items() if is_sharded(parameter)}
    for name, shard in shards.items():
        assert shard is not None
        module._parameters[name] = nn.Parameter(make_whole(shard.detach()), shard.requires_grad)
    try:
        yield
        for name, shard in shards.items():
            whole = module._parameters[name]
            assert whole is not None
            local(shard).copy_(part_of(whole, shard))
    finally:
        module._parameters.update(shards)
