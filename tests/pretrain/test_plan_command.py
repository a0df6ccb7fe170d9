"""`plan` on the command line."""

import pytest
from typer.testing import CliRunner

from smet_compile.pretrain.cli import make_app


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


def test_tokens_add_the_dense_model_of_as_many_bytes() -> None:
    plain = ("nano", "--density", "0.25", "--block", "8", "--eager")
    _, without, _ = call(*plain)
    code, out, _ = call(*plain, "--tokens", "2e9", "--sparse-efficiency", "0.5")
    assert code == 0 and out.startswith(without.rstrip()) and "as many bytes" not in without
    assert "\nbeside a dense model of as many bytes (" in out and "sparse products run at 0.5 of the rate" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "error: model: expected one of nano"),
        (["nano", "--optimizer", "adam"], "error: optimizer: expected one of adamw, lion, sgd, scale"),
        (["nano", "--block", "x"], "error: --block: expected a side such as 16"),
        (["nano", "--mesh", "8"], "error: --mesh: expected a whole number"),
        (["nano", "--mesh", "dp=0"], "error: --mesh: expected a whole number of at least 1, got 0"),
        (["nano", "--mesh", "dp=2,dp=4"], "error: --mesh: expected each dimension once"),
        (["nano", "--mesh", "dp=2,tp=3"], "error: model.layers.0.self_attn.q_proj.weight: expected rows that 3 slabs"),
        (["nano", "--eager", "--sparse-efficiency", "0.5"], "error: sparse_efficiency: expected none without tokens"),
        (["nano", "--eager", "--tokens", "many"], "error: --tokens: expected a finite number, got 'many'"),
        (["nano", "--eager", "--fits", "1kB"], "error: fits: expected at least"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, out, errors = call(*arguments)
    assert (code, out) == (2, "") and errors.startswith(message) and errors.count("\n") == 1
