"""Builds the commands `switch` and `join`, which change the ranks of a run that goes on."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from smet_compile.format.arguments import described
from smet_compile.presets import MissingExtraError
from smet_compile.pretrain.console import end_with_error
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.loop import catch_interrupt


def add_elastic_commands(app: typer.Typer) -> None:
    """Adds both commands to the typer application."""
    folder = typer.Argument(help="Folder of a run that was begun with --elastic.", metavar="RUN", show_default=False)
    layout = typer.Argument(help='Such as "fsdp=4", "hsdp=2,fsdp=2" or "fsdp=2,tp=2".', show_default=False)
    ranks = typer.Option(help="Which processes, such as 0,1,4,5. Default: the first ones.", show_default=False)
    seconds = typer.Option(help="How long to wait for the answer.")

    @app.command("switch")
    def switch(
        run: Annotated[str, folder],
        layout: Annotated[str, layout],
        ranks: Annotated[str | None, ranks] = None,
        seconds: Annotated[float, seconds] = 300.0,
    ) -> None:
        """Change how a run lies on its ranks, while it goes on."""
        from smet_compile.pretrain.elastic import switch_run

        try:
            print(switch_run(RunFolder(Path(run)), layout, _numbers(ranks), seconds))
        except (ValueError, TimeoutError, MissingExtraError) as error:
            end_with_error(error)

    @app.command("join")
    def join(run: Annotated[str, folder]) -> None:
        """Start one more process for a run that goes on; it waits until a switch uses it."""
        from smet_compile.pretrain.elastic import join_run

        try:
            with catch_interrupt() as interrupt:
                join_run(RunFolder(Path(run)), interrupt)
        except (ValueError, OSError, MissingExtraError) as error:
            end_with_error(error)
        sys.exit(0)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 9 for part in parts):
        raise ValueError(f"--ranks: expected numbers such as 0,1,4,5, got {described(text)}")
    return [int(part) for part in parts]
