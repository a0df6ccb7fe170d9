"""Finds how tensor parallelism cuts the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

_STYLES = ("colwise", "rowwise")


def styles_of(model: nn.Module, plan: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns for each layer that is cut, by its name, whether by rows of the weight ("colwise") or columns."""
    own: Any = getattr(model, "_tp_plan", None) if plan is None else plan
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            style = next((style for glob, style in (own or {}).items() if fnmatchcase(name, glob)), None)
            if style in _STYLES:
                found[name] = style
    return found
