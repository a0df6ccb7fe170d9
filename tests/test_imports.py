"""`import smet_compile` loads nothing else, and its public names load when they are asked for."""

import ast
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import smet_compile
from tests.support.fresh_process import ROOT, run_python

DOOR = ROOT / "smet_compile" / "__init__.py"
MODULES_ADDED_BY = """
import json, sys
import torch
before = set(sys.modules)
import smet_compile
for name in {names}:
    getattr(smet_compile, name)
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
LOAD_EACH_FIRST = """
import importlib, os
import torch
import smet_compile
for name in {names}:
    if (child := os.fork()) == 0:
        if "." in name:
            importlib.import_module(name)
        else:
            assert getattr(smet_compile, name).__name__ == name
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def added_by_import() -> tuple[list[str], bool]:
    modules, started_cuda = json.loads(run_python("-c", MODULES_ADDED_BY.format(names="()")))
    return modules, started_cuda


@pytest.fixture(scope="module")
def added_by_all_names() -> tuple[list[str], bool]:
    modules, started_cuda = json.loads(run_python("-c", MODULES_ADDED_BY.format(names="smet_compile.__all__")))
    return modules, started_cuda


def test_import_loads_no_other_module(added_by_import: tuple[list[str], bool]) -> None:
    assert added_by_import[0] == ["smet_compile"]


@pytest.mark.parametrize(
    "heavy",
    [
        "triton",
        "transformers",
        "datasets",
        "typer",
        "rich",
        "matplotlib",
        "sympy",
        "networkx",
        "functorch",
        "torch._functorch.aot_autograd",
        "torch._inductor",
        "torch._dynamo",
        "smet_compile.pretrain",
        "smet_compile.ops.kernels",
    ],
)
def test_public_names_load_without(heavy: str, added_by_all_names: tuple[list[str], bool]) -> None:
    assert [name for name in added_by_all_names[0] if name == heavy or name.startswith(heavy + ".")] == []


def test_public_names_do_not_start_cuda(added_by_all_names: tuple[list[str], bool]) -> None:
    assert not added_by_all_names[1]


def test_public_names_leave_torch_as_it_was() -> None:
    settings = "(torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum().item())"
    script = f"import torch; before = {settings}; from smet_compile import *; print(before == {settings})"
    assert run_python("-c", script) == "True\n"


def test_each_public_name_can_be_the_first_to_load() -> None:
    run_python("-c", LOAD_EACH_FIRST.format(names=smet_compile.__all__))


def test_each_room_can_be_the_first_to_load() -> None:
    rooms = [path.stem for path in DOOR.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    modules = [f"smet_compile.{room}" for room in rooms if not room.startswith("__")]
    run_python("-c", LOAD_EACH_FIRST.format(names=[*modules, "smet_compile.passes.pipeline"]))


@pytest.mark.parametrize("name", smet_compile.__all__)
def test_public_name_exists_and_says_what_it_does(name: str) -> None:
    assert (getattr(smet_compile, name).__doc__ or "").strip()


def test_public_names_are_listed_once() -> None:
    assert len(set(smet_compile.__all__)) == len(smet_compile.__all__)
    assert set(smet_compile.__all__) <= set(dir(smet_compile))


def test_type_checkers_see_every_public_name_where_it_is_loaded_from() -> None:
    """The imports that only type checkers read, ``__all__`` and the table of modules say the same."""
    imports = [node for node in ast.walk(ast.parse(DOOR.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = {alias.name: str(node.module) for node in imports for alias in node.names if within_package(node.module)}
    assert ours == smet_compile._MODULES
    assert sorted(ours) == sorted(smet_compile.__all__)


def within_package(module: str | None) -> bool:
    return str(module).startswith("smet_compile.")


def test_modules_do_not_replace_the_functions_of_the_same_name() -> None:
    script = "from smet_compile import Plan, Explanation; import smet_compile.plan, smet_compile.explain as second; "
    script += "from smet_compile import explain, plan; print(plan.__name__, explain.__name__, second is explain)"
    assert run_python("-c", script) == "plan explain True\n"


def test_the_switch_of_the_passes_is_reached_before_any_other_name() -> None:
    script = "import smet_compile\nwith smet_compile.passes.disabled():\n    print('off')"
    assert run_python("-c", script) == "off\n"


@pytest.mark.parametrize("name", ["sparsfy", "Layout", "__path_of_nothing__"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'smet_compile' has no attribute '{name}'"):
        getattr(smet_compile, name)


def test_a_public_name_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smet_compile, "plan", 1)
    assert smet_compile.plan == 1
    smet_compile.plan = ModuleType("plan")
    assert smet_compile.plan == 1


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2.3 of {name}")
    assert smet_compile._find_version() == "1.2.3 of smet-compile"


def test_the_version_of_a_source_tree_is_that_of_its_project_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(smet_compile.__version__, str)
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert smet_compile._find_version() == project_version()


def not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("project", [None, '[project]\nname = "another"\nversion = "3"', "[tool.x]"])
def test_the_version_of_a_lone_copy_is_unknown(project: str | None, tmp_path: Path) -> None:
    """The copy runs without site-packages, so without torch, too."""
    (tmp_path / "smet_compile").mkdir()
    shutil.copy(DOOR, tmp_path / "smet_compile")
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project)
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "]
    command[-1] += "import smet_compile; print(smet_compile.__version__)"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0+unknown\n"
