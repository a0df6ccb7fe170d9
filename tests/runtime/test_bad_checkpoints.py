"""A bad checkpoint is a ValueError; model, optimizer, manager and generator stay as they were."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import smet_compile as smet
from smet_compile.runtime import checkpoint_file
from tests.runtime.setting import make
from tests.support.states import Unchanged
from tests.support.training import train


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    model, optimizer, manager = make(dropout=0.1)
    train(model, optimizer, manager, steps=7)
    smet.save_checkpoint(tmp_path / "good", model, optimizer, manager, extra={"x": torch.arange(9)})
    return (tmp_path / "good").read_bytes()


def assert_refused(path: Path, match: str, objects: tuple[Any, ...] | None = None) -> None:
    objects = make(dropout=0.1) if objects is None else objects
    rng = torch.get_rng_state()
    with Unchanged(*objects), pytest.raises(ValueError, match=match):
        smet.load_checkpoint(path, *objects)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_truncated(tmp_path: Path, content: bytes, fraction: float) -> None:
    path = tmp_path / "truncated"
    path.write_bytes(content[: int(len(content) * fraction)])
    assert_refused(path, "truncated")


@pytest.mark.parametrize("part", range(20))
def test_altered_by_one_bit(tmp_path: Path, content: bytes, part: int) -> None:
    altered = bytearray(content)
    altered[(len(content) - 1) * part // 19] ^= 4
    path = tmp_path / "altered"
    path.write_bytes(bytes(altered))
    assert_refused(path, "altered")


@pytest.mark.slow
def test_altered_anywhere(tmp_path: Path, content: bytes) -> None:
    objects = make(dropout=0.1)
    model = objects[0]
    accepted = []
    with Unchanged(*objects):
        for place in range(len(content)):
            altered = bytearray(content)
            altered[place] ^= 1
            (tmp_path / "altered").write_bytes(bytes(altered))
            try:
                smet.load_checkpoint(tmp_path / "altered", model)
                accepted.append(place)
            except ValueError:
                pass
        assert not accepted


def test_an_altered_version(tmp_path: Path, content: bytes) -> None:
    """The checksum covers the version as well."""
    versions = re.findall(rb'version\\": *1', content)
    assert len(versions) == 1
    (tmp_path / "altered").write_bytes(content.replace(versions[0], versions[0][:-1] + b"0"))
    assert_refused(tmp_path / "altered", "altered")


def test_something_appended(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "longer").write_bytes(content + b"\0" * 8)
    assert_refused(tmp_path / "longer", "longer")


def test_without_its_json(tmp_path: Path) -> None:
    """Whole by its checksum, and yet nothing says what the tensors are."""
    tensors = {"checkpoint.model.weight": torch.arange(9)}
    checksum = checkpoint_file._checksum(checkpoint_file.FORMAT_VERSION, tensors)
    header = json.dumps({"version": checkpoint_file.FORMAT_VERSION, "sha256": checksum})
    save_file(tensors, tmp_path / "a", {"smet_compile": header})
    assert_refused(tmp_path / "a", "a: not a whole checkpoint.*json")


def test_not_a_checkpoint_at_all(tmp_path: Path) -> None:
    for name, text in (("noise", bytes(range(256)) * 10), ("text", b"hello\n"), ("json", b"{}")):
        (tmp_path / name).write_bytes(text)
        assert_refused(tmp_path / name, name)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    model, *_ = make()
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        smet.load_checkpoint(tmp_path / "nowhere", model)


def with_optimizer(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, smet.TopologyManager]:
    optimizer = smet.ActiveAdamW(model)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=1000)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: smet.sparsify(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7)), density=0.5), "weight"),
        (
            lambda: smet.sparsify(nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.Dropout(), nn.Linear(21, 7))),
            "weight",
        ),
        (
            lambda: smet.sparsify(
                nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Dropout(), nn.Linear(20, 7)), density=0.5
            ),
            "weight",
        ),
        (lambda: make(block_shape=(1, 4))[0], r"weight.*block"),
        (lambda: make(block_shape=(2, 1))[0], r"weight.*block"),
        (lambda: make(density=0.4)[0], r"weight"),
        (lambda: smet.sparsify(make_dense(), density=0.5, include="0.weight"), r"weight"),
    ],
    ids=[
        "other_layers",
        "other_sizes",
        "same_count_other_shape",
        "block_1_4",
        "block_2_1",
        "density",
        "fewer_sites",
    ],
)
def test_of_another_model(tmp_path: Path, content: bytes, other: Any, match: str) -> None:
    assert content
    assert_refused(tmp_path / "good", match, with_optimizer(other()))


def make_dense() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Dropout(0.1), nn.Linear(20, 7))


def test_same_number_of_values_in_other_blocks(tmp_path: Path) -> None:
    """(2, 8) and (4, 4) tiles hold as many numbers each."""
    model = smet.sparsify(nn.Sequential(nn.Linear(16, 16)), density=0.5, block_shape=(2, 8))
    smet.save_checkpoint(tmp_path / "a", model, smet.ActiveAdamW(model))
    other = smet.sparsify(nn.Sequential(nn.Linear(16, 16)), density=0.5, block_shape=(8, 2))
    assert_refused(tmp_path / "a", "block", (other,))


def test_of_a_dense_model(tmp_path: Path) -> None:
    dense = make_dense()
    smet.save_checkpoint(tmp_path / "a", dense, smet.ActiveAdamW(dense))
    assert_refused(tmp_path / "a", "weight", (make()[0],))


def test_without_the_manager_that_is_asked_for(tmp_path: Path) -> None:
    model, optimizer, manager = make()
    smet.save_checkpoint(tmp_path / "a", model, optimizer)
    assert_refused(tmp_path / "a", "manager", (model, optimizer, manager))


def test_of_another_kind_of_optimizer(tmp_path: Path) -> None:
    model, optimizer, manager = make()
    train(model, optimizer, manager, steps=2)
    smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert_refused(tmp_path / "a", "(?i)optimizer", (model, sgd))


def test_of_a_newer_format_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = make()
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint_file, "FORMAT_VERSION", checkpoint_file.FORMAT_VERSION + 1)
        smet.save_checkpoint(tmp_path / "a", *objects)
    assert_refused(tmp_path / "a", "format version.*upgrade", objects)


def test_of_an_optimizer_with_other_groups(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    train(model, optimizer, steps=2)
    smet.save_checkpoint(tmp_path / "a", model, optimizer)
    groups = smet.ActiveAdamW(smet.decay_groups(model, 0.1), model=model)
    assert_refused(tmp_path / "a", "(?i)optimizer|group", (model, groups))


def renumber(saved: Any) -> None:
    """Parameters and states keep to one another, under other numbers."""
    state = saved["optimizer"]["state"]
    state["param_groups"][0]["params"] = [number + 10 for number in state["param_groups"][0]["params"]]
    state["state"] = {number + 10: entries for number, entries in state["state"].items()}


def in_model(change: Any) -> Any:
    def alter(saved: Any) -> None:
        saved["model"]["0.bias"] = change(saved["model"]["0.bias"])

    return alter


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda saved: saved.update(layouts={}), "compact in this model, not in the checkpoint"),
        (lambda saved: saved.update(layouts=[]), "layouts: expected a dict, got list"),
        (lambda saved: saved["layouts"].update({"0.weight": 3}), "0.weight: expected a layout"),
        (lambda saved: saved["layouts"]["0.weight"][1].reverse(), "0.weight: expected matrix"),
        (lambda saved: saved.pop("extra"), "expected 'extra'"),
        (lambda saved: saved.update(more=1), "got 'more'.*upgrade"),
        (lambda saved: saved.update(model=[]), "model: expected a dict"),
        (lambda saved: saved["model"].pop("0.bias"), "0.bias is only in this model"),
        (lambda saved: saved["model"].update({"1.bias": torch.ones(1)}), "1.bias is only in the checkpoint"),
        (in_model(lambda bias: bias[:-1]), r"0.bias: expected torch.float32 of shape \(20,\)"),
        (in_model(lambda bias: bias.double()), "0.bias: expected torch.float32"),
        (in_model(lambda bias: bias.tolist()), "0.bias: expected torch.float32.*got list"),
        (lambda saved: saved.update(optimizer=None), "optimizer: expected a dict"),
        (lambda saved: saved["optimizer"].update({"class": 3}), "state of ActiveAdamW, got that of 3"),
        (lambda saved: saved["optimizer"].update(names="x"), "other parameters or groups"),
        (lambda saved: saved["optimizer"]["names"][0].reverse(), "other parameters or groups"),
        (lambda saved: saved["optimizer"].update(with_state=3), "some is missing"),
        (renumber, "another order"),
        (lambda saved: saved.update(manager=[]), "manager: expected a dict"),
        (lambda saved: saved.update(model_metadata=[]), "model_metadata: expected a dict"),
        (lambda saved: saved["model_metadata"].update({"0": 1}), "model_metadata.*expected a dict"),
    ],
)
def test_altered_with_a_right_checksum(tmp_path: Path, content: bytes, alter: Any, match: str) -> None:
    assert content
    saved = checkpoint_file.read(tmp_path / "good")
    alter(saved)
    checkpoint_file.write(tmp_path / "altered", saved)
    assert_refused(tmp_path / "altered", match)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"[]", "checkpoint: expected a dict, got list"),
        (b"null", "checkpoint: expected a dict"),
        (b'{"a": 1, "a": 1}', "each key once"),
        (b"[" * 200_000, "not a whole checkpoint"),
        (b"[" * 400 + b"]" * 400, "in one another"),
        (b'{"$tensor": "nowhere"}', "expected a tensor 'nowhere'"),
        (b'{"$tensor": 3}', "expected a tensor, a tuple or items"),
        (b'{"$tensor": "x", "a": 1}', "expected a tensor, a tuple or items"),
        (b'{"$tuple": 3}', "expected a tensor, a tuple or items"),
        (b'{"$other": 3}', "expected a tensor, a tuple or items"),
        (b'{"$items": 3}', "expected pairs"),
        (b'{"$items": [[1]]}', "expected pairs"),
        (b'{"$items": [[1, 2], [1, 3]]}', "each key once"),
        (b'{"$items": [[[], 2]]}', "as keys"),
        (b'{"$items": [[{"$tensor": "x"}, 2]]}', "as keys"),
        (b'{"$items": [], "$class": "set"}', "expected one of OrderedDict"),
        (b'{"$items": [], "$class": []}', "expected one of OrderedDict"),
        (b'{"$items": [], "$metadata": {}}', "metadata with an OrderedDict"),
        (b"1" * 5000, "not a whole checkpoint"),
        (b"\xff", "not a whole checkpoint"),
        (b"", "not a whole checkpoint"),
    ],
)
def test_json_that_no_checkpoint_has(tmp_path: Path, body: bytes, match: str) -> None:
    tensors = {"x": torch.ones(1), "json": torch.tensor(list(body), dtype=torch.uint8)}
    checksum = checkpoint_file._checksum(1, tensors)
    save_file(tensors, tmp_path / "a", {"smet_compile": json.dumps({"version": 1, "sha256": checksum})})
    assert_refused(tmp_path / "a", match)
