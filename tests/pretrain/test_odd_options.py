"""An odd value on the command line gives exit code 2 and one line that names the option; nothing is written."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.config import OPTION_TYPES

LONG = "9" * 5000
NO_INTEGER = ["nan", "inf", "-1", "1e3", "1_0", "²", "１６", "", "abc", "0x10", "1.0", str(2**63), "1" + "0" * 30, LONG,
              "[/x]", " 5", "5 ", "--5", "+", "5\n"]  # fmt: skip
NO_NUMBER = ["nan", "inf", "-inf", "1_0", "²", "１", "", "abc", "0x10", "1,5", "[/x]", "1e999", " 1", ".", "e5", LONG]
FEW = ["nan", "-1", "1_0", "１６", "1" + "0" * 30]
OUT_OF_RANGE = {
    "density": ["0", "-1", "1.5", "1e300"], "lr": ["0", "-1e-3"], "weight_decay": ["-1"],
    "lr_density_exponent": ["5000", "-5000", "1e308"], "drop_fraction": ["-1", "1", "2"],
    "final_drop_fraction": ["-1", "1", "2"], "sequence": ["0", "1"],
    **{name: ["0"] for name in ("steps", "batch", "accumulate", "every", "save_every", "eval_every", "eval_windows")},
}  # fmt: skip
NO_TEXT = {
    "preset": ["", "[/x]", "NANO"],
    "method": ["", "[/x]"],
    "dtype": ["", "float64", "[/x]"],
    "moment_dtype": ["", "float16"],
    "block": [
        "",
        "0",
        "1x",
        "x1",
        "x",
        "16x16x16",
        "9" * 20,
        "-1",
        "1x0",
        "²",
        "１６",
        "1_6",
        "16 ",
        "70000",
        "[/x]",
        "1X2",
    ],
    "device": ["", "meta", "cuda:99", "xla", "cpu:", "abacus", "[/x]", "-1", "cuda:-1", "cuda:9999999999"],
    "data": ["", "text:", "hf:", "text:here", "text:binary", "text:none*", "csv:x", "text:[/x]", "text:" + "x" * 300],
    "tokenizer": ["", "nope", "[/x]", "x" * 5000],
    "out": ["", "binary", "binary/x", "x" * 300, "/proc/x", "/dev/null"],
    "resume": ["", "binary", "binary/x", "here", "none", "[/x]", "x" * 300],
}


def odd_values() -> Iterator[tuple[str, str]]:
    numbers = {"steps": NO_INTEGER, "seed": NO_INTEGER, "lr": NO_NUMBER, "lr_density_exponent": NO_NUMBER}
    for name, kind in OPTION_TYPES.items():
        odd = numbers.get(name, FEW if kind is int else ["nan", "inf", "1_0", "１"] if kind is float else [])
        yield from ((name, text) for text in [*odd, *OUT_OF_RANGE.get(name, [])])
    for name, texts in NO_TEXT.items():
        yield from ((name, text) for text in texts)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a working directory with a text, a binary file and a folder."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps " * 3000)
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_of_two_hundred_is_one_line_that_names_the_option(here: Path) -> None:
    app, runner, values = make_app(), CliRunner(), list(odd_values())
    before = sorted(here.rglob("*"))
    assert len(values) > 200
    wrong = []
    for name, text in values:
        option = "--" + name.replace("_", "-")
        small = ["--preset", "nano", "--device", "cpu", "--eager", "--data", "text:text.txt", "--out", "run"]
        result = runner.invoke(app, ["pretrain", *(small if name != "resume" else []), option, text])
        one_line = re.fullmatch(rf"error: {option}: expected .*\n", result.stderr)
        if result.exit_code != 2 or not one_line or sorted(here.rglob("*")) != before:
            wrong.append((option, text[:40], result.exit_code, result.stderr[-200:], result.exception))
    assert wrong == []


PLANNED: dict[str, list[str]] = {
    "density": NO_NUMBER, "batch": NO_INTEGER, "sequence": FEW, "vocabulary": FEW, "block": NO_TEXT["block"],
    "tokens": NO_NUMBER, "sparse_efficiency": NO_NUMBER,
}  # fmt: skip


def test_plan_names_its_options_too() -> None:
    app, runner = make_app(), CliRunner()
    for field, texts in PLANNED.items():
        name = field.replace("_", "-")
        for text in texts:
            if text in ("nan", "inf", "-inf", "1e999", "-1"):
                continue  # numbers, which `plan` itself refuses
            result = runner.invoke(app, ["plan", "nano", f"--{name}", text])
            assert (result.exit_code, result.stdout) == (2, ""), (name, text, result.exception)
            assert re.fullmatch(rf"error: --{name}: expected .*\n", result.stderr), result.stderr


@pytest.mark.parametrize("error", [OverflowError("a [/x] too large"), ValueError("one\ntwo  three")])
def test_plan_shows_an_error_as_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("smet_compile.plan", fail)
    result = CliRunner().invoke(make_app(), ["plan", "nano"])
    assert (result.exit_code, result.stderr) == (2, f"error: {' '.join(str(error).split(chr(10)))}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequence", "1000000000000"], "--sequence: expected at most 39000"),
        (["--batch", "1000000000"], "--batch x --sequence: expected the logits of a micro-batch to fit into"),
        (
            ["--accumulate", "1000000000000"],
            "--batch x --accumulate x --sequence: expected the tokens of a step to fit",
        ),
        (["--block", "65536"], "--block: expected one block of each sparse weight to fit into"),
        (
            ["--data", "hf:here", "--eval-windows", "1000000000000"],
            "--eval-windows x --sequence: expected the held-out",
        ),
    ],
)
def test_a_need_beyond_the_memory_is_foreseen(options: list[str], message: str, here: Path) -> None:
    small = ["--preset", "nano", "--device", "cpu", "--eager", "--data", "text:text.txt", "--out", "runs/run"]
    result = CliRunner().invoke(make_app(), ["pretrain", *small, *options])
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {message}"), result.stderr
    assert not os.path.exists("runs")
