"""Names model shapes with the training settings that suit them, builds their models, and finds the packages for it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from smet_compile.format import arguments

VOCABULARY = 32_000
"""The size of the vocabulary of the tokenizer that the shapes were published with."""


@dataclass(frozen=True)
class Preset:
    """Holds a LLaMA shape and its default training settings.

    `batch` counts the sequences of one micro-batch, `accumulate` the micro-batches of one step; `lr` is the
    rate at density 1 (a sparse weight gets lr / density ** lr_density_exponent). `kv_heads` counts the heads of keys
    and values, where they are fewer than those of queries.
    """

    hidden: int
    intermediate: int
    heads: int
    layers: int
    steps: int = 20_000
    sequence: int = 256
    batch: int = 64
    accumulate: int = 8
    lr: float = 1e-3
    kv_heads: int | None = None


PRESETS = {
    "nano": Preset(32, 88, 2, 2, steps=40, sequence=32, batch=4, accumulate=1, lr=3e-3),
    "tiny": Preset(128, 352, 4, 6, steps=400, sequence=128, batch=16, accumulate=1, lr=1e-3),
    "9m": Preset(128, 352, 4, 4),
    "20m": Preset(256, 688, 4, 4),
    "60m": Preset(512, 1376, 8, 8),
    "130m": Preset(768, 2048, 12, 12),
    "240m": Preset(768, 2416, 16, 24, steps=60_000),
    "350m": Preset(1024, 2736, 16, 24, steps=60_000),
    "1b": Preset(2048, 5461, 32, 24, steps=100_000, batch=32, accumulate=16, lr=5e-4),
    "3b": Preset(2560, 6848, 32, 32, steps=100_000, batch=16, accumulate=32, lr=5e-4),
    "7b": Preset(4096, 11008, 32, 32, steps=100_000, batch=8, accumulate=64, lr=5e-4),
    "13b": Preset(5120, 13824, 40, 40, steps=100_000, batch=8, accumulate=64, lr=3e-4),
    "34b": Preset(8192, 22016, 64, 48, steps=100_000, batch=4, accumulate=128, lr=1.5e-4, kv_heads=8),
    "70b": Preset(8192, 28672, 64, 80, steps=100_000, batch=4, accumulate=128, lr=1.5e-4, kv_heads=8),
}


def find_preset(name: str, argument: str = "--preset") -> Preset:
    """Returns the preset called `name`; a ValueError that names `argument` lists the names otherwise."""
    return PRESETS[arguments.one_of(argument, name, tuple(PRESETS))]


def build_preset(
    name: str, vocabulary: int = VOCABULARY, sequence: int | None = None, dtype: torch.dtype = torch.float32,
    device: str = "meta",
) -> nn.Module:  # fmt: skip
    """Returns an unmodified Hugging Face `LlamaForCausalLM` of the preset's shape; on "meta" it takes no memory.

    Args:
        sequence: the longest sequence in tokens that the model takes. Default: the preset's.

    Raises: ValueError for an unknown preset, `MissingExtraError` without transformers.
    """
    transformers = require("transformers")
    preset = find_preset(name)
    shape = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        num_hidden_layers=preset.layers,
        max_position_embeddings=sequence or preset.sequence,
        use_cache=False,
    )
    with torch.device(device):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    return model


class MissingExtraError(ModuleNotFoundError):
    """Says that a library which the main job needs is not installed, and how to install it."""


def require(name: str, package: str = "'smet-compile[pretrain]'") -> ModuleType:
    """Imports module `name`, or raises `MissingExtraError` with the command that installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise MissingExtraError(f"{name} is needed for this but not installed; run: pip install {package}") from error
