"""A checkpoint gives back exactly what it was given, or refuses it by its path; a file is written and read whole."""

import collections
import enum
import json
import os
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

from smet_compile.runtime import checkpoint_file
from tests.support.snapshots import assert_same


def there_and_back(tmp_path: Path, extra: Any) -> Any:
    checkpoint_file.write(tmp_path / "a", {"extra": extra})
    return checkpoint_file.read(tmp_path / "a")["extra"]


A, B, C = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)


@pytest.mark.parametrize(
    "extra",
    [
        {"ema": {"weight": A}, "ema.weight": B},
        {"ema.weight": B, "ema": {"weight": A}},
        {1: A, "1": B},
        {1: A, "1": B, (1,): C},
        {None: A, "None": B},
        {True: A, "True": B},
        {1.5: A, "1.5": B},
        {"a": [A], "a.0": B},
        {"a": (A,), "a.0": B},
        {"a": {"b.c": A}, "a.b": {"c": B}},
        {"": A, ".": B, "..": C},
        {"a": {"": A}, "a.": B},
        {"x#2": A, "x": {"y": B}, "x.y": C, "x.y#2": A + 7},
        {"\ud800": A, "?": B},
        {"json": A, "$tensor": B, "$tuple": {"$items": C}},
        OrderedDict([("b", A), ("a", {"b": B}), ("a.b", C)]),
        {(1, "a"): A, (1, ("a", 2)): B},
    ],
    ids=repr,
)
def test_names_are_injective(tmp_path: Path, extra: Any) -> None:
    assert_same(there_and_back(tmp_path, extra), extra)


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    x = torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]])
    real = torch.arange(24.0).reshape(2, 3, 4)
    extra = {
        "x": x,
        "conj": x.conj(),
        "conj transposed": x.conj().t(),
        "neg": x.conj().imag,
        "one neg": torch.tensor([1 + 2j]).conj().imag,
        "neg scalar": torch.tensor(1 + 2j).conj().imag,
        "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(3, 0, dtype=torch.bool),
        "square": real[0, :, :3],
        "its transpose": real[0, :, :3].t(),
        "flipped": real.flip(0),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "bool": torch.tensor([True, False, True]),
        "parameter": nn.Parameter(torch.ones(2)),
        "float8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "uint64": torch.tensor([2**63 + 1], dtype=torch.uint64),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }
    back = there_and_back(tmp_path, extra)
    for name, tensor in extra.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert type(back[name]) is torch.Tensor and not back[name].is_conj() and not back[name].is_neg()
        expected = (
            tensor.detach().resolve_conj().resolve_neg().contiguous().clone(memory_format=torch.contiguous_format)
        )
        assert bytes(back[name].reshape(-1).view(torch.uint8)) == bytes(expected.reshape(-1).view(torch.uint8)), name


def test_numbers_and_containers_of_every_kind(tmp_path: Path) -> None:
    extra = {
        "floats": [0.1, -0.0, float("inf"), -float("inf"), 5e-324, 1e308],
        "integers": [2**63, -(10**100), True, False, None],
        "counter": Counter({3: 2, 1: 5}),
        "ordered": OrderedDict([("z", 1), ("a", (2, [3, ()]))]),
        "order": {"z": 1, "a": 2, "m": 3},
        "text": "\ud800 \0 \u00e4 \U0001f600",
    }
    back = there_and_back(tmp_path, extra)
    assert repr(back) == repr(extra)
    assert np.isnan(there_and_back(tmp_path, float("nan")))


def test_numpy_scalars_become_the_numbers_they_are(tmp_path: Path) -> None:
    given = [np.float32(0.1), np.float64(0.1), np.float16(0.1), np.int64(-5), np.uint8(7), np.bool_(True), np.str_("a")]
    back = there_and_back(tmp_path, given)
    assert back == [float(np.float32(0.1)), 0.1, float(np.float16(0.1)), -5, 7, True, "a"]
    assert [type(value) for value in back] == [float, float, float, int, int, bool, str]
    assert there_and_back(tmp_path, {np.int64(3): 1}) == {3: 1}


class Color(enum.IntEnum):
    RED = 1


class Name(str):
    pass


class Point(NamedTuple):
    x: int


class Own(torch.Tensor):
    pass


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (Color.RED, "Color"),
        (Name("a"), "Name"),
        (Point(1), "Point"),
        (collections.defaultdict(list), "defaultdict"),
        (1 + 2j, "complex"),
        (np.complex64(1), "complex64"),
        (np.longdouble(1), "longdouble"),
        (np.timedelta64(1), "timedelta64"),
        (np.ones(2), "ndarray"),
        (b"x", "bytes"),
        ({1, 2}, "set"),
        (10**5000, "int"),
        (nested(3000), "in one another"),
        ({torch.zeros(()): 1}, "as keys"),
        ({b"a": 1}, "as keys"),
        ({float("nan"): 1}, "as keys.*nan"),
        (torch.ones(2, 2).to_sparse(), "layout torch.sparse"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).as_subclass(Own), "Own"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_cannot_be_kept_is_refused_by_its_path(tmp_path: Path, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.extra\.a\.[01].*{match}"):
        checkpoint_file.write(tmp_path / "a", {"extra": {"a": [0, value] if not isinstance(value, dict) else [value]}})
    assert os.listdir(tmp_path) == []


def test_a_state_dict_keeps_its_versions(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    back = there_and_back(tmp_path, {"ema": state})["ema"]
    assert type(back) is OrderedDict and back._metadata == state._metadata and back._metadata["1"] == {"version": 2}
    assert_same(back, state)


def test_what_is_loaded_is_ours_alone(tmp_path: Path) -> None:
    """Writable, apart from one another though one tensor was saved twice, and not of the file."""
    x = torch.ones(5000)
    back = there_and_back(tmp_path, {"x": x, "again": x, "part": x[:3]})
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    os.truncate(tmp_path / "a", 0)
    back["x"].add_(1)
    assert back["again"].eq(1).all() and back["part"].eq(1).all() and back["x"].eq(2).all()
    assert all(t._base is None for t in back.values())


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    extra = {str(dtype): torch.ones(3).to(dtype) for dtype in checkpoint_file.DTYPES.values()}
    checkpoint_file.write(tmp_path / "a", {"extra": extra, "odd length": torch.ones(5, dtype=torch.uint8)})
    with safe_open(tmp_path / "a", framework="pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {read[f"checkpoint.extra.{name}"].dtype for name in extra} == set(checkpoint_file.DTYPES.values())
    assert set(load((tmp_path / "a").read_bytes())) == set(read)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_bad_headers(tmp_path: Path) -> None:
    checkpoint_file.write(tmp_path / "a", {"x": torch.ones(4), "y": torch.ones(4)})
    content = (tmp_path / "a").read_bytes()
    header, data = header_of(content)
    x = header["checkpoint.x"]
    bad = {
        "header within": (2**63).to_bytes(8, "little") + content[8:],
        "header within the": (len(content)).to_bytes(8, "little") + content[8:],
        "not a whole": with_header(b"[" * 100_000, data),
        "JSON object": with_header([1], data),
        "each key once": with_header(b'{"__metadata__":{},"__metadata__":{}}', data),
        "strings as metadata": with_header(header | {"__metadata__": {"smet_compile": 3}}, data),
        "as dtype": with_header(header | {"checkpoint.x": x | {"dtype": "F128"}}, data),
        "list of sizes": with_header(header | {"checkpoint.x": x | {"shape": [True]}}, data),
        "as many bytes": with_header(header | {"checkpoint.x": x | {"shape": [2**62]}}, data),
        "its data at byte": with_header(header | {"checkpoint.x": header["checkpoint.y"]}, data),
        "bytes of data": with_header(header, data + b"\0"),
        "shape and data_offsets": with_header(header | {"checkpoint.x": 3}, data),
        "altered": with_header(header | {"__metadata__": {"smet_compile": "[]"}}, data),
        "another safetensors file": with_header(header | {"__metadata__": {}}, data),
        "altered: ": with_header(header | {"__metadata__": {"smet_compile": '{"version": true, "sha256": ""}'}}, data),
    }
    for match, text in bad.items():
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(ValueError, match=f"bad: .*{match}"):
            checkpoint_file.read(tmp_path / "bad")


def test_bytes_that_are_no_bool(tmp_path: Path) -> None:
    checkpoint_file.write(tmp_path / "a", {"x": torch.tensor([True, False])})
    content = (tmp_path / "a").read_bytes()
    place = header_of(content)[0]["checkpoint.x"]["data_offsets"][0] + len(content) - len(header_of(content)[1])
    (tmp_path / "a").write_bytes(content[:place] + b"\7" + content[place + 1 :])
    with pytest.raises(ValueError, match=r"checkpoint\.x.*bool"):
        checkpoint_file.read(tmp_path / "a")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a checkpoint file"):
        checkpoint_file.read(tmp_path / "pipe")


@pytest.mark.parametrize("count", [0, 4])
def test_a_file_that_ends_before_its_header_says_what_it_lacks(count: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * count)
    with pytest.raises(ValueError, match=f"expected 8 bytes or more, got {count}: the file was cut"):
        checkpoint_file.read(tmp_path / "a")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_file.write(tmp_path / "a", {"x": torch.ones(5000), "y": torch.ones(5000)})
    whole, reads = os.preadv, []

    def cut(*args: Any) -> int:
        reads.append(args)
        if len(reads) == 4:
            os.truncate(tmp_path / "a", 30_000)
        return whole(*args)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(ValueError, match="the file was cut"):
        checkpoint_file.read(tmp_path / "a")


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_file.write(tmp_path / "a", {"x": torch.ones(5000)})
    checkpoint_file.write(tmp_path / "b", {"x": torch.zeros(7000)})
    whole = os.preadv

    def replace(*args: Any) -> int:
        if (tmp_path / "b").exists():
            os.replace(tmp_path / "b", tmp_path / "a")
        return whole(*args)

    monkeypatch.setattr(os, "preadv", replace)
    assert checkpoint_file.read(tmp_path / "a")["x"].eq(1).all()
    assert checkpoint_file.read(tmp_path / "a")["x"].shape == (7000,)


def test_several_writers_and_a_reader_of_one_path(tmp_path: Path) -> None:
    """Every save succeeds, whatever stands there is whole, and nothing is left."""
    path, errors = tmp_path / "a", []
    checkpoint_file.write(path, {"x": torch.ones(3)})

    def save(size: int) -> None:
        try:
            for _ in range(15):
                checkpoint_file.write(path, {"x": torch.full((size,), float(size))})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(size,)) for size in (3000, 70_000, 500)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        x = checkpoint_file.read(path)["x"]
        assert x.eq(x.numel()).all() or x.numel() == 3
    assert not errors
    assert os.listdir(tmp_path) == ["a"]


def test_the_leftover_of_a_killed_save_goes_with_the_next_but_no_living_ones(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 250)
    partial, file = checkpoint_file._create_locked(path)
    os.write(file, b"half")
    checkpoint_file.write(path, {"x": 1})
    checkpoint_file.write(tmp_path / "other", {"x": 1})
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "other", partial.name])  # somebody is still writing
    os.close(file)  # as the kernel does for a process that was killed
    checkpoint_file.write(tmp_path / "other", {"x": 1})
    assert partial.exists()  # another path's leftover
    checkpoint_file.write(path, {"x": 2})
    assert sorted(os.listdir(tmp_path)) == [path.name, "other"]
    assert checkpoint_file.read(path) == {"x": 2}


def test_a_file_taken_for_a_leftover_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the creation of a file and its lock another process may sweep it away; then another is created."""
    lock, swept = checkpoint_file.fcntl.flock, []

    def sweep_first(file: int, how: int) -> None:
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        lock(file, how)

    monkeypatch.setattr(checkpoint_file.fcntl, "flock", sweep_first)
    checkpoint_file.write(tmp_path / "a", {"x": 1})
    assert len(swept) == 1 and checkpoint_file.read(tmp_path / "a") == {"x": 1}
