import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from smet_compile.presets import MissingExtraError
from smet_compile.pretrain.config import RunConfig, resolve
from smet_compile.pretrain.corpus import FILES_AHEAD, read_texts, stdlib_paths, text_paths
from smet_compile.pretrain.data import Data, open_data
from smet_compile.pretrain.tokenizer import ByteTokenizer, open_tokenizer
from tests.pretrain.runs import small_config


def open_bytes(config: RunConfig) -> Data:
    return open_data(config, ByteTokenizer())


def numbered_config(folder: Path, **changes: Any) -> RunConfig:
    """Returns a config with a text in which every 8 bytes are unique."""
    (folder / "n.txt").write_text("".join(f"{n:07d}|" for n in range(999)))
    options = {"preset": "nano", "sequence": 8, "batch": 5, "data": f"text:{folder}/n.txt"}
    return resolve(**(options | changes))


def windows(tokens: torch.Tensor) -> list[bytes]:
    return [bytes(row) for row in tokens.flatten(0, -2).tolist()]


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    first, again = (open_bytes(small_config(tmp_path)).train for _ in range(2))
    batches = [first.batch(step) for step in range(9)]
    assert all(torch.equal(again.batch(step), batches[step]) for step in (8, 0, 3))
    other = open_bytes(small_config(tmp_path, seed=1)).train
    assert not torch.equal(other.batch(0), batches[0])


def test_an_epoch_shows_each_window_once_in_another_order(tmp_path: Path) -> None:
    data = open_bytes(numbered_config(tmp_path, accumulate=2))
    num_windows = (999 * 8 + 1 - int((999 * 8 + 1) * 0.05)) // 8
    shown = [w for step in range(-(-2 * num_windows // 10)) for w in windows(data.train.batch(step))]
    epochs = shown[:num_windows], shown[num_windows : 2 * num_windows]
    assert Counter(epochs[0]) == Counter(epochs[1]) and len(set(epochs[0])) == num_windows
    assert epochs[0] != epochs[1]


def test_validation_text_is_never_trained_on(tmp_path: Path) -> None:
    data = open_bytes(numbered_config(tmp_path, sequence=24))
    trained = {number for step in range(400) for w in windows(data.train.batch(step)) for number in w.split(b"|")}
    held_out = [number for w in windows(data.validation) for number in w.split(b"|") if len(number) == 7]
    assert len(held_out) > 20
    assert trained.isdisjoint(held_out)


def test_the_split_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    one, two = (open_bytes(small_config(tmp_path, seed=seed)) for seed in (1, 2))
    assert torch.equal(one.validation, two.validation)
    assert one.fingerprint == two.fingerprint


def test_another_text_has_another_fingerprint(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    before = open_bytes(config).fingerprint
    (tmp_path / "text" / "0.txt").write_text("other words " * 500)
    assert open_bytes(config).fingerprint != before


def test_bytes_that_are_not_text_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 " * 200)
    data = open_bytes(resolve(preset="nano", data=f"text:{tmp_path}/x.txt"))
    assert data.train.batch(0).max() < 256


def test_stdlib_is_source_text_without_installed_packages() -> None:
    paths = stdlib_paths()
    assert len(paths) > 200 and "textwrap.py" in {path.name for path in paths}
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in paths)


def test_a_glob_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data: expected files that match .*\*\.md', got none"):
        text_paths(f"{tmp_path}/*.md")


@pytest.mark.parametrize("data", ["wikipedia", "text:", "hf:", "csv:x"])
def test_an_unknown_kind_of_data_lists_the_known_ones(data: str) -> None:
    with pytest.raises(ValueError, match=r"--data: expected stdlib, text:GLOB or hf:NAME"):
        open_bytes(resolve(data=data))


def test_a_sequence_longer_than_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x" * 99)
    with pytest.raises(ValueError, match=r"--sequence: expected at most 50 .*, got 51"):
        open_bytes(resolve(sequence=51, data=f"text:{tmp_path}/x.txt"))
    data = open_bytes(resolve(sequence=50, data=f"text:{tmp_path}/x.txt"))
    assert data.validation.shape == (1, 50)


def test_empty_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"--sequence: expected at most 0"):
        open_bytes(resolve(data=f"text:{tmp_path}/x.txt"))


def test_documents_end_in_a_zero_byte() -> None:
    assert ByteTokenizer().encode("é").tolist() == [*"é".encode(), 0]


def test_a_tokenizer_from_a_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", "sparse", "weights"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("sparse old weights")
    assert (encoded.tolist(), encoded.dtype, tokenizer.vocab_size) == ([1, 0, 2], numpy.uint8, 3)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer: expected bytes or an existing path"):
        open_tokenizer(str(tmp_path / "no"))
    with pytest.raises(ValueError, match="--tokenizer: expected a Hugging Face tokenizer in"):
        open_tokenizer(str(tmp_path))


def test_files_that_are_no_text_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words " * 99)
    (tmp_path / "b.txt").write_bytes("words".encode("utf-16"))
    with pytest.raises(ValueError, match=r"--data: expected text in UTF-8, got .*b\.txt, which holds NUL characters"):
        open_bytes(resolve(preset="nano", data=f"text:{tmp_path}/*.txt"))
    with pytest.raises(ValueError, match=r"--data: expected files that match .*, got a folder; add /\*\.txt, say"):
        open_bytes(resolve(preset="nano", data=f"text:{tmp_path}"))

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(
        ValueError, match=r"--data: expected files that can be read, got .*a\.txt \(Permission denied\)"
    ):
        open_bytes(resolve(preset="nano", data=f"text:{tmp_path}/a.txt"))


def test_a_vocabulary_that_leaves_numbers_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"sparse": 0, "weights": 1000}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.encode("weights sparse").tolist(), tokenizer.vocab_size) == ([1000, 0], 1001)
    with pytest.raises(ValueError, match=r"--tokenizer: expected a tokenizer that takes any text, got .*UNK"):
        tokenizer.encode("other")


def open_folder(folder: Path, **changes: Any) -> Data:
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
    with pytest.raises(ValueError, match="--column: expected one of content, id, got text; name the one to train on"):
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


@pytest.mark.parametrize(
    "content", [b"", b"a\r\nb\rc\n", b"caf\xe9\r\n", b"\xef\xbb\xbfx", "é\r\n…".encode(), b"x" * 70_000]
)
def test_a_file_is_read_as_python_reads_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    expected = (tmp_path / "x.txt").read_text(encoding="utf-8", errors="replace")
    assert list(read_texts([tmp_path / "x.txt"])) == [expected]


def test_more_files_than_are_asked_for_at_once(tmp_path: Path) -> None:
    for number in range(FILES_AHEAD + 5):
        (tmp_path / f"{number}.txt").write_text(str(number))
    found = list(read_texts(text_paths(f"{tmp_path}/*.txt")))
    assert sorted(map(int, found)) == list(range(FILES_AHEAD + 5)) and found != sorted(found)
    assert found == list(read_texts(text_paths(f"{tmp_path}/*.txt")))


def test_no_file_stays_open_where_one_cannot_be_read(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("words")
    paths = text_paths(f"{tmp_path}/*.txt")
    (tmp_path / "4.txt").unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=r"--data: expected files that can be read, got .*4\.txt \(No such file"):
        list(read_texts(paths))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stream_of_another_format_and_column(tmp_path: Path) -> None:
    import datasets

    rows = {"content": [f"document {number} " * 5 for number in range(40)], "id": list(range(40))}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
    data = open_folder(tmp_path, column="content")
    assert as_text(data.validation).startswith("document 0 ")
    assert as_text(data.train.batch(0)).startswith("document ")


def test_only_streams_want_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files are read by Python alone."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    open_bytes(small_config(tmp_path))
    with pytest.raises(MissingExtraError, match="datasets is needed"):
        open_folder(tmp_path)
