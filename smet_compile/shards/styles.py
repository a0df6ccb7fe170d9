"""Finds which layers of a model tensor parallelism cuts, and whether by rows or by columns."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

Style = Literal["colwise", "rowwise"]
"""Says how a layer is cut: "colwise" by the rows of its weight, with the bias; "rowwise" by the columns."""
STYLES: tuple[Style, ...] = get_args(Style)


def styles_of(model: nn.Module, tp_plan: Mapping[str, str] | None = None) -> dict[str, Style]:
    """Returns the name of each ``nn.Linear`` that tensor parallelism cuts → its style.

    Args:
        tp_plan: globs over names of modules → "colwise" or "rowwise", as ``parallelize_module`` takes them: ``*``
            stands for one part of a name between dots. The first that matches counts. None for the plan that a model
            of Hugging Face brings, of which other styles, such as those of embeddings and of the head, are left out.

    Raises:
        ValueError: ``tp_plan`` is no such dict, or a glob in it matches no module or one that is no ``nn.Linear``;
            there is no plan, or none of the model's layers in it.
    """
    globs = _own_plan(model) if tp_plan is None else _checked_plan(model, tp_plan)
    found: dict[str, Style] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (style := _style_of(name, globs)) is not None:
            found[name] = style
    if not found:
        raise ValueError(
            f"tp_plan: expected one for {type(model).__name__}, which brings no plan that cuts an nn.Linear, got none; "
            'pass globs over names of modules, as tp_plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"}'
        )
    return found


def _own_plan(model: nn.Module) -> dict[str, Style | None]:
    """Returns the plan of Hugging Face; None for what it cuts in another way."""
    own: Any = getattr(model, "_tp_plan", None)
    if not isinstance(own, Mapping):
        return {}
    return {glob: _known(style) for glob, style in own.items() if isinstance(glob, str)}


def _known(style: object) -> Style | None:
    return next((known for known in STYLES if style == known), None)


def _checked_plan(model: nn.Module, tp_plan: object) -> dict[str, Style | None]:
    if not isinstance(tp_plan, Mapping) or not all(isinstance(glob, str) for glob in tp_plan) or not tp_plan:
        got = "an empty one" if isinstance(tp_plan, Mapping) and not tp_plan else f"a {type(tp_plan).__name__}"
        raise ValueError(
            f"tp_plan: expected a dict from globs over names of modules to {' or '.join(STYLES)}, got {got}; pass "
            '{"layers.*.up": "colwise"}, say'
        )
    for glob, style in tp_plan.items():
        shown = repr(style) if isinstance(style, str) else f"a {type(style).__name__}"
        if not isinstance(style, str) or _known(style) is None:
            raise ValueError(
                f"tp_plan[{glob!r}]: expected {' or '.join(STYLES)}, got {shown}; leave out what is cut in another way"
            )
        matched = [(name, module) for name, module in model.named_modules() if _matches(name, glob)]
        if not matched:
            raise ValueError(
                f"tp_plan: {glob!r} matches none of the modules; name all of a module's path, with * for one part of it"
            )
        for name, module in matched:
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"tp_plan: expected {glob!r} to match nn.Linear alone, got {name or 'the model'}, a "
                    f"{type(module).__name__}; leave it out"
                )
    return {glob: _known(style) for glob, style in tp_plan.items()}


def _style_of(name: str, globs: Mapping[str, Style | None]) -> Style | None:
    return next((style for glob, style in globs.items() if _matches(name, glob)), None)


def _matches(name: str, glob: str) -> bool:
    """Tells whether each part of the name between dots matches that of the glob."""
    if not name or not glob:  # the model itself
        return name == glob
    parts, wanted = name.split("."), glob.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
