"""Tries the options of a sparse run on a model without weights, so that what is wrong is refused while all is dense."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from smet_compile.api import sparsify
from smet_compile.ops import find_sites
from smet_compile.plan.shapes import empty_copy
from smet_compile.runtime import TopologyManager

_OF_THE_MODEL = ("density_schedule", "ablation_threshold")
_OF_THE_DATA = ("masks", "select")
_SMALL = 0.1


def rehearse(
    model: nn.Module,
    density: float,
    of_sparsify: Mapping[str, Any],
    of_manager: Mapping[str, Any],
    make_optimizer: Callable[[nn.Module], Any],
) -> None:
    """Makes a copy of the model without weights sparse, then its optimizer and manager; raises what they raise.

    Where options read the weights, or the model cannot be copied, it is a small model that stands for it. What depends
    on the model is refused later then: density stages, ablation, a drop fraction that is too large.
    """
    copied = None if any(name in of_sparsify for name in _OF_THE_DATA) else _copy(model)
    if copied is None:
        rehearse_options(of_manager, make_optimizer)
        return
    with _quietly():
        sparsify(copied, density, **of_sparsify)
        for site in find_sites(copied).values():
            site.compact.register_buffer("topology", torch.zeros_like(site.compact.topology, device="cpu"))
        TopologyManager(copied, make_optimizer(copied), **of_manager)


def rehearse_options(of_manager: Mapping[str, Any], make_optimizer: Callable[[nn.Module], Any] | None = None) -> None:
    """Makes optimizer and manager of a small model; raises ValueError for what no model could have."""
    with _quietly():
        small = sparsify(nn.Sequential(nn.Linear(32, 32, bias=False)), _SMALL)
        optimizer = torch.optim.AdamW(small.parameters()) if make_optimizer is None else make_optimizer(small)
        known = {name: value for name, value in of_manager.items() if name not in _OF_THE_MODEL}
        TopologyManager(small, optimizer, **({"total_steps": 10**6} | known))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _copy(model: nn.Module) -> nn.Module | None:
    """Returns a copy on the meta device; None for a model that keeps what cannot be copied, such as a graph."""
    with contextlib.suppress(Exception):
        return empty_copy(model)
    return None
