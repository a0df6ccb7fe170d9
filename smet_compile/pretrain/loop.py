"""One run from start or checkpoint to the end, so that every interruption can be made good."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smet_compile as smet
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.dead_unit_warning import DeadUnitWarning
from smet_compile.pretrain.extras import require
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.memory import measure
from smet_compile.pretrain.metrics import MetricsLog, cut_back
from smet_compile.pretrain.progress import Progress, Status, open_progress
from smet_compile.pretrain.report import write_report
from smet_compile.pretrain.run import Run, active_fraction, build_run, headline, restore_run, save_run
from smet_compile.pretrain.training import learning_rate, train_step, validation_loss

Stop = Callable[[], bool]
SPEED_MEMORY = 0.9


def _never() -> bool:
    return False


def pretrain(config: RunConfig, path: Path, stop: Stop = _never, console: Any = None) -> bool:
    """Train a new model as `config` says; `path` becomes the run's folder.

    `stop` is asked after each step; where it says yes the run saves and ends early. Returns whether the run
    is finished. Raises ValueError for what is wrong with config, data or folder, before anything is written.
    """
    folder = RunFolder(path)
    folder.expect_free()
    run = build_run(folder, config)
    folder.create(config)
    return _finish(run, 0, stop, console)


def resume(path: Path, stop: Stop = _never, console: Any = None) -> bool:
    """Go on with the run in folder `path` from its last checkpoint, or from the beginning if there is none.

    On the CPU the losses are those of an undisturbed run, bit for bit. A finished run gets its report again.
    """
    folder = RunFolder(path)
    config = folder.open()
    if folder.is_finished():
        write_report(folder)
        return True
    run = build_run(folder, config)
    return _finish(run, restore_run(run), stop, console)


def _finish(run: Run, first: int, stop: Stop, console: Any) -> bool:
    console = console or require("rich.console").Console()
    cut_back(run.folder.metrics, first)
    log = MetricsLog(run.folder.metrics)
    console.print(headline(run, first), soft_wrap=True, highlight=False)
    dead_units = DeadUnitWarning(console)
    dead_units.look(run.training.model)
    try:
        with open_progress(console, first, run.config.steps) as progress:
            finished = _train(run, first, stop, log, progress, dead_units)
    except OSError as error:
        raise ValueError(
            f"{run.folder.path}: could not be written ({error.strerror or error}); "
            f"what was saved before is whole; free some space, then {run.folder.resume_command}"
        ) from error
    finally:
        log.close()
    if finished:
        write_report(run.folder)
    return finished


def _train(run: Run, first: int, stop: Stop, log: MetricsLog, progress: Progress, dead_units: DeadUnitWarning) -> bool:
    config, training = run.config, run.training
    training.model.train()
    density, speed = active_fraction(training), 0.0
    for step in range(first + 1, config.steps + 1):
        began = time.perf_counter()
        rate = learning_rate(config, step - 1)
        loss, event = train_step(training, run.data.train.batch(step - 1).to(config.device), rate)
        seconds = time.perf_counter() - began
        speed = _smoothed(speed, config.step_tokens / seconds)
        log.write("train", step, loss=loss, lr=rate, seconds=seconds)
        if event is not None:
            log.write("topology", step, event=_as_record(event))
            density = active_fraction(training)
            dead_units.look(training.model)
        next_update = training.manager.next_update if training.manager else None
        progress.update(Status(step, loss, speed, density, next_update))
        if _after_step(run, step, stop, log):
            return False
    log.write("end", config.steps)
    return True


def _as_record(event: smet.TopologyEvent) -> dict[str, Any]:
    totals = {"num_dropped": event.num_dropped, "churn_fraction": event.churn_fraction}
    return event.to_dict() | totals


def _smoothed(speed: float, now: float) -> float:
    return now if speed == 0 else SPEED_MEMORY * speed + (1 - SPEED_MEMORY) * now


def _after_step(run: Run, step: int, stop: Stop, log: MetricsLog) -> bool:
    """Measure, validate and save where it is time to; returns whether to stop here."""
    config = run.config
    last = step == config.steps
    if step == 1:
        log.write("bytes", step, **measure(run.training, config, run.tokenizer.vocab_size))
    if last or step % config.eval_every == 0:
        log.write("eval", step, loss=validation_loss(run.training, run.data.validation, config))
    stopping = stop()
    if last or stopping or step % config.save_every == 0:
        save_run(run, step)
    return stopping and not last
