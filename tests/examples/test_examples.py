"""Every example runs, in a short form, as its reader would run it."""

import pickle
import re
from pathlib import Path

import pytest
import torch

from examples.image_data import NUM_CLASSES, cifar, made_images
from tests.support.fresh_process import ROOT, run_python

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "train_llama.py",
        "sparsify_trained_model.py",
        "train_resnet.py",
        *("__init__.py", "image_data.py", "resnet.py"),  # for train_resnet.py
    }


def test_the_loss_of_the_llama_falls() -> None:
    printed = run_python(str(EXAMPLES / "train_llama.py"), "--steps", "40")
    losses = re.search(r"loss ([\d.]+) → ([\d.]+)", printed)
    assert losses, printed
    assert float(losses[2]) < float(losses[1]) - 1


def test_fine_tuning_brings_a_sparsified_model_back() -> None:
    printed = run_python(str(EXAMPLES / "sparsify_trained_model.py"), "--steps", "120")
    dense, sparse, tuned, plain = map(float, re.findall(r"([\d.]+) nats per byte", printed))
    assert dense < sparse
    assert tuned < sparse - 0.1
    assert tuned == plain


def test_a_sparse_resnet_learns_made_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert len((EXAMPLES / "train_resnet.py").read_text().splitlines()) <= 60
    plot = tmp_path / "plot.png"
    printed = run_python(
        *(str(EXAMPLES / "train_resnet.py"), "--images", "1024", "--epochs", "3", "--density", "0.2"),
        *("--out", str(plot)),
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.1
    assert "topology updates" in printed and "corrected: batch norm alone reads its output" in printed
    assert plot.stat().st_size > 10_000


def test_made_images_are_a_function_of_their_seed() -> None:
    images, labels = made_images(600, seed=3)
    again, _ = made_images(600, seed=3)
    other, _ = made_images(600, seed=4)
    assert images.shape == (600, 3, 32, 32) and torch.equal(images, again) and not torch.equal(images, other)
    assert set(labels.tolist()) == set(range(NUM_CLASSES)) and NUM_CLASSES >= 20


@pytest.mark.parametrize("names", [["data_batch_1", "data_batch_2"], ["train"]], ids=["CIFAR-10", "CIFAR-100"])
def test_a_folder_of_cifar_is_read(names: list[str], tmp_path: Path) -> None:
    for name in names:
        key = "fine_labels" if name == "train" else "labels"
        part = {"data": torch.randint(256, (5, 3072), dtype=torch.uint8).numpy(), key: [0, 1, 2, 3, 4]}
        (tmp_path / name).write_bytes(pickle.dumps(part))
    images, labels = cifar(tmp_path)
    assert images.shape == (5 * len(names), 3, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4] * len(names)
    with pytest.raises(ValueError, match=r"expected the files of CIFAR .*unpack the archive there"):
        cifar(tmp_path, is_test=True)
