"""A run in memory: built from its config, put back to its last checkpoint, saved."""

from dataclasses import dataclass
from typing import Any

import smet_compile as smet
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.data import Data, open_data
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.lock import RunLock
from smet_compile.pretrain.memory_limit import expect_enough_memory, explaining_lack_of_memory
from smet_compile.pretrain.metrics import MetricsLog
from smet_compile.pretrain.option_values import shown
from smet_compile.pretrain.tokenizer import Tokenizer, open_tokenizer
from smet_compile.pretrain.training import Training, build_training, expect_device


@dataclass
class Run:
    """A run in memory, in a folder that this process holds."""

    folder: RunFolder
    lock: RunLock
    config: RunConfig
    tokenizer: Tokenizer
    data: Data
    training: Training


def build_run(folder: RunFolder, lock: RunLock, config: RunConfig) -> Run:
    """Everything a run needs, as it is before the first step."""
    expect_device(config.device)
    tokenizer = open_tokenizer(config.tokenizer)
    with explaining_lack_of_memory():
        data = open_data(config, tokenizer)
        expect_enough_memory(config, tokenizer.vocab_size)
        return Run(folder, lock, config, tokenizer, data, build_training(config, tokenizer.vocab_size))


def restore_run(run: Run) -> int:
    """Put a new run where its last checkpoint was; returns the step, 0 where there is none."""
    if not run.folder.checkpoint.exists():
        return 0
    training = run.training
    extra = smet.load_checkpoint(run.folder.checkpoint, training.model, training.optimizer, training.manager)
    _expect_own(run, extra)
    if extra["fingerprint"] != run.data.fingerprint:
        raise ValueError(
            f"--resume: expected the text this run began with ({run.config.data}), got another; "
            "restore the files, or begin a new run with --out"
        )
    run.data.train.load_state_dict(extra["data"])
    step: int = extra["step"]
    return step


def _expect_own(run: Run, extra: Any) -> None:
    """Raise ValueError for a checkpoint that another script saved, or a longer run."""
    path, steps = run.folder.checkpoint, run.config.steps
    kinds = {"step": int, "data": dict, "fingerprint": str}
    if not isinstance(extra, dict) or not all(isinstance(extra.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path}: expected a checkpoint that pretrain saved, got one with {shown(extra)} as extra")
    if not 1 <= extra["step"] <= steps:
        raise ValueError(f"{path}: expected a checkpoint of a step from 1 to {steps} (--steps), got {extra['step']}")


def headline(run: Run, first: int) -> str:
    """What begins or goes on, in one line."""
    weights = sum(parameter.numel() for parameter in run.training.model.parameters())
    start = f"from step {first}" if first else "from the beginning"
    config = run.config
    return f"{config.preset}, {config.method}: {weights:,} stored weights, {config.data}, {start}, in {run.folder.path}"


def save_run(run: Run, step: int, log: MetricsLog) -> None:
    """Write the checkpoint of step `step`; ValueError where that fails, the one before is then still there.

    The log is on disk before the checkpoint is. Where the run's folder is gone, nothing is left in its place.
    """
    extra = {"step": step, "data": run.data.train.state_dict(), "fingerprint": run.data.fingerprint}
    training = run.training
    log.sync()
    try:
        run.lock.renew()
        smet.save_checkpoint(run.folder.checkpoint, training.model, training.optimizer, training.manager, extra=extra)
    except (ValueError, OSError) as error:
        log.expect_in_place()
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{error}; then {run.folder.resume_command}") from error
    finally:
        if not log.is_in_place():
            run.folder.remove_lone_checkpoint()
    log.expect_in_place()


def active_fraction(training: Training) -> float:
    """Active share of all blocks of the sparse layers, read back from the topology; 1 in dense training."""
    if training.manager is None:
        return 1.0
    sites = smet.report(training.model).sites
    return sum(site.num_active for site in sites) / sum(site.num_blocks for site in sites)
