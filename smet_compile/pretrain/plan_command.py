"""`python -m smet_compile plan PRESET`: what a training run would cost, as a table."""

import sys
from typing import Annotated, Any

from smet_compile.extras import MissingExtraError, require
from smet_compile.presets import PRESETS, VOCABULARY


def add_plan_command(typer: Any, app: Any) -> None:
    """Gives the application `app` of `typer` the command."""
    option = typer.Option

    @app.command("plan")
    def _plan(
        preset: Annotated[str, typer.Argument(help=f"Model shape: {', '.join(PRESETS)}.")],
        density: Annotated[float | None, option(help="Active fraction. Default: 0.3, or what --fits finds.")] = None,
        block: Annotated[str, option(help="1 (single weights), 16 (16x16 tiles), 1x16 (runs).")] = "1",
        batch: Annotated[int | None, option(help="Sequences in a step. Default: by preset.")] = None,
        sequence: Annotated[int | None, option(help="Tokens in a sequence. Default: by preset.")] = None,
        dtype: Annotated[str, option(help="Weights: float32, bfloat16.")] = "float32",
        moment_dtype: Annotated[str, option(help="Moments: float32, bfloat16, int8.")] = "float32",
        eager: Annotated[bool, option("--eager", help="Without torch.compile.")] = False,
        kept_gradients: Annotated[bool, option("--kept-gradients", help="Without updates in backward.")] = False,
        checkpointing: Annotated[bool, option("--checkpointing", help="Of activations.")] = False,
        fits: Annotated[
            str | None, option(help="24GB, 22.5GiB: the largest density that fits; with --density, the largest batch.")
        ] = None,
        distribution: Annotated[str, option(help="uniform, er, erk.")] = "uniform",
        vocabulary: Annotated[int, option(help="Words of the tokenizer.")] = VOCABULARY,
    ) -> None:
        """Say what a training run would cost, beside dense training: bytes by kind, peak memory, operations."""
        options = {
            "density": density, "block_shape": block, "batch": batch, "sequence": sequence, "dtype": dtype,
            "state_dtype": moment_dtype, "compiled": not eager, "fused_update": not eager and not kept_gradients,
            "checkpointing": checkpointing, "fits": fits, "distribution": distribution, "vocabulary": vocabulary,
        }  # fmt: skip
        try:
            _show(preset, options)
        except (ValueError, MissingExtraError) as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)


def _show(preset: str, options: dict[str, Any]) -> None:
    import smet_compile as smet
    from smet_compile.pretrain.config import parse_block

    options["block_shape"] = parse_block(options["block_shape"], "--block")
    _print(smet.plan(preset, **options))


def _print(plan: Any) -> None:
    """As a table of the terminal's width, plain text where the output is no terminal."""
    if not sys.stdout.isatty():
        print(plan)
        return
    table = require("rich.table").Table("", "formula", title=plan.title, title_justify="left")
    for heading in ("sparse", "dense", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows():
        table.add_row(*row)
    console = require("rich.console").Console()
    console.print(table)
    console.print(plan.legend(), highlight=False)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
