"""save_compact: writes a compact model into a folder."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smet_compile.format import arguments
from smet_compile.hub import card, hugging_face
from smet_compile.hub.content import FILE, content_of, write
from smet_compile.ops import find_sites, reads
from smet_compile.ops.sites import without_wrappers
from smet_compile.runtime import TopologyManager
from smet_compile.shards import Ranks, reshard


@torch.no_grad()
def save_compact(model: nn.Module, folder: str | os.PathLike[str], *, manager: TopologyManager | None = None) -> None:
    """Writes a compact model into ``folder``, to be shared: what ``load_compact`` reads.

    The folder gets ``compact.safetensors`` with the values and topologies, ``README.md``, a model card with density,
    block shapes, method, bytes and versions, and for a Hugging Face model ``config.json``. The file of weights takes
    the place of an older one whole or not at all. A card that is there stays, unless this function wrote it.

    It is a model to use or to train further, not a run to resume: ``save_checkpoint`` keeps the optimizer. For others,
    ``export_dense(model).save_pretrained(...)`` writes dense weights.

    Args:
        model: has compact weights. A model that ``torch.compile`` or data parallelism wraps is saved as the plain one.
            Where it is sharded, every rank calls this, and the folder is that of a single process.
        manager: the topology manager of the run, if the card is to say how the topology moved.

    Raises:
        ValueError: a model without compact weights or without data; a compact weight that another parametrization
            changes; a folder with dense weights in it; a file that cannot be written.
    """
    arguments.module("save_compact: model", model)
    path = Path(arguments.path("save_compact: folder", folder))
    if manager is not None and not isinstance(manager, TopologyManager):
        got = arguments.described(manager)
        raise ValueError(f"save_compact: manager: expected a TopologyManager or None, got {got}; leave it out")
    plain = without_wrappers(model)
    if not find_sites(plain):
        raise ValueError(
            "save_compact: model: expected compact weights, got none; sparsify it, or save the dense model as usual"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_compact: folder: expected a folder, got the file {path}; pass another path")
    hugging_face.check_folder(path)
    reads.settle_live()
    reshard(plain)
    content = content_of(plain, _versions(), {} if manager is None else _method(manager))
    write(path / FILE, content)
    if Ranks.of_tensors(plain.parameters()).is_first:
        if hugging_face.has_config(plain):
            hugging_face.write_config(plain, content.class_name, path)
        card.write(path, content, find_sites(plain))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("smet-compile", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _method(manager: TopologyManager) -> dict[str, Any]:
    """Returns the settings of the manager, and what it has done so far."""
    return manager.settings | {"num_steps": manager.num_steps, "num_updates": len(manager.history)}
