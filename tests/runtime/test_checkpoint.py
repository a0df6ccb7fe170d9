"""One file, written whole or not at all."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import smet_compile as smet
from tests.runtime.setting import make
from tests.support.masked import masks_of
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer, manager = make(dropout=0.1)
    train(model, optimizer, manager, steps=7)
    rng = torch.get_rng_state()
    smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    saved = snapshot(model, optimizer, manager)
    other, other_optimizer, other_manager = make(dropout=0.1)
    train(other, other_optimizer, other_manager, steps=2)
    smet.load_checkpoint(tmp_path / "a", other, other_optimizer, other_manager)
    assert_same(snapshot(other, other_optimizer, other_manager), saved)
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_model_alone(tmp_path: Path) -> None:
    model, optimizer, manager = make()
    train(model, optimizer, manager, steps=4)
    smet.save_checkpoint(str(tmp_path / "a"), model, optimizer, manager)
    other, other_optimizer, _ = make()
    before = snapshot(other_optimizer)
    smet.load_checkpoint(str(tmp_path / "a"), other)
    assert_same(snapshot(other), snapshot(model))
    assert_same(masks_of(other), masks_of(model))
    assert_same(snapshot(other_optimizer), before)


def test_without_a_manager(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    train(model, optimizer, steps=2)
    smet.save_checkpoint(tmp_path / "a", model, optimizer)
    other, other_optimizer, _ = make()
    smet.load_checkpoint(tmp_path / "a", other, other_optimizer)
    assert_same(snapshot(other, other_optimizer), snapshot(model, optimizer))


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    extra: dict[str, Any] = {
        "step": 7,
        "rate": 0.1,
        "name": "a b/c",
        "none": None,
        "flags": [True, False],
        "nested": {"list": [1, {"x": torch.arange(5, dtype=torch.uint8)}], "empty": {}, "nothing": []},
        "half": torch.randn(3, 4).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "infinite": float("inf"),
    }
    smet.save_checkpoint(tmp_path / "a", model, optimizer, extra=extra)
    assert_same(smet.load_checkpoint(tmp_path / "a", model), extra)


def test_a_hundred_megabytes_of_json(tmp_path: Path) -> None:
    """More than the header of a safetensors file can hold."""
    model, optimizer, _ = make()
    extra = {"lines": [chr(ord("a") + i) * 10**7 for i in range(11)]}
    smet.save_checkpoint(tmp_path / "a", model, optimizer, extra=extra)
    assert (tmp_path / "a").stat().st_size > 110 * 10**6
    assert smet.load_checkpoint(tmp_path / "a", model) == extra


def test_a_view_and_a_slice_in_extra(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    whole = torch.randn(10, 10)
    extra = {"whole": whole, "transposed": whole.t(), "part": whole[2:4, ::3]}
    smet.save_checkpoint(tmp_path / "a", model, optimizer, extra=extra)
    back = smet.load_checkpoint(tmp_path / "a", model)
    assert all(torch.equal(back[key], extra[key]) for key in extra)


def test_overwrites_in_place_and_leaves_nothing_else(tmp_path: Path) -> None:
    model, optimizer, manager = make()
    for _ in range(3):
        train(model, optimizer, manager)
        smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    assert os.listdir(tmp_path) == ["a"]
    other, *_ = make()
    smet.load_checkpoint(tmp_path / "a", other)
    assert_same(snapshot(other), snapshot(model))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 1000, 4000])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, limit: int) -> None:
    model, optimizer, manager = make()
    train(model, optimizer, manager, steps=3)
    smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    last, content = snapshot(model, optimizer, manager), (tmp_path / "a").read_bytes()
    assert len(content) > limit
    train(model, optimizer, manager, first=3, steps=3)
    with full_disk(limit), pytest.raises(ValueError, match=r"a.*could not save|space"):
        smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    assert (tmp_path / "a").read_bytes() == content
    assert os.listdir(tmp_path) == ["a"]
    smet.load_checkpoint(tmp_path / "a", model, optimizer, manager)
    assert_same(snapshot(model, optimizer, manager), last)


def test_a_crash_before_the_rename_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, manager = make()
    smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    content = (tmp_path / "a").read_bytes()

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, crash)
        monkeypatch.setattr(Path, name, crash)
    train(model, optimizer, manager)
    with pytest.raises(KeyboardInterrupt):
        smet.save_checkpoint(tmp_path / "a", model, optimizer, manager)
    assert (tmp_path / "a").read_bytes() == content


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match="extra"):
        smet.save_checkpoint(tmp_path / "a", model, optimizer, extra={"x": object()})
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="file"):
        smet.save_checkpoint(tmp_path / "file" / "a", model, optimizer)
