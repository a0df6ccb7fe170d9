"""Every section of the kernels' benchmark runs at tiny size and says what it measured."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import command
from benchmarks.gpu_check.models import SMALLER
from benchmarks.kernels import SECTIONS
from benchmarks.ratios import Pairs
from benchmarks.sections import linear, peers
from benchmarks.settings import Settings
from benchmarks.tables import Table
from benchmarks.training import training
from tests.support.fresh_process import run_python

REPEATS = 2

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices:UserWarning")


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """Models run as they are: compiling one takes half a minute."""
    training.cache_clear()
    with torch.compiler.set_stance("force_eager"):
        yield
    training.cache_clear()


def measured(name: str) -> list[Table]:
    return SECTIONS[name](Settings(REPEATS, quick=True, device=torch.device("cpu")))


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "peers"])
def test_section(name: str, not_compiled: None) -> None:
    tables = measured(name)
    assert len(tables) == 1
    for row in (row for table in tables for row in table.rows):
        assert not row.unmeasured
        assert row.kernel
        assert len(row.ratios) in (1, REPEATS)
        assert all(0 < ratio < 1e4 for ratio in row.ratios) or name == "topology"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*some outputs or inputs have no weight:UserWarning")
@pytest.mark.parametrize("is_installed", [True, False])
def test_peers(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense layer stands for the peer's, so that the comparison runs where the peer is not installed."""
    monkeypatch.setattr(peers, "has_peer", lambda: is_installed)
    monkeypatch.setattr(peers, "_peer_layer", lambda cols, rows, density: nn.Linear(cols, rows, bias=False))
    layers, steps, blocks = measured("peers")
    for row in (*layers.rows, *steps.rows):
        assert row.kernel in ("cpu_single", "cpu_expand")
        assert len(row.ratios) == (REPEATS if is_installed else 0)
        assert row.verdict.startswith(("yes", "no")) if is_installed else row.verdict == peers.MISSING
    assert all(len(row.ratios) == REPEATS for row in blocks.rows)


def test_operations_a_second_count_those_of_active_blocks() -> None:
    assert linear.rates(Pairs((2.0, 1.0, 2.0), (1.0, 1.0, 9.0)), dense_flops=4 * 10**9, density=0.25) == {
        "dense GFLOP/s": "2",
        "sparse GFLOP/s": "1",
    }


def test_the_kernel_named_is_the_one_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
    assert {row.kernel for table in measured("linear") for row in table.rows} == {"torch"}


def test_bound_of_a_step() -> None:
    """8 layers of 12.6M weights, a head of 32.8M, 8 · 256 · 1024 products of attention for each token."""
    weights, rest = 8 * (4 * 1024**2 + 3 * 1024 * 2736), 1024 * 32000 + 8 * 256 * 1024
    assert SMALLER.bound == pytest.approx((weights + rest) / (weights / 4 + rest))
    assert SMALLER.bound == pytest.approx(2.26, abs=0.01)


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "docs" / "kernels.md"
    options = ("-m", "benchmarks.kernels", "--quick", "--repeats=2", "--only=linear", f"--out={out}")
    printed = run_python(*options)
    written = out.read_text()
    assert written.startswith("# Kernels\n")
    assert "Not for the record" in written
    assert re.search(rf"torch {re.escape(torch.__version__)}.*", written)
    assert "### Linear layers of tiles" in written
    assert all(line in printed for line in written.splitlines())


def test_a_section_that_fails_stops_no_other(tmp_path: Path) -> None:
    def fails(settings: Settings) -> list[Table]:
        raise RuntimeError("no memory")

    def works(settings: Settings) -> list[Table]:
        return [Table("Works", "a / b", "", [])]

    out = tmp_path / "out.md"
    args = argparse.Namespace(only=None, repeats=REPEATS, quick=True, out=out)
    with pytest.raises(SystemExit, match="failed: first"):
        command.run("Title", "command", {"first": fails, "second": works}, args, "cpu")
    assert "### first\n\nNot measured: it failed with RuntimeError." in out.read_text()
    assert "### Works" in out.read_text()


@pytest.mark.slow
def test_compiled_sections() -> None:
    printed = run_python("-m", "benchmarks.kernels", "--quick", "--repeats=1", "--only=step", "--only=topology")
    rows = re.findall(r"^\| (?:fused|two calls|64 tiles|single weights)", printed, re.MULTILINE)
    assert len(rows) == 6
