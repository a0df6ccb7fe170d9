"""Takes a run from its start or its checkpoint to its end, and saves it so that it can go on when it is interrupted."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

import smet_compile as smet
from smet_compile.format.arguments import described
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.console import DeadUnitWarning, Display, Status, open_progress, print_plainly
from smet_compile.pretrain.data import Data, open_data
from smet_compile.pretrain.folder import RunFolder, RunLock
from smet_compile.pretrain.memory import expect_enough_memory, explaining_lack_of_memory, measure
from smet_compile.pretrain.metrics import MetricsLog, NoLog, event_values, is_finished, mend_metrics, read_metrics
from smet_compile.pretrain.report import write_report
from smet_compile.pretrain.tokenizer import Tokenizer, open_tokenizer
from smet_compile.pretrain.trackers import expect_tracker, open_log
from smet_compile.pretrain.training import (
    Training,
    build_training,
    expect_device,
    rate_schedule,
    train_step,
    validation_loss,
)
from smet_compile.pretrain.world import OtherRankError, World, open_world
from smet_compile.runtime.metrics import LOGGED

Stop = Callable[[], bool]
SPEED_MEMORY = 0.9


@dataclass
class Run:
    """Holds a run in memory, whose folder the first rank has locked."""

    world: World
    folder: RunFolder
    lock: RunLock
    config: RunConfig
    tokenizer: Tokenizer
    data: Data
    training: Training


def _never() -> bool:
    return False


def pretrain(config: RunConfig, path: Path, stop: Stop = _never, console: Any = None) -> bool:
    """Trains a new model as `config` says; `path` becomes the run's folder, which no other process may use meanwhile.

    `stop` is called after each step; where it returns True the run saves and ends early. Returns whether the run
    is finished. Raises ValueError for a mistake in config, data or folder, before anything is written. Where several
    processes train one model (`config.shard`), all of them call this; the first one writes and prints.
    """
    folder = RunFolder(path)
    folder.expect_free()
    with open_world(config) as world, _locked(world, folder, "--out") as lock:
        world.on_first(folder.expect_free)
        run = build_run(world, folder, lock, config)
        with explaining_failed_writes(folder):
            world.on_first(lambda: folder.create(config))
        lock.keep_folder()
        return _finish(run, 0, stop, console)


def resume(path: Path, stop: Stop = _never, console: Any = None, shard: str | None = None) -> bool:
    """Goes on with the run in folder `path` from its last checkpoint, or from the beginning if there is none.

    On the CPU the losses are those of an undisturbed run, bit for bit. A finished run gets its report again.
    Where the log lacks steps that were trained, a line says so. Any number of processes goes on with a run, whatever
    number began it; `shard` takes the place of the run's own `--shard`, then losses are equal up to rounding. Raises
    ValueError for a mistake in the folder's files, and where another process uses the folder.
    """
    folder = RunFolder(path)
    with open_world(_config_of(folder, shard)) as world, _locked(world, folder, "--resume") as lock:
        config = world.on_first(lambda: _config_of(folder, shard))
        if world.on_first(lambda: is_finished(folder.metrics)):
            world.on_first(lambda: write_report(folder))
            return True
        run = build_run(world, folder, lock, config)
        first = restore_run(run)
        with explaining_failed_writes(folder):
            world.on_first(lambda: folder.create(config) if shard else None)
        return _finish(run, first, stop, console)


def _config_of(folder: RunFolder, shard: str | None) -> RunConfig:
    config = folder.open()
    return replace(config, shard=shard) if shard else config


@contextmanager
def _locked(world: World, folder: RunFolder, option: str) -> Iterator[RunLock]:
    """Yields the lock of a folder, which the first rank holds."""
    lock = RunLock(folder.path, option)
    with ExitStack() as stack:
        with world.together():
            if world.is_first:
                stack.enter_context(lock)
        yield lock


@contextmanager
def explaining_failed_writes(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{folder.path}: could not be written ({error.strerror or error}); "
            f"what was saved before is whole; free some space, then {folder.resume_command}"
        ) from error


def _finish(run: Run, first: int, stop: Stop, console: Any) -> bool:
    world, manager = run.world, run.training.manager
    console = open_console(world, console)
    with explaining_failed_writes(run.folder), explaining_lack_of_memory():
        warning = world.on_first(lambda: mend_metrics(run.folder.metrics, first, manager.history if manager else ()))
        with _open_log(run, first) as log:
            print_plainly(console, headline(run, first))
            if world.replicas is not None and not run.config.eager:
                print_plainly(console, "a sharded run does not compile its step yet: it trains as with --eager")
            if world.replicas is None and run.config.shard != "none":
                print_plainly(
                    console,
                    f"--shard {run.config.shard}: one process trains alone, since torchrun did not start it; torchrun "
                    "--nproc-per-node N -m smet_compile ... starts N",
                )
            if warning:
                print_plainly(console, warning)
            dead_units = DeadUnitWarning(console)
            dead_units.check(run.training.model)
            with open_progress(console, first, run.config.steps) as progress:
                finished = _train(run, first, stop, log, progress, dead_units)
            with world.together():
                log.expect_in_place()
    if finished:
        world.on_first(lambda: write_report(run.folder))
    return finished


def open_console(world: World, console: Any) -> Any:
    """Returns the console to print to: a deaf one on a rank that is not the first."""
    return (console or Console()) if world.is_first else Console(quiet=True, file=StringIO())


def _open_log(run: Run, first: int) -> MetricsLog:
    with run.world.together():
        return open_log(run.folder, run.config, first) if run.world.is_first else NoLog()


def _train(run: Run, first: int, stop: Stop, log: MetricsLog, progress: Display, dead_units: DeadUnitWarning) -> bool:
    steps = StepLoop(run, first, log, progress, dead_units)
    for step in range(first + 1, run.config.steps + 1):
        if steps.take(step, stop):
            return False
    steps.end(first)
    return True


class StepLoop:
    """Takes the steps of a run after the first `first` ones, and notes, shows, validates and saves what they do."""

    def __init__(self, run: Run, first: int, log: MetricsLog, progress: Display, dead_units: DeadUnitWarning) -> None:
        self._run, self._log, self._progress, self._dead_units = run, log, progress, dead_units
        run.training.model.train()
        self._density, self._speed = active_fraction(run.training), 0.0
        self._schedule = rate_schedule(run.training, run.config, first)
        metrics = run.folder.metrics
        self._known = run.world.on_first(lambda: {(each["kind"], each["step"]) for each in read_metrics(metrics)})
        self._is_measured = any(kind == "bytes" for kind, _ in self._known)

    def take(self, step: int, stop: Stop) -> bool:
        """Takes one step, counted from 1; returns whether to stop after it."""
        run, log, config, training = self._run, self._log, self._run.config, self._run.training
        began = time.perf_counter()
        rate = self._schedule.get_last_lr()[0]
        batch = run.world.rows_of(run.data.train.batch(step - 1)).to(config.device)
        loss, event = train_step(training, batch)
        self._schedule.step()
        seconds = time.perf_counter() - began
        self._speed = _smoothed(self._speed, config.step_tokens / seconds)
        with run.world.together():
            log.write("train", step, loss=loss, lr=rate, seconds=seconds)
            if event is not None:
                log.write("topology", step, event=event_values(event))
                self._density = active_fraction(training)
                if config.log != "none" and training.manager is not None:
                    log.track(step, training.manager.metrics(LOGGED))
                self._dead_units.check(training.model)
            next_update = training.manager.next_update if training.manager else None
            self._progress.update(Status(step, loss, self._speed, self._density, next_update))
            if not self._is_measured:
                log.write("bytes", step, **measure(training, config, run.tokenizer.vocab_size))
                self._is_measured = True
        return _after_step(run, step, stop, log)

    def end(self, first: int) -> None:
        """Notes that the run, which began after step `first`, has reached its end."""
        run, log, steps = self._run, self._log, self._run.config.steps
        if first == steps and ("eval", first) not in self._known:
            _validate(run, first, log)
        with run.world.together():
            log.write("end", steps)
            log.sync()


def _smoothed(speed: float, now: float) -> float:
    return now if speed == 0 else SPEED_MEMORY * speed + (1 - SPEED_MEMORY) * now


def _after_step(run: Run, step: int, stop: Stop, log: MetricsLog) -> bool:
    """Validates and saves where it is time to; returns whether to stop here."""
    config = run.config
    last = step == config.steps
    if last or step % config.eval_every == 0:
        _validate(run, step, log)
    stopping = run.world.any(stop())
    if last or stopping or step % config.save_every == 0:
        save_run(run, step, log)
    return stopping and not last


def _validate(run: Run, step: int, log: MetricsLog) -> None:
    loss = validation_loss(run.training, run.data.validation, run.config)
    with run.world.together():
        log.write("eval", step, loss=loss)


def build_run(world: World, folder: RunFolder, lock: RunLock, config: RunConfig) -> Run:
    """Returns everything that a run needs, as it is before the first step."""
    with explaining_lack_of_memory():
        with world.together():
            expect_device(config.device)
            expect_tracker(config.log)
            tokenizer = open_tokenizer(config.tokenizer)
            data = open_data(config, tokenizer)
            expect_enough_memory(config, tokenizer.vocab_size, world.size)
        world.expect_same(f"--data {config.data}: its text", data.fingerprint)
        with world.together():
            training = build_training(config, tokenizer.vocab_size, world)
    return Run(world, folder, lock, config, tokenizer, data, training)


def restore_run(run: Run) -> int:
    """Puts a new run where its last checkpoint was; returns the step, 0 where there is none."""
    exists = run.folder.checkpoint.exists()
    run.world.expect_same(f"{run.folder.checkpoint}: whether it exists", exists)
    with run.world.together():
        return _load_run(run) if exists else 0


def _load_run(run: Run) -> int:
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
    """Raises ValueError for a checkpoint that another script saved, or a longer run."""
    path, steps = run.folder.checkpoint, run.config.steps
    kinds = {"step": int, "data": dict, "fingerprint": str}
    if not isinstance(extra, dict) or not all(isinstance(extra.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(
            f"{path}: expected a checkpoint that pretrain saved, got one with {described(extra)} as extra; restore it"
        )
    if not 1 <= extra["step"] <= steps:
        raise ValueError(
            f"{path}: expected a checkpoint of a step from 1 to {steps} (--steps), got {extra['step']}; restore it"
        )


def headline(run: Run, first: int) -> str:
    """Returns one line that names the run and where it starts."""
    weights = sum(parameter.numel() for parameter in run.training.model.parameters())
    start = f"from step {first}" if first else "from the beginning"
    config = run.config
    ranks = "" if run.world.replicas is None else f", {config.shard} on {run.world}"
    return (
        f"{config.shape_name}, {config.method}: {weights:,} stored weights{ranks}, {config.data}, {start}, in "
        f"{run.folder.path}"
    )


def save_run(run: Run, step: int, log: MetricsLog) -> None:
    """Writes the checkpoint of step `step`; ValueError where that fails, the one before is then still there.

    The log is on disk before the checkpoint is. Where the run's folder is gone, nothing is left in its place.
    """
    with run.world.together():
        _save_run(run, step, log)


def _save_run(run: Run, step: int, log: MetricsLog) -> None:
    extra = {"step": step, "data": run.data.train.state_dict(), "fingerprint": run.data.fingerprint}
    training, world = run.training, run.world
    with world.together():
        log.sync()
    try:
        with world.together():
            if world.is_first:
                run.lock.renew()
        smet.save_checkpoint(run.folder.checkpoint, training.model, training.optimizer, training.manager, extra=extra)
    except (ValueError, OSError) as error:
        log.expect_in_place()
        if isinstance(error, OSError | OtherRankError):
            raise
        raise ValueError(f"{error}; then {run.folder.resume_command}") from error
    finally:
        if not log.is_in_place():
            run.folder.remove_lone_checkpoint()
    log.expect_in_place()


def active_fraction(training: Training) -> float:
    """Returns the active share of all blocks of the sparse layers, read back from the topology; 1 in dense training."""
    if training.manager is None:
        return 1.0
    sites = smet.report(training.model).sites
    return sum(site.num_active for site in sites) / sum(site.num_blocks for site in sites)


class Interrupt:
    """Remembers that somebody asked to stop; an instance is the `stop` that the loop calls."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; the second one acts as usual."""
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(*_: object) -> None:
        interrupt.requested = True
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield interrupt
    finally:
        restore()
