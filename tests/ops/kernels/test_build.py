"""Tests that the C++ is compiled once and kept, and that plain torch is used where it cannot be compiled."""

import errno
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from smet_compile.ops import torch_insides
from smet_compile.ops.kernels.native import build

compiles = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMET_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(torch_insides, "_warned", set())


@pytest.fixture(scope="module")
def code() -> bytes:
    cxx = build.compiler()
    assert cxx is not None
    with tempfile.TemporaryDirectory() as folder:
        return build._run(Path(folder), "expand", cxx)


@pytest.fixture
def compiled(code: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the name of each library that was compiled; compiling takes no time."""
    names: list[str] = []

    def run(workplace: Path, name: str, cxx: list[str]) -> bytes:
        names.append(name)
        return code

    monkeypatch.setattr(build, "_run", run)
    return names


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def entry_of(name: str = "expand") -> Path:
    cxx = build.compiler()
    assert cxx is not None
    path = build._entry_of(name, cxx)
    assert path is not None
    return path


@compiles
def test_compiled_once(tmp_path: Path) -> None:
    assert build.library("expand") is not None
    (made,) = tmp_path.iterdir()
    before = made.stat().st_mtime_ns
    assert build.library("expand") is not None
    assert [each.stat().st_mtime_ns for each in tmp_path.iterdir()] == [before]


@compiles
def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("bits.h", "expand.cpp"):
        (sources / name).write_bytes((Path(build.__file__).parent / name).read_bytes())
    monkeypatch.setattr(build, "_HERE", sources)
    entries = [entry_of()]
    for name in ("bits.h", "expand.cpp"):
        (sources / name).write_text((sources / name).read_text() + "\n// changed\n")
        entries.append(entry_of())
    assert len(set(entries)) == 3


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compiler() is None
    with pytest.warns(UserWarning, match="CXX=no-such-compiler was not found; plain torch is used"):
        assert build.library("tiles") is None


@compiles
def test_a_compiler_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    found = build.compiler()
    assert found is not None
    monkeypatch.setenv("CXX", f"{found[0]} -DSOMETHING")
    assert build.compiler() == [found[0], "-DSOMETHING"] and build.library("expand") is not None


@compiles
def test_an_open_quotation_in_CXX(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "-O3')
    with pytest.warns(UserWarning, match='CXX=g\\+\\+ "-O3 was not found; plain torch is used'):
        assert build.library("tiles") is None


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "one byte": lambda b: b[:1],
    "only a checksum": lambda b: b[-32:],
    "another file": lambda b: b"no library",
    "a tenth": lambda b: b[: len(b) // 10],
    "half": lambda b: b[: len(b) // 2],
    "without its end": lambda b: b[:-1],
    "without its checksum": lambda b: b[:-32],
    "longer": lambda b: b + b"\0",
    "zeros": lambda b: bytes(len(b)),
    "zeros in the middle": lambda b: b[:4096] + bytes(len(b) - 8192) + b[-4096:],
    "zeros at the end": lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2),
    "one bit": lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:],
    "one bit of its checksum": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
    "twice": lambda b: b + b,
}


@compiles
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_anew(compiled: list[str], code: bytes, damage: str) -> None:
    assert build.library("expand") is not None
    path = entry_of()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert build.read_entry(path) is None
    assert build.library("expand") is not None
    assert path.read_bytes() == whole and build.read_entry(path) == code and compiled == ["expand"] * 2


@compiles
def test_a_library_of_another_name_is_not_loaded(compiled: list[str]) -> None:
    assert build.library("expand") is not None
    entry_of().rename(entry_of("tiles"))
    assert build.read_entry(entry_of("tiles")) is None


@compiles
@pytest.mark.parametrize("what", ["link", "pipe", "folder", "written by others"])
def test_an_entry_that_is_no_file_of_this_user_is_not_loaded(compiled: list[str], tmp_path: Path, what: str) -> None:
    assert build.library("expand") is not None
    path = entry_of()
    other = path.rename(tmp_path / "other")
    if what == "link":
        path.symlink_to(other)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes(other.read_bytes())
        path.chmod(0o666)
    assert build.read_entry(path) is None
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert build.library("expand") is not None
    assert compiled == ["expand"] * 2
    assert (path.is_file() and not path.is_symlink() and build.read_entry(path) is not None) is (what != "folder")
    assert len(given) == (what == "folder")


@compiles
def test_a_folder_that_others_can_write_to(compiled: list[str], tmp_path: Path, temporary: Path) -> None:
    path = entry_of()
    path.write_bytes(b"somebody else's")
    tmp_path.chmod(0o777)
    message = r"other users may write to .* \(mode 777\), which chmod go-w .*compiles them anew; set SMET_COMPILE_CACHE"
    with pytest.warns(UserWarning, match=message) as given:
        assert build.library("expand") is not None and build.library("expand") is not None
    assert len(given) == 1 and str(tmp_path) in str(given[0].message)
    assert compiled == ["expand"] * 2
    assert path.read_bytes() == b"somebody else's" and list(temporary.iterdir()) == []


@compiles
def test_a_temporary_folder_that_others_can_write_to(
    compiled: list[str], tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, make = [], build.new_workplace

    def made(folder: Path) -> AbstractContextManager[Path]:
        used.append(folder)
        return make(folder)

    temporary.chmod(0o777)
    monkeypatch.setenv("SMET_COMPILE_CACHE", str(temporary))
    monkeypatch.setattr(build, "new_workplace", made)
    with pytest.warns(UserWarning, match="other users may write to"):
        assert build.library("expand") is not None
    assert used == [Path("/tmp").resolve()]


@compiles
def test_a_user_without_a_home(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SMET_COMPILE_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(
        UserWarning, match=r"cannot be kept in ~/.cache/smet_compile: Could not determine home directory"
    ):
        assert build.library("expand") is not None


@compiles
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to(
    compiled: list[str], tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(build, "write_entry", refuse)
    with pytest.warns(UserWarning, match=f"cannot be kept in {tmp_path}: .*{os.strerror(number)}") as given:
        assert build.library("expand") is not None and build.library("expand") is not None
    assert len(given) == 1 and compiled == ["expand"] * 2
    assert list(tmp_path.iterdir()) == [temporary] and list(temporary.iterdir()) == []


@compiles
def test_no_folder_can_be_made_in_the_cache(
    compiled: list[str], tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.new_workplace

    def refuse(folder: Path) -> AbstractContextManager[Path]:
        if folder == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system")
        return made(folder)

    assert build.library("expand") is not None
    monkeypatch.setattr(build, "new_workplace", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library("expand") is not None  # what is there is read
    entry_of().unlink()
    with pytest.warns(UserWarning, match="Read-only file system"):
        assert build.library("expand") is not None
    assert compiled == ["expand"] * 2 and list(temporary.iterdir()) == []


@compiles
def test_a_compiler_that_fails_in_the_cache_works_elsewhere(
    code: bytes, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler fails as on a full disk, which it notices first."""
    script = compiler_of(
        code, tmp_path, f'case "$made" in {temporary}/*) ;; *) echo "no space left" >&2; exit 1;; esac'
    )
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(UserWarning, match="cannot be kept in .*ended with status 1: no space left"):
        assert build.library("expand") is not None
    assert list(temporary.iterdir()) == []


def compiler_of(code: bytes, folder: Path, before: str) -> Path:
    """Makes a compiler that runs ``before``, where $made is its output, and writes ``code`` there."""
    (folder / "code").write_bytes(code)
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nfor made; do :; done\n{before}\ncp {folder}/code "$made"\n')
    script.chmod(0o700)
    return script


@pytest.fixture
def permissive_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


@compiles
@pytest.mark.usefixtures("permissive_umask")
def test_a_group_cannot_write_what_is_kept(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMET_COMPILE_CACHE", str(tmp_path / "new" / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library("expand") is not None and build.library("expand") is not None
    assert compiled == ["expand"]
    assert [path.stat().st_mode & 0o777 for path in (entry_of(), entry_of().parent, tmp_path / "new")] == [
        0o644,
        0o700,
        0o700,
    ]


@compiles
def test_each_library_is_itself_though_descriptors_have_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMET_COMPILE_CACHE")
    numbers, make = [], os.memfd_create

    def made(name: str) -> int:
        numbers.append(make(name))
        return numbers[-1]

    monkeypatch.setattr(os, "memfd_create", made)
    found = {name: build.library(name) for name in ("adamw", "expand", "tiles", "adamw")}
    functions = {"adamw": "update_all", "expand": "unpack", "tiles": "masked_fp32"}
    assert len(set(numbers)) == 1 and len(numbers) == 4
    for name, library in found.items():
        assert [hasattr(library, function) for function in functions.values()] == [name == each for each in functions]


@compiles
def test_without_memory_that_may_be_executed(
    compiled: list[str], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert hasattr(build.library("expand"), "unpack") and list(temporary.iterdir()) == []
    monkeypatch.delattr(os, "memfd_create")
    assert hasattr(build.library("expand"), "unpack") and list(temporary.iterdir()) == []


@compiles
def test_leftovers_of_killed_processes_are_removed(compiled: list[str], tmp_path: Path) -> None:
    others = tmp_path / "others"
    leftovers = {name: tmp_path / f"smet_compile_workplace_{name}" for name in ("old", "new", "file", "link")}
    others.mkdir()
    for name in ("old", "new"):
        leftovers[name].mkdir()
        (leftovers[name] / "expand.so").write_bytes(b"half")
    leftovers["file"].write_bytes(b"")
    leftovers["link"].symlink_to(others)
    for name in ("old", "file"):
        os.utime(leftovers[name], (0, 0))
    assert build.library("expand") is not None
    assert [name for name, path in leftovers.items() if path.exists()] == ["new", "file", "link"] and others.exists()


@compiles
def test_several_processes_compile_at_a_time(compiled: list[str], tmp_path: Path) -> None:
    path, children = entry_of(), []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            os._exit(0 if hasattr(build.library("expand"), "unpack") else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert list(tmp_path.iterdir()) == [path] and build.read_entry(path) is not None


@compiles
def test_a_compiler_gets_nothing_to_leave_behind(code: bytes, tmp_path: Path, temporary: Path) -> None:
    """A killed compiler leaves its files in a folder that is removed."""
    script = compiler_of(code, tmp_path, 'echo half > "$TMPDIR/half.s"')
    with build.new_workplace(temporary) as workplace:
        assert build._run(workplace, "expand", [str(script)]) == code
        assert (workplace / "half.s").exists() and workplace.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


@compiles
def test_code_that_does_not_compile_gives_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vectors.h").write_text("")
    (tmp_path / "tiles.cpp").write_text("this is no C++\n")
    monkeypatch.setattr(build, "_HERE", tmp_path)
    message = r"tiles.cpp did not compile .*ended with status 1: .*error: .*plain torch is used"
    with pytest.warns(UserWarning, match=message) as given:
        assert build.library("tiles") is None
    assert len(given) == 1


@compiles
def test_a_cache_that_cannot_be_made(compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMET_COMPILE_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*folder: .*Not a directory"):
        assert build.library("expand") is not None
    assert (tmp_path / "file").read_text() == ""
