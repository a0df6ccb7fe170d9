"""Writes and reads the configuration of a Hugging Face model beside its compact weights.

``from_pretrained`` must not load such a folder: it would find no dense weights, and draw them anew. The configuration
names a text in place of a file of weights, and ``from_pretrained`` raises an error with this text in it. A version of
transformers that does not know the field raises one too, since the folder has none of the files that it looks for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_WEIGHTS_FIELD = "transformers_weights"
_ADVICE = "compact weights of smet_compile; load this folder with smet_compile.load_compact(folder)"
_DENSE_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")


def has_config(model: nn.Module) -> bool:
    """Tells whether ``model`` is one of transformers, by what is asked of it here."""
    config = getattr(model, "config", None)
    return all(hasattr(config, name) for name in ("save_pretrained", "model_type")) and hasattr(
        model, "save_pretrained"
    )


def check_folder(folder: Path) -> None:
    """Raises ValueError where the folder holds dense weights, which the configuration here would hide."""
    found = next((each.name for pattern in _DENSE_FILES for each in folder.glob(pattern)), None)
    if found is not None:
        raise ValueError(f"folder: expected one without dense weights, got {folder} with {found}; pass another folder")


def write_config(model: nn.Module, class_name: str, folder: Path) -> None:
    """Writes the configuration, with the name of the class to build and the text for ``from_pretrained``."""
    hugging_face: Any = model
    hugging_face.config.save_pretrained(folder)
    path = folder / CONFIG
    fields = json.loads(path.read_text())
    fields |= {"architectures": [class_name], _WEIGHTS_FIELD: _ADVICE}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def build(folder: Path) -> nn.Module:
    """Returns a model on the meta device, of the class and configuration in ``folder``.

    Raises ValueError where there is no configuration, no transformers, or a class that it does not have.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"model: expected a dense model to load into, since {folder} has no {CONFIG}; pass model=")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "model: expected a dense model to load into, or transformers to build one, found neither; pass model=, or "
            "pip install transformers"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a configuration that transformers reads ({reason}); pass model=") from error
    names = config.architectures or [""]
    kind = getattr(transformers, names[0], None)
    if len(names) != 1 or kind is None:
        raise ValueError(
            f"{path}: expected one class of transformers {transformers.__version__} in architectures, got {names!r}; "
            "build the dense model yourself and pass model="
        )
    if hasattr(config, _WEIGHTS_FIELD):
        delattr(config, _WEIGHTS_FIELD)
    with torch.device("meta"):
        model: nn.Module = kind(config)
    if (folder / _GENERATION_CONFIG).is_file():
        hugging_face: Any = model
        hugging_face.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
