"""The command line: one command whose options are the fields of `RunConfig`."""

import inspect
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from smet_compile.pretrain.config import KINDS, RunConfig, resolve
from smet_compile.pretrain.console import end_with_error, print_any_character
from smet_compile.pretrain.extras import MissingExtraError, require
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.inspect_command import add_inspect_command
from smet_compile.pretrain.interrupt import catch_interrupt
from smet_compile.pretrain.option_values import checked, from_text, option_name
from smet_compile.pretrain.plan_command import add_plan_command

INTERRUPTED = 130
METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT", bool: None}


def main() -> None:
    """Entry point of `python -m smet_compile` and of the `smet-compile` script."""
    try:
        make_app()()
    except MissingExtraError as error:
        sys.exit(f"error: {error}")


def make_app() -> Any:
    """The typer application."""
    typer = require("typer")
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def _about() -> None:
        """Sparse training with smet_compile."""
        print_any_character()

    app.command("pretrain")(_with_options(typer, _command))
    add_inspect_command(typer, app)
    add_plan_command(typer, app)
    return app


def _with_options(typer: Any, command: Any) -> Any:
    """Give `command(**options)` the signature that typer reads: two paths and an option per config field.

    Numbers come as text, so that one rule reads them and one line says what is wrong with them.
    """
    paths = {
        "out": "Folder of the new run. Default: runs/PRESET-METHOD.",
        "resume": "Go on with the run in this folder; takes no other option.",
    }
    options: dict[str, tuple[Any, str]] = {name: ("PATH", text) for name, text in paths.items()}
    options |= {item.name: (METAVARS[KINDS[item.name]], item.metadata["help"]) for item in fields(RunConfig)}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                (str if metavar else bool) | None, typer.Option(help=text, show_default=False, metavar=metavar)
            ],
        )
        for name, (metavar, text) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _command(**options: Any) -> None:
    """Pre-train a LLaMA with sparse weights; metrics, checkpoints, plots and report.md go into a folder."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        folder, finished = _run(given)
        from smet_compile.pretrain.report import summarize

        done = f"Done: {summarize(folder)}.\nReport: {folder.report}" if finished else ""
    except (ValueError, OSError, MissingExtraError) as error:
        end_with_error(error)
    if not finished:
        print(f"Stopped and saved. Go on with:\n{folder.resume_command}")
        sys.exit(INTERRUPTED)
    print(done)


def _run(given: dict[str, Any]) -> tuple[RunFolder, bool]:
    resumed, out = (_path(name, given.pop(name, None)) for name in ("resume", "out"))
    if resumed is not None and (given or out):
        names = ", ".join(option_name(name) for name in ([*given, "out"] if out else given))
        raise ValueError(f"--resume: expected no other option (the run keeps its own), got {names}; leave them out")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if resumed is not None:
        folder = RunFolder(resumed)
        folder.open()
    else:
        config = resolve(**{name: from_text(option_name(name), value, KINDS[name]) for name, value in given.items()})
        folder = RunFolder(out or Path("runs") / f"{config.preset}-{config.method}")
        folder.expect_free()
    from smet_compile.pretrain.loop import pretrain, resume

    with catch_interrupt() as interrupt:
        if resumed is not None:
            return folder, resume(folder.path, interrupt)
        return folder, pretrain(config, folder.path, interrupt)


def _path(name: str, text: str | None) -> Path | None:
    return None if text is None else Path(checked(option_name(name), text, str))
