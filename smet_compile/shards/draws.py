"""Draws random numbers into shards as into whole parameters, so that they do not depend on the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smet_compile.shards.rows import cut_like, is_sharded, local, make_whole, part_of


class DrawsWhole(TorchDispatchMode):
    """Makes each random op on a shard run on the whole parameter, on every rank, of which a rank keeps its rows.

    A DTensor would draw other numbers than one process. All ranks need the same random state.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not (args and is_sharded(args[0])):
            return func(*args, **kwargs)
        shard = args[0]
        drawn = func(make_whole(shard.detach()), *args[1:], **kwargs)
        if not func._schema.is_mutable:
            return cut_like(drawn, shard)
        local(shard).copy_(part_of(drawn, shard))
        return shard
