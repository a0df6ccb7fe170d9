"""The parameters that an optimizer holds, and what it knows of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from smet_compile.ops import Site, canonical_name, find_sites


@dataclass(frozen=True)
class Held:
    """What the optimizer knows of a parameter: its name, its site if it is compact, its shape when first seen."""

    name: str
    site: Site | None
    shape: torch.Size

    @property
    def density(self) -> float:
        return self.site.density if self.site else 1.0

    def check(self, parameter: Tensor) -> None:
        """Raises ValueError where ``parameter`` is no longer what it was when the optimizer was made."""
        values = parameter if self.site is None else self.site.values_maybe
        if values is None:
            raise ValueError(
                f"{self.name}: the weight was made dense (remove_parametrizations, export_dense, ...) after the "
                "optimizer was made; make the optimizer anew"
            )
        if values is not parameter:
            raise ValueError(
                f"{self.name}: the model's weight was replaced (load_state_dict(assign=True), to_empty, ...) after "
                "the optimizer was made; make the optimizer anew"
            )
        if parameter.shape != self.shape:
            raise ValueError(
                f"{self.name}: expected shape {tuple(self.shape)}, got {tuple(parameter.shape)}: sparsify was "
                "called after the optimizer was made; make the optimizer anew"
            )


def hold(model: nn.Module) -> dict[nn.Parameter, Held]:
    """Every parameter of ``model``; a ValueError where a compact one is sharded."""
    by_values = {id(site.values): site for site in find_sites(model).values()}
    for compact in by_values.values():
        if _is_sharded(compact.values):
            raise ValueError(
                f"{compact.name}: expected whole compact weights, got one cut into shards (FSDP, tensor parallelism): "
                "its rows belong to positions written elsewhere; use DistributedDataParallel, or shard the dense model"
            )
    held = {}
    for name, parameter in model.named_parameters():
        site = by_values.get(id(parameter))
        held[parameter] = Held(site.name if site else canonical_name(model, name), site, parameter.shape)
    return held


def _is_sharded(parameter: Tensor) -> bool:
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)
