"""The model's part of a checkpoint: canonical names on disk, the names of this model in memory, checks between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from smet_compile.ops import canonical_name, find_sites
from smet_compile.ops.loaded import check_integer, kind_of

Rename = Callable[[str], str]


def model_entries(model: nn.Module) -> dict[str, Any]:
    """Returns the state dict of ``model`` by canonical names. Raises ValueError where two names become one."""
    entries: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        canonical = canonical_name(model, name)
        if canonical in entries:
            raise ValueError(f"{name}: expected one tensor of the name {canonical}, got two; wrap the model once")
        entries[canonical] = value
    return entries


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """Returns the versions of modules that a state dict carries, by canonical names; a wrapped module wins."""
    metadata = getattr(model.state_dict(), "_metadata", {})
    return {canonical_name(model, name): dict(entries) for name, entries in metadata.items()}


def layouts_of(model: nn.Module) -> dict[str, list[list[int]]]:
    """Returns shape, matrix and block shape of each compact weight."""
    return {name: [list(part) for part in (site.layout.shape, site.layout.matrix, site.layout.block_shape)] for name, site in find_sites(model).items()}


def loadable(saved: dict[str, Any], metadata: dict[str, Any] | None, model: nn.Module) -> OrderedDict[str, Any]:
    """Returns a state dict by the names that ``model`` has now, with the metadata that was saved."""
    ours = model.state_dict()
    state = OrderedDict((name, saved[canonical_name(model, name)]) for name in ours)
    if metadata is not None:
        by_name = {name: metadata.get(canonical_name(model, name)) for name in getattr(ours, "_metadata", {})}
        state._metadata = {name: entries for name, entries in by_name.items() if entries is not None}  # type: ignore[attr-defined]
    return state


def check_model(saved: dict[str, Any], layouts: dict[str, Any], metadata: Any, model: nn.Module) -> None:
    """Raises ValueError where the saved tensors, layouts or versions are not of this model."""
    _check_layouts(layouts, layouts_of(model))
    ours = model_entries(model)
    for name in ours.keys() ^ saved.keys():
        where = "this model" if name in ours else "the checkpoint"
        raise ValueError(f"{name} is only in {where}: the checkpoint is of another model")
    for name, tensor in ours.items():
        alike = type(saved[name]) is type(tensor) or (isinstance(saved[name], Tensor) and isinstance(tensor, Tensor))
        if not alike or kind_of(tensor) != kind_of(saved[name]):
            raise ValueError(
                f"{name}: expected {kind_of(tensor)}, got {kind_of(saved[name])} in the checkpoint; it is of another "
                "model, density or dtype"
            )
    for raw, module in model.named_modules():
        if hasattr(module, "_misfit"):
            prefix = f"{canonical_name(model, raw)}."
            if misfit := module._misfit(saved.get(prefix + "topology"), prefix):
                raise ValueError(misfit)
    _check_metadata(metadata)


def _check_layouts(layouts: Any, ours: dict[str, list[list[int]]]) -> None:
    for name, layout in layouts.items():
        if name not in ours:
            raise ValueError(f"{name} is compact in the checkpoint, not in this model; sparsify it alike")
        if not isinstance(layout, list) or len(layout) != 3:
            raise ValueError(f"{name}: expected a layout of shape, matrix and block shape, got {kind_of(layout)}")
        for part, got, expected in zip(("shape", "matrix", "block shape"), layout, ours[name], strict=True):
            if got != expected:
                raise ValueError(
                    f"{name}: expected {part} {expected}, got {got!r:.80} in the checkpoint; sparsify the same model "
                    "with the same block_shape"
                )
    for name in ours.keys() - layouts.keys():
        raise ValueError(f"{name} is compact in this model, not in the checkpoint; load it into a dense model")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise ValueError(f"model_metadata: expected a dict, got {kind_of(metadata)}")
    for name, entries in metadata.items():
        if not isinstance(entries, dict):
            raise ValueError(f"model_metadata[{name!r}]: expected a dict, got {kind_of(entries)}")
        if "version" in entries:
            check_integer(f"model_metadata[{name!r}].version", entries["version"])


def renaming(saved_names: Iterable[str], model: nn.Module) -> Rename:
    """Returns what turns the names in a file into canonical ones.

    A file of an older version has the names that the model had with its wrappers. They are those of this model where
    it is wrapped in the same way; else whatever names they are when the wrappers' own are left out.
    """
    names, raw = set(saved_names), list(model.state_dict())
    known = {canonical_name(model, name) for name in raw}
    if names == set(raw) != known:
        return partial(canonical_name, model)
    return partial(_known_as, known | find_sites(model).keys())


def _known_as(known: set[str], name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    for candidate in (name, ".".join(parts), ".".join(parts[1:]) if parts[0] == "module" else name):
        if candidate in known:
            return candidate
    return name
