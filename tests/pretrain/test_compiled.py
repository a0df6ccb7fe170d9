"""The compiled step, which is the default, makes the same run as an eager one, without compact gradients."""

from dataclasses import replace
from pathlib import Path

import pytest

from smet_compile.presets import PRESETS
from smet_compile.pretrain.config import resolve
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.metrics import of_kind, read_metrics
from tests.pretrain.runs import SMALL_MODEL, StopAfter, losses, moves, small_config

pytestmark = [SMALL_MODEL, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_compiled_is_the_default() -> None:
    assert not resolve(preset="nano").eager


def test_a_compiled_run_equals_an_eager_one_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "nano", replace(PRESETS["nano"], layers=1))  # half of the time to compile
    for name in ("compiled", "eager", "stopped"):
        config = small_config(tmp_path, block="16", density=0.5, steps=6, schedule="cosine", eager=name == "eager")
        finished = pretrain(config, tmp_path / name, StopAfter(4) if name == "stopped" else lambda: False)
        assert finished == (name != "stopped")
    assert resume(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "compiled")
    assert len(moves(tmp_path / "compiled")) == len(moves(tmp_path / "eager")) >= 1
    for (*_, compiled), (*_, eager) in zip(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-4)
    sizes = {run: _bytes(tmp_path / run) for run in ("compiled", "eager")}
    assert sizes["compiled"]["gradients"] == 0 < sizes["eager"]["gradients"]
    assert sizes["compiled"]["weights"] == sizes["eager"]["weights"]


def _bytes(run: Path) -> dict[str, int]:
    return of_kind(read_metrics(run / "metrics.jsonl"), "bytes")[0]["sparse"]["run"]
