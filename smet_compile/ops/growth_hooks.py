"""Opens the growth sinks of a model once in a forward, where candidates for growth are asked for.

One sink for all reads of a weight: their dense gradients are added up before the blocks are scored.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smet_compile.ops.sites import find_sites, parametrizations

_CHAINS = "_smet_chains"


def _open(model: nn.Module, args: Any) -> None:
    """Within a step that opened sinks already, theirs go on."""
    for chain in getattr(model, _CHAINS):
        compact = chain[0]
        if compact.candidates is not None and compact.update_sink is None:
            compact.growth_sink = compact.open_growth_sink(chain.original)


def _close(model: nn.Module, args: Any, output: Any) -> None:
    for chain in getattr(model, _CHAINS):
        compact = chain[0]
        if compact.growth_sink is not None and compact.update_sink is None:
            compact.growth_sink = None


def install(model: nn.Module) -> None:
    """Lets the forwards of ``model`` open growth sinks for the compact weights in it. Twice is the same as once."""
    sites = find_sites(model).values()
    setattr(model, _CHAINS, tuple(parametrizations(site.module)[site.tensor_name] for site in sites))
    if _open not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_open)
        model.register_forward_hook(_close, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Takes back ``install``."""
    model.__dict__.pop(_CHAINS, None)
    for hooks, ours in ((model._forward_pre_hooks, _open), (model._forward_hooks, _close)):
        for key in [k for k, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
