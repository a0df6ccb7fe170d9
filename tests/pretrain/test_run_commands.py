"""The commands `export`, `generate` and `compare`, and `--version`, do what they say with short runs."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import smet_compile as smet
from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.comparison import differences, rates_of, read_runs
from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.generation import Printer, generate_text
from smet_compile.pretrain.loop import pretrain
from smet_compile.pretrain.saved_run import open_run
from smet_compile.pretrain.tokenizer import ByteTokenizer
from tests.pretrain.runs import SMALL_MODEL, StopAfter, losses, small_config
from tests.support.snapshots import assert_same

pytestmark = SMALL_MODEL


def call(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), [*map(str, arguments)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("commands"), steps=40, lr=1e-2, density=0.4, save_every=40)


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    pretrain(config, folder)
    return folder


def test_the_version() -> None:
    result = call("--version")
    assert result.exit_code == 0 and result.output.startswith("smet-compile 0.")
    assert f"Python {sys.version.split()[0]}, torch {torch.__version__}" in result.output


def test_an_exported_run_loads_as_any_model(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = call("export", run, tmp_path / "model")
    assert result.exit_code == 0, result.output
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not list(tmp_path.glob(".model*"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("sparse é 漢字\n", return_tensors="pt").input_ids
    assert tokens[0].tolist() == list("sparse é 漢字\n".encode())
    own = open_run(run).load()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, own(input_ids=tokens).logits)


def test_a_dense_run_is_exported_too(config: RunConfig, tmp_path: Path) -> None:
    pretrain(small_config(tmp_path, method="dense"), tmp_path / "run", StopAfter(2))
    assert call("export", tmp_path / "run", tmp_path / "model").exit_code == 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    compact = call("export", tmp_path / "run", tmp_path / "compact", "--format", "compact")
    assert compact.exit_code == 2 and not (tmp_path / "compact").exists()
    assert "error: --format: expected dense for a run of --method dense, got compact" in compact.stderr


def test_a_compact_export_loads_as_it_was(run: Path, tmp_path: Path) -> None:
    result = call("export", run, tmp_path / "model", "--format", "compact")
    assert result.exit_code == 0 and "smet_compile.load_compact" in result.output, result.output
    loaded, own = smet.load_compact(tmp_path / "model"), open_run(run).load()
    assert_same(dict(loaded.state_dict()), dict(own.state_dict()))
    assert "density" in (tmp_path / "model" / "README.md").read_text()


def test_text_of_a_run(run: Path) -> None:
    result = call("generate", run, "sparse wei", "--tokens", 90, "--temperature", 0)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("sparse wei") and result.output == call(
        "generate", run, "sparse wei", "--tokens", 90, "--temperature", 0, "--seed", 5
    ).output  # fmt: skip
    assert len(result.output) == 10 + 90 + 1
    drawn = [call("generate", run, "--tokens", 30, "--seed", seed).output for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_first_tokens_are_the_models_likeliest(run: Path) -> None:
    """Also where the text is longer than the model's sequences, of 32 tokens."""
    opened = open_run(run)
    shown: list[str] = []
    text = generate_text(opened, "the model learns", tokens=24, temperature=0, seed=0, show=shown.append)
    assert "".join(shown) == text and len(text) == 40
    model, tokens = opened.load(), list(b"the model learns")
    for _ in range(24):
        seen = tokens if len(tokens) < 32 else tokens[-(16 + len(tokens) - 32) :]
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([seen])).logits[0, -1].argmax()))
    assert bytes(tokens).decode() == text


def test_a_character_is_shown_when_it_is_whole() -> None:
    shown: list[str] = []
    printer = Printer(ByteTokenizer().decode, shown.append)
    printer.put(torch.tensor([[1, 2, 3]]))
    for byte in "é漢!".encode():
        printer.put(torch.tensor([byte]))
    assert [part for part in shown if part] == ["é", "漢", "!"]


def test_runs_side_by_side(run: Path, config: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other" / "sparse")
    pretrain(small_config(tmp_path, steps=6, density=0.2, data=config.data), tmp_path / "short")
    result = call("compare", run, tmp_path / "short", tmp_path / "other" / "sparse", "--out", tmp_path / "plots/x.png")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["run", "step", "loss", "perplexity", "tokens/s", "bytes/weight"]
    assert lines[1].split()[1:3] == ["40/40", f"{losses(run)[-1][2]:.4f}"]
    assert lines[3].split()[:2] == [f"{tmp_path.name}/short", "6/6"] and len(lines[3]) < 55 + len(lines[3].split()[0])
    assert any(line.startswith("density: 0.4 (") and "0.2 (" in line for line in lines)
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_rates_is_drawn_by_rate(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-2, 3e-2):
        pretrain(small_config(tmp_path, steps=6, lr=rate), tmp_path / f"{rate:g}")
    found = read_runs([tmp_path / name for name in ("0.001", "0.01", "0.03")])
    (points,) = rates_of(found).values()
    assert [rate for rate, _ in points] == [1e-3, 1e-2, 3e-2]
    assert [line.partition(":")[0] for line in differences(found)] == ["lr", "embedding_lr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{}/none", "{}/x"], "RUN: expected the folder of a run"),
        (["export", "{run}", "{run}"], "DEST: expected a new or empty folder"),
        (["export", "{run}", "{}/x", "--format", "zip"], "--format: expected one of dense, compact"),
        (["generate", "{run}", "a", "--tokens", "many"], "--tokens: expected a whole number of at least 1, got 'many'"),
        (["generate", "{run}", "a", "--temperature", "-1"], "--temperature: expected a finite number of at least 0"),
        (["generate", "{run}", "a", "--device", "cuda:99"], "--device: expected a device of this machine such as cpu"),
        (["compare", "{run}", "{}"], "RUN: expected the folder of a run"),
        (["compare", "{run}", "--out", "{}/x.txt"], "--out: expected the name of an image such as comparison.png, got"),
        (["switch", "{}/none", "fsdp=2"], "RUN: expected the folder of a run (with config.json), got no such folder"),
        (["join", "{}/none"], "RUN: expected the folder of a run (with config.json), got no such folder"),
        (["join", "{run}"], "RUN: expected the folder of a run that was begun with --elastic"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, run: Path, tmp_path: Path) -> None:
    result = call(*(argument.replace("{run}", str(run)).replace("{}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr and result.stdout == "" and not (tmp_path / "x").exists()
