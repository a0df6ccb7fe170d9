"""Has a Hugging Face model with compact weights save dense ones, which ``from_pretrained`` loads anywhere.

Compact weights alone would be loaded in silence as a model some of whose layers are random, since ``from_pretrained``
draws what it does not find. So ``model.save_pretrained(folder)`` writes what ``export_dense(model)`` would.

Checkpoints of Hugging Face's Trainer are read twice: by ``from_pretrained``, and by the run that goes on. A folder with
the name of one (``checkpoint-500``) gets compact weights and dense ones, and of these a compact model loads the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

from smet_compile.format import unpack, unpack_bits
from smet_compile.ops import find_sites
from smet_compile.ops.sites import names_of_sites
from smet_compile.shards import has_shards

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_PRETRAINED = "transformers.modeling_utils", "PreTrainedModel"
_METHOD = "save_pretrained"


def save_dense(model: nn.Module) -> None:
    """Gives each Hugging Face model in ``model`` that has compact weights a method that saves dense ones."""
    for module in _pretrained(model):
        if _METHOD not in vars(module) and find_sites(module):
            setattr(module, _METHOD, MethodType(save_pretrained, module))
            module.register_load_state_dict_pre_hook(_take_compact)


def forget_to_save_dense(model: nn.Module) -> None:
    """Undoes ``save_dense``, for a model that is dense again, and removes hooks of this library on loading."""
    for module in _pretrained(model):
        if getattr(vars(module).get(_METHOD), "__func__", None) is save_pretrained:
            delattr(module, _METHOD)
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, wrapped in hooks.items() if _is_ours(getattr(wrapped, "hook", None))]:
            del hooks[key]


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(f"{__name__.partition('.')[0]}.")


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """Yields the modules that derive from ``transformers.PreTrainedModel``, which is not imported for that."""
    for module in model.modules():
        if any((kind.__module__, kind.__name__) == _PRETRAINED for kind in type(module).__mro__):
            yield module


def save_pretrained(
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Saves the model by its own method of this name, with dense weights in the place of compact ones."""
    write = type(self).save_pretrained
    if not find_sites(self) or getattr(self, "_hf_peft_config_loaded", False):  # then adapters alone are written
        write(self, save_directory, is_main_process, state_dict, **options)
        return
    if has_shards(self):
        raise ValueError(
            "save_pretrained: expected a model that is whole on each rank, got shards; call smet.export_dense(model) "
            "on every rank, and save what it returns"
        )
    entries = dict(self.state_dict() if state_dict is None else state_dict)
    is_checkpoint = _CHECKPOINT.fullmatch(Path(save_directory).name) is not None
    sites, all_of = find_sites(self), names_of_sites(self)
    for name, site in sites.items():
        values, topology = _keys(name)
        if values not in entries and (state_dict is None or any(key.endswith(f".{values}") for key in entries)):
            raise ValueError(
                f"{name}: expected {values!r} in the state dict, found none of this name; take that of the model "
                "itself, without the names of wrappers, or save smet.export_dense(model)"
            )
        if values in entries:
            mask = unpack_bits(entries[topology], site.layout.num_blocks)
            dense = unpack(entries[values].detach(), mask, site.layout).cpu()
            for each in all_of[name]:
                entries[each] = dense
                if not is_checkpoint or each != name:  # the first name stands for all when it is loaded
                    for key in _keys(each):
                        entries.pop(key, None)
    if is_checkpoint:  # a run that goes on reads the names that the model has now
        options["save_original_format"] = False
    write(self, save_directory, is_main_process, entries, **options)


def _keys(name: str) -> tuple[str, str]:
    """Returns the keys of values and topology in the state dict of the model in which a compact weight has a name."""
    module, _, tensor_name = name.rpartition(".")
    chain = f"{module}.parametrizations.{tensor_name}".removeprefix(".")
    return f"{chain}.original", f"{chain}.0.topology"


def _take_compact(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Leaves out dense weights beside compact ones, and reports those that have none, even without ``strict``.

    A compact weight with several names takes under each of them the tensors of the first, which alone is written.
    """
    all_of = names_of_sites(module)
    for name, others in all_of.items():
        for other in others:
            for key, first in zip(_keys(other), _keys(name), strict=True):
                if f"{prefix}{first}" in state:
                    state.setdefault(f"{prefix}{key}", state[f"{prefix}{first}"])
    keys = {f"{prefix}{each}": f"{prefix}{_keys(each)[0]}" for names in all_of.values() for each in names}
    dense = [name for name in keys if name in state]
    if dense and not any(values in state for values in keys.values()):
        args[-1].append(
            f"{dense[0].removeprefix(prefix)}: expected compact weights, got a dense one; resume from a checkpoint of "
            "the sparse run, or load dense weights before smet.sparsify"
        )
    for name in dense:
        del state[name]
