"""`import smet_compile` is light, and the door shows what it says."""

import json

import pytest

import smet_compile
from tests.support.fresh_process import run_python

WHAT_IMPORTING_ADDS = """
import json, sys
import torch
before = set(sys.modules)
import smet_compile
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


@pytest.fixture(scope="module")
def imported() -> tuple[list[str], bool]:
    modules, started_cuda = json.loads(run_python("-c", WHAT_IMPORTING_ADDS))
    return modules, started_cuda


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
        "torch._inductor",
        "torch._dynamo",
        "smet_compile.pretrain",
        "smet_compile.ops.kernels",
    ],
)
def test_import_leaves_it_out(heavy: str, imported: tuple[list[str], bool]) -> None:
    assert [name for name in imported[0] if name == heavy or name.startswith(heavy + ".")] == []


def test_import_does_not_start_cuda(imported: tuple[list[str], bool]) -> None:
    assert not imported[1]


def test_import_leaves_torch_as_it_was() -> None:
    settings = "(torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum().item())"
    script = f"import torch; before = {settings}; import smet_compile; print(before == {settings})"
    assert run_python("-c", script) == "True\n"


@pytest.mark.parametrize("name", smet_compile.__all__)
def test_public_name_exists_and_says_what_it_does(name: str) -> None:
    assert (getattr(smet_compile, name).__doc__ or "").strip()


def test_public_names_are_listed_once() -> None:
    assert len(set(smet_compile.__all__)) == len(smet_compile.__all__)
