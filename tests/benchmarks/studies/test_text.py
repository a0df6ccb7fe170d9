"""Studies read the files of a folder, whole and once each; byte pairs give the text back."""

import gzip
import hashlib
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.studies.byte_pairs import ByPairs
from benchmarks.studies.corpus import Corpus, python_paths
from benchmarks.studies.debian_text import PIECE_BYTES, lay, pieces

WORDS = "".join(f"the {number} of all words\n" for number in range(400))


def text_of(corpus: Corpus, windows: torch.Tensor) -> bytes:
    return b"".join(corpus.pieces[token] for token in windows.flatten().tolist())


def folder_of(path: Path) -> Path:
    """A folder whose readable text is WORDS, in two documents."""
    half = len(WORDS) // 2
    (path / "in").mkdir(parents=True)
    (path / "a.txt").write_bytes(WORDS[:half].replace("\n", "\r\n").encode())
    (path / "in" / "b.rst.gz").write_bytes(gzip.compress(WORDS[half:].encode()))
    (path / "again.txt").write_bytes(WORDS[half:].encode())
    (path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (path / "binary").write_bytes(b"a\0b")
    (path / "empty.txt").write_bytes(b"")
    return path


def test_a_folder_is_read_once_and_whole(tmp_path: Path) -> None:
    corpus = Corpus(16, 0, str(folder_of(tmp_path)))
    source = corpus.describe()
    half = len(WORDS) // 2
    orders = [[WORDS[:half], WORDS[half:]], [WORDS[half:], WORDS[:half]]]
    hashes = {hashlib.sha256("".join(f"{each}\0" for each in order).encode()).hexdigest()[:16] for order in orders}
    assert source["num_bytes"] == len(WORDS) + 2 and source["sha256"] in hashes
    train, held_out = text_of(corpus, torch.from_numpy(corpus._train.copy())), text_of(corpus, corpus.all_held_out())
    assert len(held_out) == pytest.approx(0.05 * len(WORDS), abs=16)
    whole = train + held_out
    assert len(whole) > len(WORDS) - 32 and set(whole.decode()) == {*WORDS, "\0"}


def test_another_text_has_another_hash(tmp_path: Path) -> None:
    first = Corpus(16, 0, str(folder_of(tmp_path / "first")))
    again = Corpus(16, 0, str(folder_of(tmp_path / "again")))
    assert first.source.sha256 == again.source.sha256  # the name is no part of it
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "a.txt").write_text(WORDS.replace("7", "8"))
    assert Corpus(16, 0, str(tmp_path / "third")).source.sha256 != first.source.sha256


def test_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text: expected 'stdlib', 'environment' or a folder, got 'nowhere'"):
        Corpus(16, 0, "nowhere")
    with pytest.raises(ValueError, match="text: expected a folder with text in UTF-8"):
        Corpus(16, 0, str(tmp_path))
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(ValueError, match="text: expected a window of 16 tokens to train on and one held out"):
        Corpus(16, 0, str(tmp_path))


def test_python_of_the_environment() -> None:
    paths = python_paths()
    assert len(set(paths)) == len(paths)
    assert Path(numpy.__file__) in paths and Path(gzip.__file__) in paths


def test_byte_pairs_give_the_text_back(tmp_path: Path) -> None:
    odd = "tabs\tand  spaces, é, 漢字, 🙂\n"
    (tmp_path / "a.txt").write_text(WORDS + odd)
    corpus, by_bytes = Corpus(8, 0, str(tmp_path), vocabulary=300), Corpus(8, 0, str(tmp_path))
    assert (
        len(corpus.pieces) == 300 and len(set(corpus.pieces)) == 299
    )  # the byte zero ends documents and is in no text
    assert corpus.bytes_per_token > 1.5 and corpus.source == by_bytes.source
    content = numpy.frombuffer(f"{WORDS}\0{odd}\0".encode(), numpy.uint8)
    tokens = ByPairs(content, 300)
    assert b"".join(tokens.pieces[token] for token in tokens.encode(content)) == content.tobytes()
    held_out = text_of(corpus, corpus.all_held_out())
    assert held_out in (WORDS + odd + "\0").encode() and "🙂" in text_of(by_bytes, by_bytes.all_held_out()).decode()


def test_byte_pairs_are_learnt_from_the_text_to_train_on_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS + 60 * "qqzz ")  # the end is held out
    corpus = Corpus(8, 0, str(tmp_path), vocabulary=300)
    assert b" words" in corpus.pieces and not any(b"qq" in piece for piece in corpus.pieces)


def test_vocabularies_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(ValueError, match="vocabulary: expected 256, which means bytes, or more, got 200"):
        Corpus(8, 0, str(tmp_path), vocabulary=200)
    with pytest.raises(ValueError, match=r"vocabulary: expected at most the \d+ tokens that the text has, got 100000"):
        Corpus(8, 0, str(tmp_path), vocabulary=100_000)


def test_long_texts_are_cut_at_line_ends(tmp_path: Path) -> None:
    lines = b"".join(b"%06d\n" % number for number in range(20_000)) + PIECE_BYTES * b"x" + b"y\nend"
    found = list(pieces(lines))
    assert b"".join(found) == lines and list(pieces(b"")) == []
    assert all(piece.endswith(b"\n") for piece in found[:-1])
    assert sorted(map(len, found))[-1] == PIECE_BYTES + 2  # the long line, alone


def test_a_package_is_laid_out_as_text(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name, content in (("a.rst.gz", b"one\n"), ("b.dict.dz", b"two\n"), ("c.png.gz", b"no")):
        (package / name).write_bytes(gzip.compress(content))
    (package / "d.pod").write_bytes(b"=three\n")
    assert lay(package, tmp_path / "texts") == 3
    texts = [path.read_bytes() for path in sorted((tmp_path / "texts").iterdir())]
    assert texts == [b"one\n", b"two\n", b"=three\n"]
