"""Says which options of an optimizer changed, where each change makes a compiled step anew."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from smet_compile.optim.active import ActiveOptimizer

Options = list[dict[str, Any]]


def changing_options(optimizer: Optimizer) -> Options:
    """Returns the options of each group that are constants of a compiled step; empty where they are in tensors."""
    if not isinstance(optimizer, ActiveOptimizer):
        return []
    return [{name: group.get(name) for name in optimizer.defaults if name != "lr"} for group in optimizer.param_groups]


def why_recompiled(before: Options, now: Options) -> str | None:
    """Says which options are others than before and what to do; None where all are the same."""
    pairs = zip(before, now, strict=False)
    names = dict.fromkeys(name for old, new in pairs for name in new if new[name] != old.get(name))
    if not names:
        return None
    return (
        f"the optimizer's {' and '.join(names)} changed from step to step, and each change makes a new graph; let the "
        "schedule change lr alone (OneCycleLR(..., cycle_momentum=False)), or change other options a few times at most"
    )
