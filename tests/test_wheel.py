"""Tests what somebody gets who installs the library: the wheel, used without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.fresh_process import ROOT

STEP = """
import torch, smet_compile as smet

model = smet.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)), density=0.25)
optimizer = smet.ActiveAdamW(model)
before = [p.clone() for p in model.parameters()]
model(torch.randn(16, 64)).square().mean().backward()
optimizer.step()
assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
print(smet.__file__, smet.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of what it is made of, since building leaves files beside its sources."""
    versions = {found.name: found.version for found in metadata.distributions() if found.name in ("pip", "setuptools")}
    if "pip" not in versions or int(versions.get("setuptools", "0").split(".")[0]) < 78:
        pytest.skip("pip and setuptools 78 build the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "smet_compile", source / "smet_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "wheels"))
    (built,) = (folder / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parents[1] / "installed"
    pip("install", str(wheel), "--no-deps", "--no-index", "--target", str(target))
    return target


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "smet_compile").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == tracked
    assert "smet_compile/py.typed" in names
    assert {Path(name).suffix for name in names if "/kernels/native/" in name} >= {".cpp", ".h", ".py"}


def test_an_installed_library_trains_with_its_own_kernels(installed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file, version = run_installed(installed, tmp_path, "-c", STEP, SMET_COMPILE_CACHE=str(cache)).split()
    assert Path(file) == installed / "smet_compile/__init__.py"
    assert f"smet_compile-{version}.dist-info" in os.listdir(installed)
    if shutil.which("g++") or shutil.which("c++"):
        assert any(path.is_file() for path in cache.rglob("*")), "no kernel was compiled from the wheel's sources"


def test_the_command_of_an_installed_library_helps(installed: Path, tmp_path: Path) -> None:
    printed = run_installed(installed, tmp_path, "-m", "smet_compile", "--help")
    assert "pretrain" in printed and "plan" in printed


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def run_installed(installed: Path, folder: Path, *arguments: str, **environment: str) -> str:
    """Runs Python in an empty folder, with the installed library and without the repository."""
    fresh = folder / "fresh"
    fresh.mkdir()
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=fresh,
        env={**os.environ, **environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
