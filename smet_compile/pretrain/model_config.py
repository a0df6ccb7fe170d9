"""Reads the shape of a model from the config.json of a Hugging Face model, and builds a new model of it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smet_compile.format.arguments import described
from smet_compile.presets import require

NO_MODEL = "none"
_ADVICE = "pass the config.json of a causal language model"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")


def read_model_config(text: str) -> str:
    """Returns a config as one line of JSON, from such a line, a file or a folder with a config.json; "none" stays.

    A run keeps this line, so that it goes on whatever becomes of the file. Raises ValueError for anything else.
    """
    if text == NO_MODEL:
        return text
    return json.dumps(_checked(text if text.startswith("{") else _read(Path(text))), sort_keys=True)


def _read(path: Path) -> str:
    try:
        return (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--model: expected a file that can be read, got {path} ({reason}); {_ADVICE}") from error


def _checked(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--model: expected JSON, got {error}; {_ADVICE}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"--model: expected a JSON object with model_type, got {described(values)}; {_ADVICE}")
    if "quantization_config" in values:
        raise ValueError("--model: expected a model that is not quantized, got quantization_config; take it out")
    return values


def name_of_model(text: str) -> str:
    """Returns the kind of model that a config in one line describes, such as "gpt2"."""
    return str(json.loads(text)["model_type"])


def num_layers_of(text: str) -> int:
    """Returns the number of its layers, as far as the config says it; 1 otherwise."""
    values = json.loads(text)
    found = [values.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")]
    return next((count for count in found if isinstance(count, int)), 1)


def build_from_config(text: str, vocabulary: int, sequence: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a new causal model of the shape that a config in one line describes; on "meta" it takes no memory.

    Its vocabulary is that of the tokenizer, whatever the config says, and it keeps no cache of keys and values.

    Raises:
        ValueError: a model that transformers does not know, that is no causal language model, or that takes shorter
            sequences.
    """
    transformers = require("transformers")
    values, name = json.loads(text), name_of_model(text)
    if name not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"--model: expected a kind of model that transformers {transformers.__version__} knows, got {name!r}; "
            + _ADVICE
        )
    try:
        shape = transformers.CONFIG_MAPPING[name].from_dict(values)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--model: expected a config of {name}, got one that it refuses ({reason}); mend it"
        ) from error
    own = shape.get_text_config()
    longest = getattr(own, "max_position_embeddings", None)
    if isinstance(longest, int) and longest < sequence:
        raise ValueError(
            f"--sequence: expected at most {longest} (max_position_embeddings of --model), got {sequence}; pass fewer"
        )
    own.vocab_size, own.use_cache = vocabulary, False
    if hasattr(own, "is_decoder"):
        own.is_decoder = True  # a BERT reads ahead otherwise
    for token in _TOKENS:
        number = getattr(own, token, None)
        if isinstance(number, int) and number >= vocabulary:
            setattr(own, token, None)
    try:
        with torch.device(device):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--model: expected a causal language model, got {name} ({reason}); {_ADVICE}") from error
    return model
