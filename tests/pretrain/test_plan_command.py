"""`plan` on the command line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import smet_compile as smet
from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.memory import BYTE_KINDS
from smet_compile.pretrain.metrics import of_kind, read_metrics


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(make_app(), ["plan", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_plan_prints_a_table() -> None:
    code, out, _ = call("nano", "--density", "0.25", "--block", "1x16", "--batch", "2", "--eager")
    assert code == 0 and out.startswith("nano: density 0.25, runs of 1 x 16; batch 2 x 32 tokens; float32")
    for row in ("weights", "gradients", "moments", "ages", "index", "persistent", "activations", "peak", "operations"):
        assert f"\n{row}" in out
    assert "4·d·n_sparse + 4·n_dense" in out and "n_sparse = " in out


def test_the_optimizer_decides_the_moments() -> None:
    code, out, _ = call("nano", "--density", "0.25", "--eager", "--optimizer", "scale")
    assert code == 0 and "optimizer scale" in out


def test_a_mesh_adds_what_a_rank_stores_and_sends() -> None:
    code, out, _ = call("nano", "--density", "0.25", "--eager", "--mesh", "dp=8,replicate=2")
    assert code == 0 and "\na rank of dp=8,replicate=2 " in out
    for row in ("values", "own rows", "whole parameters", "all-gather", "all-reduce", "rows (estimate)"):
        assert f"\n{row} " in out
    assert "an update every 100 steps adds" in out


def test_a_mesh_may_cut_layers() -> None:
    code, out, _ = call("nano", "--density", "0.25", "--eager", "--mesh", "dp=8,tp=2")
    assert code == 0 and "\na rank of dp=8,tp=2 " in out
    for row in ("tensor parallel", "bits"):
        assert f"\n{row} " in out


def test_a_model_of_ones_own_takes_batch_and_sequence_of_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}')
    code, out, _ = call("nano", "--model", str(path), "--density", "0.25", "--vocabulary", "256", "--eager")
    assert code == 0 and out.startswith("GPT2LMHeadModel: density 0.25, single weights; batch 4 x 32 tokens; float32")
    assert "n_dense = 11,136, n_sparse = 24,576" in out  # 256 x 32 tokens and 64 x 32 positions, 832 biases and norms
    _, found, _ = call("nano", "--model", str(path), "--density", "0.25", "--eager", "--fits", "1GB")
    assert int(found.split("batch ")[1].split()[0]) > 4


def test_a_plan_counts_the_bytes_of_the_run(tmp_path: Path) -> None:
    """The command is that of docs/planning.md: a run's own vocabulary, moments and kept gradients."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps " * 3000)
    options = ["--density", "0.25", "--block", "4", "--dtype", "bfloat16", "--eager"]
    data = ["--data", f"text:{tmp_path}/*.txt", "--out", str(tmp_path / "run"), "--steps", "4", "--device", "cpu"]
    result = CliRunner().invoke(make_app(), ["pretrain", "--preset", "nano", *options, *data])
    assert result.exit_code == 0, result.output
    (record,) = of_kind(read_metrics(tmp_path / "run/metrics.jsonl"), "bytes")
    planned = smet.plan(
        "nano", 0.25, block_shape=4, vocabulary=256, dtype="bfloat16", moment_dtype="bfloat16", compiled=False
    )
    stored = planned.sparse.stored
    assert {kind: stored[kind] for kind in BYTE_KINDS} == record["all"]["run"]
    _, out, _ = call("nano", *options, "--vocabulary", "256", "--moment-dtype", "bfloat16")
    assert out.splitlines()[:13] == str(planned).splitlines()[:13]


def test_flags_have_no_type_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    for command in ("plan", "pretrain", "inspect"):
        lines = CliRunner().invoke(make_app(), [command, "--help"]).output.splitlines()
        flags = [line for line in lines if any(f" --{flag} " in line for flag in ("eager", "elastic", "wide"))]
        assert flags and not any("bool" in line for line in flags), command


def test_tokens_add_the_dense_model_of_as_many_bytes() -> None:
    plain = ("nano", "--density", "0.25", "--block", "8", "--eager")
    _, without, _ = call(*plain)
    code, out, _ = call(*plain, "--tokens", "2e9", "--sparse-efficiency", "0.5")
    assert code == 0 and out.startswith(without.rstrip()) and "as many bytes" not in without
    assert "\nbeside a dense model of as many bytes (" in out and "sparse products run at 0.5 of the rate" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "error: PRESET: expected one of nano"),
        (["nano", "--optimizer", "adam"], "error: --optimizer: expected one of adamw, lion, sgd, scale"),
        (["nano", "--block", "x"], "error: --block: expected a side such as 16"),
        (["nano", "--mesh", "8"], "error: --mesh: expected a whole number"),
        (["nano", "--mesh", "dp=0"], "error: --mesh: expected a whole number of at least 1, got 0"),
        (["nano", "--mesh", "dp=2,dp=4"], "error: --mesh: expected each dimension once"),
        (["nano", "--mesh", "dp=2,tp=3"], "error: model.layers.0.self_attn.q_proj.weight: expected rows that 3 slabs"),
        (["nano", "--eager", "--sparse-efficiency", "0.5"], "error: --sparse-efficiency: expected none without tokens"),
        (["nano", "--eager", "--tokens", "many"], "error: --tokens: expected a finite number, got 'many'"),
        (["nano", "--eager", "--fits", "1kB"], "error: --fits: expected at least"),
        (["nano", "--fits", "much"], "error: --fits: expected bytes such as"),
        (["nano", "--density", "1.5"], "error: --density: expected a number in (0, 1], got 1.5; pass a number such as"),
        (["nano", "--batch", "0"], "error: --batch: expected a whole number of at least 1, got 0; pass a whole number"),
        (["nano", "--tokens", "-1"], "error: --tokens: expected a number in [1, 1e+18], got -1.0"),
        (["nano", "--dtype", "half"], "error: --dtype: expected one of float32, bfloat16, float16, float64, got"),
        (["nano", "--moment-dtype", "int4"], "error: --moment-dtype: expected one of float32, bfloat16, int8, got"),
        (["nano", "--distribution", "x"], "error: --distribution: expected one of uniform, er, erk, got 'x'"),
        (["nano", "--density-schedule", "9:2"], "error: --density-schedule[0]: expected a number in (0, 1], got 2.0"),
        (["nano", "--model", "nowhere.json"], "error: --model: expected a file that can be read, got nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, out, errors = call(*arguments)
    assert (code, out) == (2, "") and errors.startswith(message) and errors.count("\n") == 1
