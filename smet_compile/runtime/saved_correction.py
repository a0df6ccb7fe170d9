"""Keeps in checkpoints which weights have their gradients corrected for batch norm, so that a resumed run does it too.

``correct_gradients`` decides by a forward of an example, which a run that resumes need not show again: what it left at
each compact weight is saved and restored.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smet_compile.ops import CompactWeight, find_sites
from smet_compile.ops.loaded import check_keys, kind_of

_KEYS = {"scales_rows": bool, "scales_steps": bool, "correction": str}
"""Maps the attributes of a compact weight that are saved to their types."""
_UNDECIDED: dict[str, Any] = {"scales_rows": False, "scales_steps": False, "correction": None}


def correction_entries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns what was decided for each site; nothing where nobody asked."""
    sites = find_sites(model)
    return {
        name: {key: getattr(site.compact, key) for key in _KEYS}
        for name, site in sites.items()
        if site.compact.correction is not None
    }


def check_correction(saved: Any, model: nn.Module) -> None:
    """Raises ValueError where ``saved`` is not what ``correction_entries`` returns for such a model."""
    known = find_sites(model)
    if not isinstance(saved, dict):
        raise ValueError(f"correction: expected a dict, got {kind_of(saved)}")
    for name, entry in saved.items():
        if name not in known:
            raise ValueError(f"correction: expected names of compact weights of this model, got {name!r}")
        check_keys(f"correction.{name}", entry, _KEYS)
        for key, kind in _KEYS.items():
            if type(entry[key]) is not kind:
                raise ValueError(f"correction.{name}.{key}: expected a {kind.__name__}, got {kind_of(entry[key])}")
        if entry["scales_rows"] and entry["scales_steps"]:
            raise ValueError(f"correction.{name}: expected scaled gradients or scaled steps, got both")


def restore_correction(saved: dict[str, dict[str, Any]], model: nn.Module) -> str | None:
    """Restores it where this model has no decision of its own; returns a warning where the run goes on otherwise.

    A decision of this model's stays. Scaled steps are a matter of the optimizer, which is not told from here, and a
    part of a weight does not know the fan-in of its rows.
    """
    sites = find_sites(model)
    is_cut = any(site.part is not None for site in sites.values())
    if not is_cut and all(site.compact.correction is None for site in sites.values()):
        for name, entry in saved.items():
            if not entry["scales_steps"]:
                sites[name].compact.scales_rows = entry["scales_rows"]
                sites[name].compact.correction = entry["correction"]
    different = [name for name, site in sites.items() if _method_saved(saved.get(name)) != _method_of(site.compact)]
    if not different:
        return None
    first, method = different[0], _method_saved(saved.get(different[0]))
    advice = "Tensor parallelism cuts weights, whose gradients are then not corrected" if is_cut else _ADVICE[method]
    return (
        f"load_checkpoint: {len(different)} weights go on with another correction for batch norm than in the saved "
        f"run, such as {first}: {_TEXTS[method]} there, {_TEXTS[_method_of(sites[first].compact)]} here. {advice}"
    )


def take_correction(entries: dict[str, dict[str, Any]], model: nn.Module) -> None:
    """Has a model go on with exactly these decisions; the optimizers that scale steps are not told from here."""
    for name, site in find_sites(model).items():
        for key, value in (entries.get(name) or _UNDECIDED).items():
            setattr(site.compact, key, value)


def _method_saved(entry: dict[str, Any] | None) -> tuple[bool, bool]:
    return (False, False) if entry is None else (entry["scales_rows"], entry["scales_steps"])


def _method_of(compact: CompactWeight) -> tuple[bool, bool]:
    return compact.scales_rows, compact.scales_steps


_TEXTS = {(False, False): "not corrected", (True, False): "corrected", (False, True): "its steps are scaled"}
_ADVICE = {
    (False, False): "Leave correct_gradients out before loading to go on as before",
    (True, False): "Leave correct_gradients out before loading, and the saved decision is restored",
    (False, True): "Call correct_gradients(model, optimizer, ..., scale_steps=True) to go on as before",
}
