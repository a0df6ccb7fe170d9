"""load_compact: makes a model compact as a folder says, and loads its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.api import install_passes
from smet_compile.convert import Choice, make_compact
from smet_compile.convert.compact import Drawn
from smet_compile.convert.find_weights import Weight, find_weights
from smet_compile.convert.materialize import allocate, data_device, fill_unsaved_buffers
from smet_compile.format import Layout, arguments, count_active, patterns, slabs, unpack_bits
from smet_compile.hub import hugging_face
from smet_compile.hub.content import FILE, Content, flat, read, topology_name, values_name
from smet_compile.hub.undo import put_back_on_error
from smet_compile.ops import CompactWeight, canonical_name, find_sites
from smet_compile.ops.gate import topology_error
from smet_compile.ops.loaded import kind_of
from smet_compile.ops.sites import all_names, names_of_sites, without_wrappers
from smet_compile.runtime.checkpoint import all_or_nothing
from smet_compile.runtime.parts import split_parts
from smet_compile.runtime.saved_state import check_model, loadable, model_entries
from smet_compile.shards import is_sharded, reshard

_REASON = "dense in the file"


@torch.no_grad()
def load_compact(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Returns the model that ``save_compact`` wrote into ``folder``.

    The file is checked by its checksum, and against the model, before anything is changed.

    Args:
        model: a dense model of the same class and sizes, whose weights become compact in place and are overwritten;
            or one that is compact in the same way, sharded or not. Default: for a Hugging Face model one that is built
            from the ``config.json`` in the folder, in the dtypes of the file and without dense weights in memory; as
            by ``from_pretrained``, it is in evaluation mode.
            Buffers that no file holds are those of a fresh model.
        device: where a model goes that has no data yet: one that is built here, or given on the meta device, compact or
            not. Default: the device of the mesh on which it is sharded, else torch's default device.

    Raises:
        ValueError: no such folder, a file that is not whole, was altered or has a newer format; a model of other
            weights, shapes or dtypes; nothing to build a model from; a buffer of a model without data that neither the
            file holds nor an initialisation writes. A model that was given is then unchanged.
    """
    path = Path(arguments.path("load_compact: folder", folder))
    if model is not None:
        arguments.module("load_compact: model", model)
    where = None if device is None else data_device(device)
    if not (path / FILE).is_file():
        raise ValueError(
            f"load_compact: folder: expected one that save_compact wrote, got {path} without {FILE}; download a "
            "repository first, with huggingface_hub.snapshot_download"
        )
    content = read(path / FILE)
    loaded = hugging_face.build(path).eval() if model is None else model
    plain = without_wrappers(loaded)
    if model is None:
        _take_dtypes(plain, content)
    reshard(plain)
    is_compact, drawn, reasons = bool(find_sites(plain)), [], {}
    try:
        if is_compact:
            state = _check_compact(plain, content)
        else:
            weights = {canonical_name(plain, name): weight for name, weight in find_weights(plain).items()}
            names = all_names(plain, {n: w.module for n, w in weights.items() if n in content.layouts})
            drawn = _check_dense(plain, content, weights, names)
            reasons = {n: w.reason or _REASON for n, w in weights.items() if n not in content.layouts}
            state = content.by_state_names(flat(names))
    except ValueError as error:
        raise ValueError(f"{path / FILE}: {error}") from error
    lacks_data = any(tensor.is_meta for tensor in (*plain.parameters(), *plain.buffers()))
    if not is_compact:
        install_passes()
    with put_back_on_error(plain) if lacks_data else all_or_nothing(plain, [], None) if is_compact else nullcontext():
        if not is_compact:
            make_compact(plain, drawn, reasons)
        state = loadable(state, None, plain)
        if lacks_data:
            allocate(plain, where)
            plain.load_state_dict(state)
            fill_unsaved_buffers(plain)
        plain.load_state_dict(state)
    return loaded


def _take_dtypes(model: nn.Module, content: Content) -> None:
    """Gives the parameters and buffers of a model without data the dtypes that they have in the file."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        saved = content.tensors.get(name, content.tensors.get(values_name(name)))
        if isinstance(saved, Tensor) and saved.dtype != tensor.dtype:
            tensor.data = tensor.data.to(saved.dtype)


def _check_compact(model: nn.Module, content: Content) -> dict[str, Any]:
    """Returns the tensors by the names of the state dict. Raises ValueError where they are not of this model."""
    state = content.by_state_names(flat(names_of_sites(model)))
    saved = split_parts(model, {"model": state, "optimizer": None})["model"]
    check_model(saved, content.layouts, None, model)
    return dict(saved)


def _check_dense(
    model: nn.Module, content: Content, weights: Mapping[str, Weight], names: Mapping[str, list[str]]
) -> list[Drawn]:
    """Returns the compact weights that a dense model is to get. Raises ValueError where they are not of this model.

    Args:
        weights: those of the model. names: all names of those that become compact.
    """
    drawn = [_draw(name, weights.get(name), layout, content.tensors) for name, layout in content.layouts.items()]
    compact_names = set(flat(names))
    expected: dict[str, Any] = {k: v for k, v in model_entries(model).items() if k not in compact_names}
    for each in drawn:
        compact = each.compact
        values = torch.empty(
            each.choice.layout.values_shape(compact.num_active), dtype=each.choice.weight.tensor.dtype, device="meta"
        )
        for name in names[canonical_name(model, each.choice.weight.name)]:
            expected |= {values_name(name): values, topology_name(name): compact.topology}
    _check_tensors(expected, content.tensors)
    return drawn


def _check_tensors(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for name in expected.keys() ^ saved.keys():
        where = "this model" if name in expected else "the file"
        raise ValueError(f"{name} is only in {where}: the file is of another model; pass one of the same class")
    for name, ours in expected.items():
        if kind_of(ours) != kind_of(saved[name]):
            raise ValueError(
                f"{name}: expected {kind_of(ours)}, got {kind_of(saved[name])} in the file; pass a model of the same "
                "sizes and dtype, such as model.to(torch.bfloat16)"
            )


def _draw(name: str, weight: Weight | None, layout: list[Any], tensors: Mapping[str, Any]) -> Drawn:
    """Returns a dense weight with the parametrization that the file has for it."""
    if weight is None:
        raise ValueError(f"{name} is only in the file: it is of another model; pass one of the same class")
    if weight.never_reason is not None:
        raise ValueError(f"{name}: expected a weight that can be sparse, got one that cannot: {weight.never_reason}")
    if is_sharded(weight.tensor):
        raise ValueError(f"{name}: expected a whole weight, got a shard; load into the dense model, then shard it")
    cut, pattern = _layout(name, weight, layout)
    bits = tensors[topology_name(name)]
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (-(-cut.num_blocks // 8),):
        raise ValueError(f"{name}: topology: expected {-(-cut.num_blocks // 8)} bytes, got {kind_of(bits)}")
    num_active = count_active(bits)
    if num_active == 0 or (error := topology_error(bits, cut, num_active)):
        raise ValueError(f"{name}: topology: {error if num_active else 'expected an active block, got none'}")
    mask = unpack_bits(bits, cut.num_blocks)
    slabs.check_mask(name, mask, pattern, cut)
    mask = mask.to(weight.tensor.device)
    compact = CompactWeight(cut, mask, num_active, name)
    compact.pattern = pattern
    return Drawn(Choice(weight, cut, num_active, pattern, mask), compact)


def _layout(name: str, weight: Weight, saved: Any) -> tuple[Layout, str | None]:
    """Returns how the file cuts a weight, and its pattern."""
    try:
        shape, matrix, block, *others = saved
        pattern = patterns.check_pattern(others[0]) if others else None
        cut = slabs.check_slabs("slabs", others[1]) if len(others) > 1 else None
        sides = [arguments.whole_number("block shape", side, at_least=1) for side in block]
        if len(sides) != 2 or len(others) > 2:
            raise ValueError(f"expected shape, matrix, block shape, pattern and slabs, got {saved!r:.80}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a layout, got another one ({error})") from error
    found = Layout.of(weight.tensor.shape, (sides[0], sides[1]), weight.flatten, cut)
    if cut is not None:
        slabs.check_divides(name, found, cut)
    if [list(found.shape), list(found.matrix)] != [shape, matrix]:
        raise ValueError(
            f"{name}: expected a weight of shape {shape} read as {matrix}, got {list(found.shape)} read as "
            f"{list(found.matrix)} in this model; pass one of the same sizes"
        )
    return found, pattern
