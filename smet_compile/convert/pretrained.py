"""Has Hugging Face models that have compact weights save dense ones, which ``from_pretrained`` loads anywhere.

Compact weights alone would be loaded in silence as a model some of whose layers are random, since ``from_pretrained``
draws what it does not find. So ``model.save_pretrained(folder)`` writes what ``export_dense(model)`` would.

Any model may get a compact part: the part alone was given to ``sparsify``, or it was put into another model afterwards.
No module knows what it is part of. So the method of ``PreTrainedModel``, which all these models share, looks for
compact weights when it is called, and saves models without them as ever.

Checkpoints of Hugging Face's Trainer are read twice: by ``from_pretrained``, and by the run that goes on. A folder with
the name of one (``checkpoint-500``) gets compact weights and dense ones, and of these a compact model loads the first.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from smet_compile.format import unpack, unpack_bits
from smet_compile.ops import Site, find_sites
from smet_compile.ops.sites import compact_names, names_of_sites, parametrizations
from smet_compile.shards import has_shards

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_PRETRAINED = "transformers.modeling_utils", "PreTrainedModel"
_METHOD, _IS_OURS = "save_pretrained", "_smet_saves_dense"


def save_dense(model: nn.Module) -> None:
    """Has every Hugging Face model save dense weights, and load compact ones that have several names in ``model``."""
    if not _replace_method():
        _replace_method_later()
    children = [id(child) for module in model.modules() for child in module._modules.values() if child is not None]
    if len(children) > len(set(children)) and not _own_hooks(model):
        model.register_load_state_dict_pre_hook(_take_under_all_names)


def forget_names(model: nn.Module) -> None:
    """Removes the hooks of this library on loading, for a model that is dense again."""
    for module in model.modules():
        for key in _own_hooks(module):
            del module._load_state_dict_pre_hooks[key]


def _own_hooks(module: nn.Module) -> list[int]:
    """Returns the keys of the hooks of this library that ``module`` calls before it loads a state dict."""
    hooks = module._load_state_dict_pre_hooks
    return [key for key, wrapped in hooks.items() if getattr(wrapped, "hook", None) is _take_under_all_names]


def _replace_method() -> bool:
    """Replaces ``PreTrainedModel.save_pretrained``, once; returns False where transformers is not imported yet."""
    where, name = _PRETRAINED
    kind = getattr(sys.modules.get(where), name, None)
    if kind is None:
        return False
    if not hasattr(kind.save_pretrained, _IS_OURS):
        setattr(kind, _METHOD, _saving_dense(kind.save_pretrained))
    return True


@functools.cache
def _replace_method_later() -> None:
    """Replaces it as soon as some module gets a child: so a model gets a compact part after the import."""

    def replace(*_: Any) -> None:
        _replace_method()

    register_module_module_registration_hook(replace)


def _saving_dense(write: Callable[..., None]) -> Callable[..., None]:
    """Returns the method that saves dense weights in the place of compact ones by the method ``write``."""

    @functools.wraps(write)
    def save_pretrained(
        self: Any,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        is_compact = any(True for module in self.modules() for _ in compact_names(module))
        if is_compact and not getattr(self, "_hf_peft_config_loaded", False):  # then adapters alone are written
            is_checkpoint = _CHECKPOINT.fullmatch(Path(save_directory).name) is not None
            state_dict = _dense_entries(self, state_dict, keeps_compact=is_checkpoint)
            if is_checkpoint:  # a run that goes on reads the names that the model has now
                options["save_original_format"] = False
        write(self, save_directory, is_main_process, state_dict, *args, **options)

    setattr(save_pretrained, _IS_OURS, True)
    return save_pretrained


@torch.no_grad()
def _dense_entries(model: nn.Module, given: Mapping[str, Tensor] | None, keeps_compact: bool) -> dict[str, Tensor]:
    """Returns the state dict of ``model``, or the ``given`` one, with what modules read of their compact weights.

    Args:
        keeps_compact: whether it holds the compact weights too.
    """
    if has_shards(model):
        raise ValueError(
            "save_pretrained: expected a model that is whole on each rank, got shards; call smet.export_dense(model) "
            "on every rank, and save what it returns"
        )
    entries = dict(model.state_dict() if given is None else given)
    all_of = names_of_sites(model)
    for name, site in find_sites(model).items():
        values = f"{_chain_name(name)}.original"
        if values not in entries and (given is None or any(key.endswith(f".{values}") for key in entries)):
            raise ValueError(
                f"{name}: expected {values!r} in the state dict, found none of this name; take that of the model "
                "itself, without the names of wrappers, or save smet.export_dense(model)"
            )
        if values not in entries:
            continue
        dense = _read(site, entries[values], entries[f"{_chain_name(name)}.0.topology"])
        for each in all_of[name]:
            entries[each] = dense
            if not keeps_compact or each != name:  # the first name stands for all when it is loaded
                for key in _keys_of(site):
                    entries.pop(f"{_chain_name(each)}.{key}", None)
    return entries


def _read(site: Site, values: Tensor, bits: Tensor) -> Tensor:
    """Returns on the CPU what the module reads, by all parametrizations of the weight, if these are its values."""
    dense = unpack(values.detach(), unpack_bits(bits, site.layout.num_blocks), site.layout)
    for further in list(parametrizations(site.module)[site.tensor_name])[1:]:
        dense = further(dense)
    return dense.cpu()


def _chain_name(name: str) -> str:
    """Returns the name of the parametrizations of a compact weight in the state dict of the model."""
    module, _, tensor_name = name.rpartition(".")
    return f"{module}.parametrizations.{tensor_name}".removeprefix(".")


def _keys_of(site: Site) -> list[str]:
    """Returns the names of the tensors of all parametrizations of the weight."""
    chain = parametrizations(site.module)[site.tensor_name]
    return [name for name, _ in (*chain.named_parameters(), *chain.named_buffers())]


def _take_under_all_names(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Has a compact weight with several names take under each of them the tensors of the first, if it alone is saved.

    A model in which the weights were dense has each of its names too, and would report them as missing.
    """
    all_of = names_of_sites(module)
    for name, site in find_sites(module).items():
        for other in all_of[name][1:]:
            for key in _keys_of(site):
                first = f"{prefix}{_chain_name(name)}.{key}"
                if first in state:
                    state.setdefault(f"{prefix}{_chain_name(other)}.{key}", state[first])
