"""`python -m smet_compile plan PRESET`: what a training run would cost, as a table."""

import sys
from typing import Annotated, Any

from smet_compile.extras import MissingExtraError, require
from smet_compile.presets import PRESETS, VOCABULARY
from smet_compile.pretrain.console import as_cell, end_with_error, print_plainly
from smet_compile.pretrain.option_values import from_text, option_name

NUMBERS = {"density": float, "batch": int, "sequence": int, "vocabulary": int}


def add_plan_command(typer: Any, app: Any) -> None:
    """Gives the application `app` of `typer` the command."""
    option = typer.Option

    @app.command("plan")
    def _plan(
        preset: Annotated[str, typer.Argument(help=f"Model shape: {', '.join(PRESETS)}.")],
        density: Annotated[
            str | None, option(metavar="FLOAT", help="Active fraction. Default: 0.3, or what --fits finds.")
        ] = None,
        block: Annotated[str, option(help="1 (single weights), 16 (16x16 tiles), 1x16 (runs).")] = "1",
        batch: Annotated[str | None, option(metavar="INTEGER", help="Sequences in a step. Default: by preset.")] = None,
        sequence: Annotated[
            str | None, option(metavar="INTEGER", help="Tokens in a sequence. Default: by preset.")
        ] = None,
        dtype: Annotated[str, option(help="Weights: float32, bfloat16.")] = "float32",
        moment_dtype: Annotated[str, option(help="Moments: float32, bfloat16, int8.")] = "float32",
        eager: Annotated[bool, option("--eager", help="Without torch.compile.")] = False,
        kept_gradients: Annotated[bool, option("--kept-gradients", help="Without updates in backward.")] = False,
        checkpointing: Annotated[bool, option("--checkpointing", help="Of activations.")] = False,
        fits: Annotated[
            str | None, option(help="24GB, 22.5GiB: the largest density that fits; with --density, the largest batch.")
        ] = None,
        distribution: Annotated[str, option(help="uniform, er, erk.")] = "uniform",
        vocabulary: Annotated[str, option(metavar="INTEGER", help="Words of the tokenizer.")] = str(VOCABULARY),
    ) -> None:
        """Say what a training run would cost, beside dense training: bytes by kind, peak memory, operations."""
        options = {
            "density": density, "block_shape": block, "batch": batch, "sequence": sequence, "dtype": dtype,
            "moment_dtype": moment_dtype, "compiled": not eager, "fused_update": not eager and not kept_gradients,
            "checkpointing": checkpointing, "fits": fits, "distribution": distribution, "vocabulary": vocabulary,
        }  # fmt: skip
        try:
            _show(preset, options)
        except (ValueError, OverflowError, MissingExtraError) as error:
            end_with_error(error)


def _show(preset: str, options: dict[str, Any]) -> None:
    import smet_compile as smet
    from smet_compile.pretrain.config import parse_block

    for name, kind in NUMBERS.items():
        if options[name] is not None:
            options[name] = from_text(option_name(name), options[name], kind)
    options["block_shape"] = parse_block(options["block_shape"], "--block")
    _print(smet.plan(preset, **options))


def _print(plan: Any) -> None:
    """As a table of the terminal's width, plain text where the output is no terminal."""
    if not sys.stdout.isatty():
        print(plan)
        return
    title = as_cell(plan.title, "table.title")
    table = require("rich.table").Table("", "formula", title=title, title_justify="left")
    for heading in ("sparse", "dense", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows():
        table.add_row(*map(as_cell, row))
    console = require("rich.console").Console()
    console.print(table)
    print_plainly(console, plan.legend())
    for warning in plan.warnings:
        console.print(as_cell("warning: ", "yellow"), end="")
        print_plainly(console, warning)
