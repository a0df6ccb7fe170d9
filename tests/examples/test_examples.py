"""Every example runs, in a short form, as its reader would run it."""

import re

import pytest

from tests.support.fresh_process import ROOT, run_python

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "train_ten_lines.py",
        "sparsify_trained_model.py",
    }


def test_the_loss_of_the_ten_lines_falls() -> None:
    printed = run_python(str(EXAMPLES / "train_ten_lines.py"), "--steps", "40")
    losses = re.search(r"loss ([\d.]+) → ([\d.]+)", printed)
    assert losses, printed
    assert float(losses[2]) < float(losses[1]) - 1


def test_fine_tuning_brings_a_sparsified_model_back() -> None:
    printed = run_python(str(EXAMPLES / "sparsify_trained_model.py"), "--steps", "120")
    dense, sparse, tuned, plain = map(float, re.findall(r"([\d.]+) nats per byte", printed))
    assert dense < sparse
    assert tuned < sparse - 0.1
    assert tuned == plain
