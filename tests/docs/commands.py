"""Runs a command of a page as far as that is cheap, in the folder and environment that its reader would have."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smet_compile.pretrain.cli import make_app
from tests.support.fresh_process import ROOT, run_python

PRETRAIN_CHEAPLY = ["--preset", "nano", "--steps", "4", "--eager", "--device", "cpu", "--eval-windows", "4"]
"""Of an option that is given twice the last counts."""


def run_command(line: str, only_named: bool) -> None:
    """Fails where ``line`` would; ``only_named`` looks whether its options exist instead."""
    program, *arguments = shlex.split(line, comments=True)
    _RUN[program](arguments, only_named)


def _python(arguments: list[str], only_named: bool) -> None:
    if arguments[:2] == ["-m", "smet_compile"]:
        _smet_compile(arguments[2:], only_named)
    elif arguments[0] == "-m":
        _help_of(["-m", arguments[1]], arguments[2:])
    elif Path(arguments[0]).exists():
        run_python(*arguments)
    else:
        _help_of([str(ROOT / arguments[0])], arguments[1:])


def _smet_compile(arguments: list[str], only_named: bool) -> None:
    if only_named or arguments[0] in ("switch", "join") or "--elastic" in arguments:
        arguments = [*arguments, "--help"]  # they need several processes: tests/pretrain/test_elastic.py
    elif arguments[0] == "pretrain" and "--resume" not in arguments:
        arguments = [*arguments, *PRETRAIN_CHEAPLY]
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output


def _help_of(script: list[str], options: list[str]) -> None:
    """Its parser takes the options, and knows each of them; nothing is measured."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [script[-1], *options, "--help"])
        if script[0] == "-m":
            patch.delitem(sys.modules, script[1], raising=False)
            runpy.run_module(script[1], run_name="__main__")
        else:
            patch.syspath_prepend(str(Path(script[0]).parent))
            runpy.run_path(script[0], run_name="__main__")
    assert ended.value.code == 0, f"{script} {options}"


def _torchrun(arguments: list[str], only_named: bool) -> None:
    """Runs our own command as one process; ``tests/pretrain/test_shard.py`` starts it by torchrun."""
    if "smet_compile" in arguments:
        _smet_compile(arguments[arguments.index("smet_compile") + 1 :], only_named)
    else:
        run_python("-m", "torch.distributed.run", *arguments)


def _make(arguments: list[str], only_named: bool) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(arguments) <= set(targets), arguments


def _pip(arguments: list[str], only_named: bool) -> None:
    """Installs nothing: that this project has the extras is what can go wrong."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [name for argument in arguments for name in re.findall(r"\[([\w,]+)\]", argument)]
    assert arguments[0] == "install" and set(",".join(asked).split(",")) - {""} <= set(extras), arguments


def _pytest(arguments: list[str], only_named: bool) -> None:
    """Runs no test: the files are there."""
    paths = [argument for argument in arguments if "/" in argument]
    assert paths and all((ROOT / path.split("::")[0]).exists() for path in paths), arguments


_RUN: dict[str, Callable[[list[str], bool], None]] = {
    "python": _python,
    "smet-compile": _smet_compile,
    "torchrun": _torchrun,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
}
