"""A run in memory: built from its config, put back to its last checkpoint, saved."""

from dataclasses import dataclass

import smet_compile as smet
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.data import Data, open_data
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.tokenizer import Tokenizer, open_tokenizer
from smet_compile.pretrain.training import Training, build_training


@dataclass
class Run:
    """A run in memory."""

    folder: RunFolder
    config: RunConfig
    tokenizer: Tokenizer
    data: Data
    training: Training


def build_run(folder: RunFolder, config: RunConfig) -> Run:
    """Everything a run needs, as it is before the first step."""
    tokenizer = open_tokenizer(config.tokenizer)
    data = open_data(config, tokenizer)
    return Run(folder, config, tokenizer, data, build_training(config, tokenizer.vocab_size))


def restore_run(run: Run) -> int:
    """Put a new run where its last checkpoint was; returns the step, 0 where there is none."""
    if not run.folder.checkpoint.exists():
        return 0
    training = run.training
    extra = smet.load_checkpoint(run.folder.checkpoint, training.model, training.optimizer, training.manager)
    if extra["fingerprint"] != run.data.fingerprint:
        raise ValueError(
            f"--resume: expected the text this run began with ({run.config.data}), got another; "
            "restore the files, or begin a new run with --out"
        )
    run.data.train.load_state_dict(extra["data"])
    return extra["step"]


def headline(run: Run, first: int) -> str:
    """What begins or goes on, in one line."""
    weights = sum(parameter.numel() for parameter in run.training.model.parameters())
    start = f"from step {first}" if first else "from the beginning"
    config = run.config
    return f"{config.preset}, {config.method}: {weights:,} stored weights, {config.data}, {start}, in {run.folder.path}"


def save_run(run: Run, step: int) -> None:
    """Write the checkpoint of step `step`; ValueError where that fails, the one before is then still there."""
    extra = {"step": step, "data": run.data.train.state_dict(), "fingerprint": run.data.fingerprint}
    training = run.training
    try:
        smet.save_checkpoint(run.folder.checkpoint, training.model, training.optimizer, training.manager, extra=extra)
    except ValueError as error:
        raise ValueError(f"{error}; then {run.folder.resume_command}") from error


def active_fraction(training: Training) -> float:
    """Active share of all blocks of the sparse layers, read back from the topology; 1 in dense training."""
    if training.manager is None:
        return 1.0
    sites = smet.report(training.model).sites
    return sum(site.num_active for site in sites) / sum(site.num_blocks for site in sites)
