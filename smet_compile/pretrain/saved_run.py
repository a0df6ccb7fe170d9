"""Opens the saved model of a run, to look at it, to write text with it or to hand it to others."""

import dataclasses
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

import smet_compile as smet
from smet_compile.format import arguments
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.tokenizer import Tokenizer, open_tokenizer
from smet_compile.pretrain.training import Training, build_training, expect_device


@dataclasses.dataclass
class SavedRun:
    """Holds the model of a run as it was before the first step; `load` brings it to the last checkpoint."""

    folder: RunFolder
    config: RunConfig
    tokenizer: Tokenizer
    training: Training

    def load(self, whole: bool = False) -> nn.Module:
        """Loads the last checkpoint, with optimizer and manager if `whole`; returns the model in evaluation mode."""
        parts = (self.training.optimizer, self.training.manager) if whole else ()
        smet.load_checkpoint(self.folder.checkpoint, self.training.model, *parts)
        return self.training.model.eval()


def open_run(path: Path, device: str = "cpu") -> SavedRun:
    """Builds the model of the run in folder `path`, whatever ranks trained it, on one device.

    Raises ValueError where there is no run or no checkpoint, and for a device that this machine lacks.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise ValueError(f"RUN: expected the folder of a run (with config.json), got {path}; see pretrain --out")
    if not folder.checkpoint.exists():
        raise ValueError(f"RUN: expected a checkpoint in {path}, found none; go on with it: {folder.resume_command}")
    config = dataclasses.replace(folder.open(), device=device, eager=True)
    expect_device(device)
    tokenizer = open_tokenizer(config.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown when the run began
        training = build_training(config, tokenizer.vocab_size)
    return SavedRun(folder, config, tokenizer, training)


def dense_model(run: SavedRun) -> nn.Module:
    """Returns the plain Hugging Face model of a loaded run."""
    model = run.training.model if run.training.manager is None else smet.export_dense(run.training.model)
    own: Any = model
    own.config.use_cache = own.generation_config.use_cache = True
    for settings in (own.config, own.generation_config):
        settings.eos_token_id = settings.pad_token_id = run.tokenizer.end
    return model


def _write_dense(run: SavedRun, folder: Path) -> None:
    cast(Any, dense_model(run)).save_pretrained(str(folder))


def _write_compact(run: SavedRun, folder: Path) -> None:
    smet.save_compact(run.training.model, folder, manager=run.training.manager)


FORMATS: dict[str, Callable[[SavedRun, Path], None]] = {"dense": _write_dense, "compact": _write_compact}
"""How `export` writes the model of a loaded run into a folder, by the name of the format."""


def export_run(path: Path, destination: Path, kind: str = "dense") -> None:
    """Writes the model of a run, and its tokenizer, into a new folder, which appears whole or not at all.

    "dense" is a plain Hugging Face model: `AutoModelForCausalLM.from_pretrained` loads it, and
    `AutoTokenizer.from_pretrained` the tokenizer. "compact" is what `smet.load_compact` reads, and
    `from_pretrained` refuses.

    Raises ValueError for another format, a folder with files in it, or a run that cannot be opened.
    """
    write = FORMATS[arguments.one_of("--format", kind, tuple(FORMATS))]
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"DEST: expected a new or empty folder, got {destination}; choose another one")
    run = open_run(path)
    if kind == "compact" and run.training.manager is None:
        raise ValueError(
            f"--format: expected dense for a run of --method {run.config.method}, got compact; leave the option out"
        )
    run.load(whole=kind == "compact")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        write(run, temporary)
        run.tokenizer.save(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
