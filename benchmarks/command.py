"""Provides what the commands share: options, the head of the record, running the sections."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks import parts
from benchmarks.measuring import processor
from benchmarks.settings import Settings
from benchmarks.tables import Table
from smet_compile.ops.choose import forced_kernel

Section = Callable[[Settings], list[Table]]
ENOUGH_REPEATS = 7
DEFAULT_REPEATS = 9


def options(description: str, sections: Mapping[str, Section]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", choices=tuple(sections), action="append", help="a section; may be given repeatedly")
    parser.add_argument("--repeats", type=int, default=DEFAULT_REPEATS, help="pairs of each measurement")
    parser.add_argument("--out", type=Path, help="the file to write the tables to, besides printing them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether all runs, no number for the record")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {args.repeats}")
    return args


def run(title: str, command: str, sections: Mapping[str, Section], args: argparse.Namespace, device: str) -> None:
    """Measures the requested sections; prints and writes each as it comes. Exits with an error if one failed."""
    settings = Settings(args.repeats, args.quick, torch.device(device))
    record = [head(title, command, settings)]
    print(record[0], flush=True)
    failed = []
    for name in args.only or sections:
        start = time.perf_counter()
        tables, error = _measured(name, sections[name], settings)
        failed += [name] if error else []
        record += tables
        print("\n".join(tables), flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if args.out:
            parts.replace_cpu_part(args.out, "\n".join(record))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _measured(name: str, section: Section, settings: Settings) -> tuple[list[str], Exception | None]:
    """Returns the section's tables as markdown, or a note that it failed, and the error."""
    try:
        return [table.markdown() for table in section(settings)], None
    except Exception as error:
        traceback.print_exc()
        return [f"### {name}\n\nNot measured: it failed with {type(error).__name__}.\n"], error


def head(title: str, command: str, settings: Settings) -> str:
    """Returns a text on what, when and how the measurements were taken."""
    today = datetime.date.today().isoformat()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {_triton()}"
    lines = [f"# {title}", "", f"Written by `{command}` on {today}. {_machine(settings)}. {versions}.", ""]
    lines.append(
        f"Each ratio is of two things measured side by side in one run, in turns (A B C A B C ...): the median of "
        f'{settings.repeats} turns, the least and the largest. A column "met" compares the median with the target.'
    )
    if forced_kernel():
        lines += ["", f"`SMET_COMPILE_KERNEL={forced_kernel()}` forced the kernel wherever it could."]
    if settings.quick or settings.repeats < ENOUGH_REPEATS:
        lines += ["", "**Not for the record**: tiny sizes or too few pairs."]
    return "\n".join(lines) + "\n"


def _machine(settings: Settings) -> str:
    where = f"{processor()}, {torch.get_num_threads()} threads"
    if settings.device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {where}"
    return f"{where}, {torch.backends.cpu.get_cpu_capability()}"


def _triton() -> str:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"
