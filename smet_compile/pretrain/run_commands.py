"""Builds the commands that look at runs or take something from them: `inspect`, `compare`, `generate`, `export`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from smet_compile.presets import MissingExtraError
from smet_compile.pretrain.comparison import differences, draw_comparison, expect_image, read_runs, rows_of
from smet_compile.pretrain.config import check_number, from_text
from smet_compile.pretrain.console import end_with_error, print_line, print_table
from smet_compile.pretrain.generation import generate_text
from smet_compile.pretrain.inspection import inspect_run, print_inspection
from smet_compile.pretrain.saved_run import FORMATS, export_run, open_run


def add_run_commands(app: typer.Typer) -> None:
    """Adds the commands to the typer application."""
    run_folder = typer.Argument(help="Folder of the run.", metavar="RUN", show_default=False)

    @app.command("inspect")
    def inspect(
        run: Annotated[Path, run_folder],
        wide: Annotated[bool, typer.Option("--wide", metavar="", help="All columns, a line for each weight.")] = False,
    ) -> None:
        """Look inside a run: dead units, live paths, churn, ages; maps as PNG in its folder."""
        with _one_line_errors():
            found, images = inspect_run(run)
            print_inspection(found, wide)
            print(f"Plots in {run}: {', '.join(images)}")

    @app.command("compare")
    def compare(
        runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...", show_default=False)],
        out: Annotated[Path, typer.Option(help="The plot, a PNG.", metavar="FILE")] = Path("comparison.png"),
    ) -> None:
        """Set runs side by side: a table, the options in which they differ, and one plot of their losses."""
        with _one_line_errors():
            expect_image(out)
            found = read_runs(runs)
            print_table(rows_of(found))
            for line in differences(found):
                print_line(line)
            draw_comparison(found, out)
            print(f"Plot: {out}")

    @app.command("generate")
    def generate(
        run: Annotated[Path, run_folder],
        prompt: Annotated[str, typer.Argument(help="Text to go on with.", show_default=False)] = "",
        tokens: Annotated[str, typer.Option(help="Tokens to write at most.", metavar="INTEGER")] = "200",
        temperature: Annotated[str, typer.Option(help="0: the likeliest token each time.", metavar="FLOAT")] = "0.8",
        seed: Annotated[str, typer.Option(help="Seed of what is drawn.", metavar="INTEGER")] = "0",
        device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    ) -> None:
        """Write text with the model of a run."""
        with _one_line_errors():
            length = int(check_number("--tokens", from_text(tokens, int), int, at_least=1))
            heat = check_number("--temperature", from_text(temperature, float), float, at_least=0)
            number = int(check_number("--seed", from_text(seed, int), int, at_least=0))
            opened = open_run(run, device)
            generate_text(opened, prompt, tokens=length, temperature=heat, seed=number, show=_show)
            print()

    @app.command("export")
    def export(
        run: Annotated[Path, run_folder],
        dest: Annotated[Path, typer.Argument(help="New folder.", metavar="DEST", show_default=False)],
        kind: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = "dense",
    ) -> None:
        """Write the model of a run, and its tokenizer, as a folder that from_pretrained loads, or load_compact."""
        with _one_line_errors():
            export_run(run, dest, kind)
            load = "AutoModelForCausalLM.from_pretrained" if kind == "dense" else "smet_compile.load_compact"
            print(f'Written. Load it: {load}("{dest}")')


def _show(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, MissingExtraError) as error:
        end_with_error(error)
