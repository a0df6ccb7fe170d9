"""Builds the command line: `pretrain`, whose options are the fields of `RunConfig`, `plan`, and commands for runs."""

import inspect
import os
import platform
import sys
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import smet_compile as smet
from smet_compile.format.arguments import described, one_of
from smet_compile.presets import PRESETS, VOCABULARY, MissingExtraError, find_preset
from smet_compile.pretrain.config import (
    MOMENT_DTYPES,
    OPTION_TYPES,
    OPTIONS_OF_ARGUMENTS,
    RunConfig,
    check_number,
    check_text,
    from_text,
    option_name,
    parse_block,
    resolve,
)
from smet_compile.pretrain.console import (
    FAILED,
    as_cell,
    end_with_error,
    print_any_character,
    print_line,
    print_plainly,
)
from smet_compile.pretrain.elastic_commands import add_elastic_commands
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.loop import catch_interrupt, pretrain, resume
from smet_compile.pretrain.model_config import build_from_config, read_model_config
from smet_compile.pretrain.option_errors import name_options
from smet_compile.pretrain.report import summarize
from smet_compile.pretrain.run_commands import add_run_commands
from smet_compile.pretrain.unused_options import unused_options
from smet_compile.pretrain.world import is_first_process, is_reporter

INTERRUPTED = 130
FIRST_IN_PANEL = {
    "out": "Folder",
    "preset": "Model",
    "method": "Sparsity",
    "steps": "Training",
    "every": "Topology updates",
    "data": "Text",
    "dtype": "Numbers and processes",
    "seed": "Record",
}
"""Panels of the help by the first of their options, which follow in the order of `RunConfig`."""
NO_VALUE = ""
"""The metavar of a flag."""
METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT", bool: NO_VALUE}
PLANNED_DTYPES = ("float32", "bfloat16", "float16", "float64")
PLAN_OPTIONS: tuple[tuple[str, str | None, str | bool | None, str], ...] = (
    ("density", "FLOAT", None, "Active fraction. Default: 0.3, or what --fits finds."),
    ("block", None, "1", "1 (single weights), 16 (16x16 tiles), 1x16 (runs)."),
    ("batch", "INTEGER", None, "Sequences in a step. Default: by preset."),
    ("sequence", "INTEGER", None, "Tokens in a sequence. Default: by preset."),
    ("model", None, None, "config.json of any Hugging Face causal model: PRESET then gives batch and sequence alone."),
    ("dtype", None, "float32", f"Weights: {', '.join(PLANNED_DTYPES)}."),
    ("moment_dtype", None, "float32", f"Moments: {', '.join(MOMENT_DTYPES)}."),
    ("optimizer", None, "adamw", "Whose moments: adamw, lion, sgd, scale."),
    ("eager", None, False, "Without torch.compile."),
    ("kept_gradients", None, False, "Without updates in backward."),
    ("checkpointing", None, False, "Of activations."),
    ("fits", None, None, "24GB, 22.5GiB: the largest density that fits; with --density, the largest batch."),
    ("distribution", None, "uniform", "uniform, er, erk."),
    ("vocabulary", "INTEGER", str(VOCABULARY), "Vocabulary size; pretrain without --tokenizer has 256."),
    ("density_schedule", None, None, "1000:0.5,2000:0.25: density stages, each STEP:DENSITY."),
    ("mesh", None, None, "dp=64, dp=8,replicate=2 or dp=8,tp=4: what each rank stores and sends."),
    ("tokens", "FLOAT", None, "Tokens of the run, 20e9: predicted loss beside a dense model of as many bytes."),
    (
        "sparse_efficiency",
        "FLOAT",
        None,
        "Rate of sparse products over that of dense ones, for --tokens. Default: 0.4 for tiles of 64 in 16 bits.",
    ),
)
PLANNED_NUMBERS: dict[str, tuple[type, dict[str, float]]] = {
    "density": (float, {"above": 0, "at_most": 1}),
    "batch": (int, {"at_least": 1}),
    "sequence": (int, {"at_least": 1}),
    "vocabulary": (int, {"at_least": 1}),
    "tokens": (float, {}),
    "sparse_efficiency": (float, {}),
}
"""Numbers among the options of `plan`, with the bounds that need no advice of their own."""
OF_PLANNED_ARGUMENTS = {name: option_name(name) for name, *_ in PLAN_OPTIONS} | {
    "model": "PRESET", "block_shape": "--block", "compiled": "--eager", "fused_update": "--kept-gradients",
}  # fmt: skip
"""Options of `plan` by the arguments of the library that they become."""


def main() -> None:
    """Runs `python -m smet_compile` and the `smet-compile` script."""
    make_app()()


def make_app() -> typer.Typer:
    """Returns the application."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def _about(
        version: Annotated[
            bool, typer.Option("--version", help="Print versions.", callback=_version, is_eager=True)
        ] = False,
    ) -> None:
        """Sparse training with smet_compile."""
        print_any_character()

    app.command("pretrain")(_with_options(_pretrain, _pretrain_parameters()))
    add_run_commands(app)
    add_elastic_commands(app)
    app.command("plan")(_with_options(_plan, _plan_parameters()))
    return app


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"smet-compile {smet.__version__}, Python {platform.python_version()}, torch {version('torch')}")
        raise typer.Exit


def _with_options(command: Any, parameters: list[inspect.Parameter]) -> Any:
    """Gives `command(**options)` the signature that typer reads.

    Numbers come as text, so that one rule reads them and one line says what is wrong with them.
    """
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, kind: Any, declared: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def _pretrain_parameters() -> list[inspect.Parameter]:
    """Returns two paths and an option per field of `RunConfig`."""
    paths = {
        "out": "Folder of the new run. Default: runs/SHAPE-METHOD.",
        "resume": "Go on with the run in this folder; takes no other option but --shard.",
    }
    declared: dict[str, tuple[Any, str]] = {name: ("PATH", text) for name, text in paths.items()}
    declared |= {item.name: (METAVARS[OPTION_TYPES[item.name]], item.metadata["help"]) for item in fields(RunConfig)}
    parameters, panel = [], ""
    for name, (metavar, text) in declared.items():
        panel = FIRST_IN_PANEL.get(name, panel)
        flag = [option_name(name)] if metavar == NO_VALUE else []  # without it, typer adds a --no- beside it
        option = typer.Option(*flag, help=text, show_default=False, metavar=metavar, rich_help_panel=panel)
        parameters.append(_parameter(name, (bool if flag else str) | None, option))
    return parameters


def _pretrain(**options: Any) -> None:
    """Pre-train a language model with sparse weights; metrics, checkpoints, plots and report.md go into a folder."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        folder, finished, prints = _run(given)
        done = f"Done: {summarize(folder)}.\nReport: {folder.report}" if finished and prints else ""
    except (ValueError, OSError, MissingExtraError) as error:
        if not is_reporter(error):
            sys.exit(FAILED)
        end_with_error(name_options(error, OPTIONS_OF_ARGUMENTS))
    if not finished:
        if prints:
            print(f"Stopped and saved. Go on with:\n{folder.resume_command}")
        sys.exit(INTERRUPTED)
    if prints:
        print(done)


def _run(given: dict[str, Any]) -> tuple[RunFolder, bool, bool]:
    """Returns the run's folder, whether it is finished, and whether this process is the one that says so."""
    resumed, out = (_path(name, given.pop(name, None)) for name in ("resume", "out"))
    others = [name for name in given if name != "shard"] + ["out"] * (out is not None)
    if resumed is not None and others:
        names = ", ".join(map(option_name, others))
        raise ValueError(
            f"--resume: expected no other option but --shard (the run keeps its own), got {names}; leave them out"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_first_process():
        warnings.simplefilter("ignore")
    if resumed is not None:
        folder = RunFolder(resumed)
        config = folder.open()
    else:
        config = resolve(**{name: from_text(value, OPTION_TYPES[name]) for name, value in given.items()})
        folder = RunFolder(out or Path("runs") / f"{config.shape_name}-{config.method}")
        if not config.elastic:
            folder.expect_free()
        for line in unused_options(config, given) if is_first_process() else ():
            print_line(line)
    with catch_interrupt() as interrupt:
        if config.elastic:
            from smet_compile.pretrain.elastic import pretrain_elastic

            return folder, *pretrain_elastic(config, folder, interrupt)
        if resumed is not None:
            return folder, resume(folder.path, interrupt, shard=given.get("shard")), is_first_process()
        return folder, pretrain(config, folder.path, interrupt), is_first_process()


def _path(name: str, text: str | None) -> Path | None:
    return None if text is None else Path(check_text(option_name(name), text))


def _plan_parameters() -> list[inspect.Parameter]:
    """Returns the preset as an argument and an option per row of `PLAN_OPTIONS`; those that are False are flags."""
    models = typer.Argument(help=f"Model shape: {', '.join(PRESETS)}.")
    parameters = [_parameter("preset", str, models, inspect.Parameter.empty)]
    for name, metavar, default, text in PLAN_OPTIONS:
        flag = [option_name(name)] if default is False else []
        kind = bool if flag else str if default else str | None
        option = typer.Option(*flag, help=text, metavar=NO_VALUE if flag else metavar)
        parameters.append(_parameter(name, kind, option, default))
    return parameters


def _plan(preset: str, **options: Any) -> None:
    """Say what a training run would cost, beside dense training: bytes by kind, peak memory, operations."""
    compiled, kept_gradients = not options.pop("eager"), options.pop("kept_gradients")
    try:
        for name, (kind, bounds) in PLANNED_NUMBERS.items():
            if options[name] is not None:
                options[name] = check_number(option_name(name), from_text(options[name], kind), kind, **bounds)
        one_of("--dtype", options["dtype"], PLANNED_DTYPES)
        one_of("--moment-dtype", options["moment_dtype"], tuple(MOMENT_DTYPES))
        plan = smet.plan(
            _model_to_plan(preset, options.pop("model"), options),
            block_shape=parse_block(options.pop("block"), "--block"),
            moment_dtype=options.pop("moment_dtype"),
            density_schedule=_stages(options.pop("density_schedule")),
            mesh=_mesh(options.pop("mesh")),
            compiled=compiled,
            fused_update=compiled and not kept_gradients,
            **options,
        )
        _print_plan(plan)
    except (ValueError, OverflowError, MissingExtraError) as error:
        end_with_error(name_options(error, OF_PLANNED_ARGUMENTS))


def _model_to_plan(preset: str, config: str | None, options: dict[str, Any]) -> nn.Module | str:
    """Returns the preset's name, or a model of the shape in the file `config`, for which it fills in `options`."""
    defaults = find_preset(preset, "PRESET")
    if config is None:
        return preset
    options["sequence"] = options["sequence"] or defaults.sequence
    if options["fits"] is None or options["density"] is None:  # else the largest batch is looked for
        options["batch"] = options["batch"] or defaults.batch
    sizes = options["vocabulary"], options["sequence"], getattr(torch, options["dtype"])
    return build_from_config(read_model_config(check_text("--model", config)), *sizes, device="meta")


def _stages(text: str | None) -> list[tuple[int, float]] | None:
    """Reads density stages from a text such as "1000:0.5,2000:0.25"."""
    if text is None:
        return None
    option = option_name("density_schedule")
    pairs = [pair.partition(":") for pair in check_text(option, text).split(",")]
    return [
        (int(check_number(option, from_text(step, int), int)), check_number(option, from_text(density, float), float))
        for step, _, density in pairs
    ]


def _mesh(text: str | None) -> dict[str, int] | None:
    """Reads a mesh from a text such as "dp=8,replicate=2"."""
    if text is None:
        return None
    option = option_name("mesh")
    pairs = [pair.partition("=") for pair in check_text(option, text).split(",")]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"{option}: expected each dimension once, got {described(text)}; pass dp=8,replicate=2, say")
    return {name: int(check_number(option, from_text(size, int), int, at_least=1)) for name, _, size in pairs}


def _print_plan(plan: smet.Plan) -> None:
    """Prints a table of the terminal's width, and plain text where the output is no terminal."""
    if not sys.stdout.isatty():
        print(plan)
        return
    title = as_cell(plan.title, "table.title")
    table = Table("", "formula", title=title, title_justify="left")
    for heading in ("sparse", "dense", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows():
        table.add_row(*map(as_cell, row))
    console = Console()
    console.print(table)
    print_plainly(console, plan.legend())
    if plan.stages:
        print_plainly(console, plan.stage_table())
    if plan.per_rank:
        print_plainly(console, plan.rank_table())
    if plan.equal_bytes:
        print_plainly(console, plan.equal_bytes_table())
    for warning in plan.warnings:
        console.print(as_cell("warning: ", "yellow"), end="")
        print_plainly(console, warning)
