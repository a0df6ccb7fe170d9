"""The C++ is compiled once, kept, and done without where it cannot be compiled."""

from pathlib import Path

import pytest

from smet_compile.ops.kernels.native import build

compiles = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMET_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "library", build.library.__wrapped__)


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
    for name in ("vectors.h", "expand.cpp"):
        (sources / name).write_bytes((Path(build.__file__).parent / name).read_bytes())
    monkeypatch.setattr(build, "_HERE", sources)
    cxx = build.compiler()
    assert cxx is not None
    first = build._kept("expand", cxx)
    (sources / "expand.cpp").write_text((sources / "expand.cpp").read_text() + "\n// changed\n")
    assert build._kept("expand", cxx) != first


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
def test_a_broken_library_is_made_again(tmp_path: Path) -> None:
    cxx = build.compiler()
    assert cxx is not None
    kept = build._kept("expand", cxx)
    kept.write_bytes(b"no library")
    assert build.library("expand") is not None and kept.stat().st_size > 1000


@compiles
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_can_write_is_not_loaded(tmp_path: Path, what: str) -> None:
    cxx = build.compiler()
    assert cxx is not None
    kept = build._kept("expand", cxx)
    kept.write_bytes(b"somebody else's")
    (tmp_path if what == "folder" else kept).chmod(0o777)
    assert build.library("expand") is not None
    assert (kept.read_bytes() == b"somebody else's") is (what == "folder")


@compiles
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SMET_COMPILE_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    assert build.library("expand") is not None


@compiles
def test_what_does_not_compile_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vectors.h").write_text("")
    (tmp_path / "tiles.cpp").write_text("this is no C++\n")
    monkeypatch.setattr(build, "_HERE", tmp_path)
    with pytest.warns(UserWarning, match=r"tiles.cpp did not compile .*plain torch is used"):
        assert build.library("tiles") is None


@compiles
def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMET_COMPILE_CACHE", str(tmp_path / "file" / "folder"))
    assert build.library("expand") is not None
    assert (tmp_path / "file").read_text() == ""
