"""One run from start or checkpoint to the end, so that every interruption can be made good."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.console import print_plainly
from smet_compile.pretrain.dead_unit_warning import DeadUnitWarning
from smet_compile.pretrain.extras import require
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.lock import RunLock
from smet_compile.pretrain.memory import measure
from smet_compile.pretrain.memory_limit import explaining_lack_of_memory
from smet_compile.pretrain.mend import mend_metrics
from smet_compile.pretrain.metrics import MetricsLog, read_metrics
from smet_compile.pretrain.progress import Progress, Status, open_progress
from smet_compile.pretrain.records import event_values
from smet_compile.pretrain.report import write_report
from smet_compile.pretrain.run import Run, active_fraction, build_run, headline, restore_run, save_run
from smet_compile.pretrain.training import learning_rate, train_step, validation_loss

Stop = Callable[[], bool]
SPEED_MEMORY = 0.9


def _never() -> bool:
    return False


def pretrain(config: RunConfig, path: Path, stop: Stop = _never, console: Any = None) -> bool:
    """Train a new model as `config` says; `path` becomes the run's folder, which no other process may use meanwhile.

    `stop` is asked after each step; where it says yes the run saves and ends early. Returns whether the run
    is finished. Raises ValueError for what is wrong with config, data or folder, before anything is written.
    """
    folder = RunFolder(path)
    folder.expect_free()
    with RunLock(path, "--out") as lock:
        folder.expect_free()
        run = build_run(folder, lock, config)
        with _explaining_failed_writes(folder):
            folder.create(config)
        lock.keep_folder()
        return _finish(run, 0, stop, console)


def resume(path: Path, stop: Stop = _never, console: Any = None) -> bool:
    """Go on with the run in folder `path` from its last checkpoint, or from the beginning if there is none.

    On the CPU the losses are those of an undisturbed run, bit for bit. A finished run gets its report again.
    Where the log lacks steps that were trained, a line says so. Raises ValueError for what is wrong with the folder's
    files, and where another process uses the folder.
    """
    folder = RunFolder(path)
    folder.open()
    with RunLock(path, "--resume") as lock:
        config = folder.open()
        if folder.is_finished():
            write_report(folder)
            return True
        run = build_run(folder, lock, config)
        return _finish(run, restore_run(run), stop, console)


@contextmanager
def _explaining_failed_writes(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{folder.path}: could not be written ({error.strerror or error}); "
            f"what was saved before is whole; free some space, then {folder.resume_command}"
        ) from error


def _finish(run: Run, first: int, stop: Stop, console: Any) -> bool:
    console = console or require("rich.console").Console()
    manager = run.training.manager
    with _explaining_failed_writes(run.folder), explaining_lack_of_memory():
        behind = mend_metrics(run.folder.metrics, first, manager.history if manager else ())
        with MetricsLog(run.folder.metrics) as log:
            print_plainly(console, headline(run, first))
            if behind:
                print_plainly(console, behind)
            dead_units = DeadUnitWarning(console)
            dead_units.look(run.training.model)
            with open_progress(console, first, run.config.steps) as progress:
                finished = _train(run, first, stop, log, progress, dead_units)
            log.expect_in_place()
    if finished:
        write_report(run.folder)
    return finished


def _train(run: Run, first: int, stop: Stop, log: MetricsLog, progress: Progress, dead_units: DeadUnitWarning) -> bool:
    config, training = run.config, run.training
    training.model.train()
    density, speed = active_fraction(training), 0.0
    known = {(record["kind"], record["step"]) for record in read_metrics(run.folder.metrics)}
    measured = any(kind == "bytes" for kind, _ in known)
    for step in range(first + 1, config.steps + 1):
        began = time.perf_counter()
        rate = learning_rate(config, step - 1)
        loss, event = train_step(training, run.data.train.batch(step - 1).to(config.device), rate)
        seconds = time.perf_counter() - began
        speed = _smoothed(speed, config.step_tokens / seconds)
        log.write("train", step, loss=loss, lr=rate, seconds=seconds)
        if event is not None:
            log.write("topology", step, event=event_values(event))
            density = active_fraction(training)
            dead_units.look(training.model)
        next_update = training.manager.next_update if training.manager else None
        progress.update(Status(step, loss, speed, density, next_update))
        if not measured:
            log.write("bytes", step, **measure(training, config, run.tokenizer.vocab_size))
            measured = True
        if _after_step(run, step, stop, log):
            return False
    if first == config.steps and ("eval", first) not in known:
        _validate(run, first, log)
    log.write("end", config.steps)
    log.sync()
    return True


def _smoothed(speed: float, now: float) -> float:
    return now if speed == 0 else SPEED_MEMORY * speed + (1 - SPEED_MEMORY) * now


def _after_step(run: Run, step: int, stop: Stop, log: MetricsLog) -> bool:
    """Validate and save where it is time to; returns whether to stop here."""
    config = run.config
    last = step == config.steps
    if last or step % config.eval_every == 0:
        _validate(run, step, log)
    stopping = stop()
    if last or stopping or step % config.save_every == 0:
        save_run(run, step, log)
    return stopping and not last


def _validate(run: Run, step: int, log: MetricsLog) -> None:
    log.write("eval", step, loss=validation_loss(run.training, run.data.validation, run.config))
