import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smet_compile.pretrain.config import RunConfig, resolve
from smet_compile.pretrain.data import ByteTokenizer, Data, open_data


def open_folder(folder: Path, **changes: int) -> Data:
    config: RunConfig = resolve(preset="nano", data=f"hf:{folder}", eval_windows=4, **changes)
    return open_data(config, ByteTokenizer())


def write_split(folder: Path, split: str, num_files: int = 2, num_documents: int = 20) -> None:
    for part in range(num_files):
        documents = [{"text": f"{split} {part} {n} " * (n % 7 + 1)} for n in range(num_documents)]
        (folder / f"{split}-{part}.jsonl").write_text("\n".join(map(json.dumps, documents)))


def as_text(tokens: torch.Tensor) -> str:
    return bytes(tokens.flatten().tolist()).decode()


@pytest.mark.parametrize("splits", [["train"], ["train", "validation"]])
def test_every_position_can_be_resumed(tmp_path: Path, splits: list[str]) -> None:
    for split in splits:
        write_split(tmp_path, split)
    data = open_folder(tmp_path)
    positions, batches = [], []
    for step in range(24):  # more than two passes over the text
        positions.append(json.dumps(data.train.state_dict()))
        batches.append(data.train.batch(step))
    for step in range(24):
        data = open_folder(tmp_path)
        data.train.load_state_dict(json.loads(positions[step]))
        assert all(torch.equal(data.train.batch(later), batches[later]) for later in range(step, 24))


def test_validation_comes_from_its_own_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_split(tmp_path, split)
    data = open_folder(tmp_path)
    assert as_text(data.validation).startswith("validation 0 0")
    assert as_text(data.train.batch(0)).startswith("train 0 0")


def test_validation_taken_from_train_is_skipped_in_training(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    data = open_folder(tmp_path)
    held_out = {document.strip() for document in as_text(data.validation).split("\0")}
    trained = "".join(as_text(data.train.batch(step)) for step in range(20))
    assert "train 0 0" in held_out
    assert held_out.isdisjoint(document.strip() for document in trained.split("\0"))


def test_a_stream_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data: hf:.*nothing could not be opened"):
        open_folder(tmp_path / "nothing")
    write_split(tmp_path, "test")
    with pytest.raises(ValueError, match=r"--data: expected a train split in hf:.*, got test"):
        open_folder(tmp_path)


def test_a_data_set_without_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"content": "x", "id": 1}\n')
    with pytest.raises(ValueError, match="--data: expected a column called text, got content, id"):
        open_folder(tmp_path)


def test_a_sequence_longer_than_the_stream(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(ValueError, match=r"--sequence: expected at most 6 .*, got 32"):
        open_folder(tmp_path)


def test_a_stream_that_validation_uses_up(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "long enough " * 9}))
    with pytest.raises(ValueError, match="--data: expected a stream with documents to train on, got an empty"):
        open_folder(tmp_path).train.batch(0)


def test_documents_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "long enough for a window of tokens"}\n{"text": null}\n')
    with pytest.raises(ValueError, match="--data: expected text in the column text, got None"):
        open_folder(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "long enough for a window of tokens"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"--data: .*(could not be opened|the stream could not be read) "):
        open_folder(tmp_path)


@pytest.mark.parametrize("state", [{}, {"stream": None, "left": []}, {"stream": {"epoch": 0}, "left": "x"}])
def test_a_position_of_another_stream_is_refused(state: dict[str, Any], tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    with pytest.raises(ValueError, match="--resume: expected a position in this run's stream, got another"):
        open_folder(tmp_path).train.load_state_dict(state)
