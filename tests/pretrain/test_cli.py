import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.loop import pretrain
from tests.pretrain.runs import SMALL_MODEL, command_line, finish, in_new_process, losses, small_config, write_text

pytestmark = SMALL_MODEL

SMALL = ["--preset", "nano", "--steps", "4", "--every", "1", "--device", "cpu", "--eager"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["pretrain", *map(str, arguments)])


def test_a_run_by_options(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    result = call(*SMALL, "--data", data, "--block", "1x16", "--density", 0.4, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "step 4/4  loss " in result.output
    assert "Done: validation perplexity " in result.output and "dense AdamW: 16.00" in result.output
    assert f"Report: {tmp_path}/run/report.md" in result.output
    result = call("--resume", tmp_path / "run")
    assert result.exit_code == 0 and "step 4/4" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "{}/missing"], "--resume: expected the folder of a run"),
        (["--resume", "{}"], "--resume: expected the folder of a run"),
        (["--resume", "{}", "--lr", "1"], "--resume: expected no other option .* got --lr"),
        (["--resume", "{}", "--out", "x"], "--resume: expected no other option .* got --out"),
        ([*SMALL, "--data", "text:{}/*.md"], "--data: expected files that match"),
        ([*SMALL, "--data", "text:{}/text/*.txt", "--sequence", "9999999"], "--sequence: expected at most"),
        (["--preset", "huge"], "--preset: expected one of"),
        (["--method", "magic"], "--method: expected one of"),
        (["--data", "csv:x"], "--data: expected stdlib"),
        ([*SMALL, "--data", "text:{}/text/*.txt", "--device", "xpu:99"], "--device: expected a device of this machine"),
        (["--min-age", "1000"], "--min-age: expected at most 125 steps, .*; lower --min-age or --drop-fraction$"),
        (["--pattern", "2:5x"], "--pattern: expected none, fan_in, or N:M with 0 < N < M, got '2:5x'; pass 2:4"),
        (
            [*SMALL, "--data", "text:{}/text/*.txt", "--pattern", "2:4", "--density", "0.3"],
            '--density: expected 0.5, the density of --pattern "2:4", got 0.3',
        ),
        (["--tokenizer", "{}/none"], "--tokenizer: expected bytes or an existing path"),
        ([*SMALL, "--data", "text:{}/text/*.txt", "--density", "0.95"], "drop"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    out = [] if "--out" in arguments or "--resume" in arguments else ["--out", tmp_path / "run"]
    result = call(*(argument.replace("{}", str(tmp_path)) for argument in arguments), *out)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            "--method dense --density 0.3 --grow gradient --block 64 --moment-dtype int8",
            "note: --density, --block, --every, --grow, --moment-dtype have no effect with --method dense",
        ),
        ("--method static --grow gradient", "note: --grow has no effect with --method static"),
        ("--block 4 --min-age 1", "note: --min-age has no effect where the topology stays (--schedule none)"),
        ("--schedule constant --final-drop-fraction 0", "note: --final-drop-fraction has no effect with --schedule"),
        ("--method set-naive --block-warmup 3", "note: --block-warmup has no effect with --method set-naive"),
        ("--column words", "note: --column has no effect without hf: data"),
        ("--shard tp=2", "--shard tp=2: one process trains alone, since torchrun did not start it"),
    ],
)
def test_options_without_effect_are_named(options: str, note: str, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    result = call(*SMALL, "--data", data, "--out", tmp_path / "run", *options.split())
    found = [line for line in result.stdout.splitlines() if "no effect" in line or "alone" in line]
    assert result.exit_code == 0 and len(found) == 1 and found[0].startswith(note), result.output


def test_options_with_an_effect_bring_no_note(tmp_path: Path) -> None:
    options = ["--density", "0.3", "--grow", "gradient", "--min-age", "1", "--block-warmup", "2", "--clip", "1"]
    result = call(*SMALL, "--data", write_text(tmp_path / "text"), "--out", tmp_path / "run", *options)
    assert result.exit_code == 0 and "no effect" not in result.output and "alone" not in result.output


def test_an_occupied_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = call(*SMALL, "--out", tmp_path)
    assert result.exit_code == 2 and "choose another folder" in result.stderr


@pytest.mark.parametrize("name", ["datasets", "transformers", "matplotlib"])
def test_a_missing_extra_says_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_all_but_one(wanted: str) -> object:
        if wanted == name:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)
        return import_module(wanted)

    monkeypatch.setattr("smet_compile.presets.import_module", import_all_but_one)
    data = f"hf:{tmp_path}" if name == "datasets" else write_text(tmp_path / "text")
    result = call(*SMALL, "--data", data, "--out", tmp_path / "run")
    assert result.exit_code == 2
    extra = "hub" if name == "datasets" else "pretrain"
    assert f"pip install 'smet-compile[{extra}]'" in result.stderr


def test_help_needs_neither_datasets_nor_transformers() -> None:
    script = (
        "import sys; sys.modules.update(datasets=None, transformers=None, matplotlib=None); "
        "sys.argv = ['smet-compile', 'pretrain', '--help']; "
        "from smet_compile.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for option in ("--preset", "--density", "--resume", "--save-every"):
        assert option in result.stdout


def test_the_help_is_legible_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    shown = call("--help").output.splitlines()
    assert max(map(len, shown)) <= 80 and not any("--no-" in line for line in shown)
    assert [line.split()[1] for line in shown if line.startswith("╭─")][:4] == [
        "Options",
        "Folder",
        "Model",
        "Sparsity",
    ]
    (line,) = [line for line in shown if "Peak learning rate at density" in line]
    assert line.index("Peak") < 42


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(losses(folder)) >= steps:
            return
        time.sleep(0.01)
    pytest.fail("the run did not get going")


def options_of(config: RunConfig) -> list[str]:
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(config).items()}
    flags = [option for option, value in options.items() if value is True]
    valued = [(option, str(value)) for option, value in options.items() if not isinstance(value, bool)]
    return [part for pair in valued for part in pair] + flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_resume(number: signal.Signals, tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=60, save_every=1000, eval_every=1000)
    folder, output = tmp_path / "a run", tmp_path / "output"
    process = in_new_process(command_line, *options_of(config), "--out", str(folder), output=output)
    wait_for_steps(folder, 3)
    os.kill(process.pid or 0, number)
    assert finish(process) == 130
    command = output.read_text().splitlines()[-1]
    assert command == f"python -m smet_compile pretrain --resume '{folder}'"
    assert 3 <= len(losses(folder)) < 60
    assert finish(in_new_process(command_line, "--resume", str(folder))) == 0
    pretrain(config, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
