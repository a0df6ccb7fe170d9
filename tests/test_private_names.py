"""Private names of torch are listed by file, and exist: a new torch that lacks one is noticed by its name."""

import json

import pytest

from tests.support.private_names import TABLE, private_names, resolve, scan

OPTIONAL: dict[str, str] = {}
"""Names that some supported torch lacks, with the reason why the package works without them."""

LISTED: dict[str, list[str]] = json.loads(TABLE.read_text())
NAMES = sorted({name for names in LISTED.values() for name in names} - OPTIONAL.keys())


def test_the_table_lists_what_the_package_uses() -> None:
    assert scan() == LISTED, "run `python -m tests.support.private_names > tests/private_names.json`"


def test_each_room_has_one_file_for_them() -> None:
    rooms = [file.split("/")[1] for file in LISTED]
    assert len(rooms) == len(set(rooms)), "a new torch is to break one file a room"


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_exists_in_the_installed_torch(name: str) -> None:
    resolve(name)


def test_what_is_optional_is_used() -> None:
    assert OPTIONAL.keys() <= {name for names in LISTED.values() for name in names}


@pytest.mark.parametrize("name", ["torch._nothing", "torch._dynamo.config.no_setting_of_this_name", "torch.nn._Linear"])
def test_a_name_that_vanished_is_noticed(name: str) -> None:
    with pytest.raises(AttributeError, match=r"does not exist|no_setting_of_this_name"):
        resolve(name)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._C._autograd.x()", ["torch._C._autograd.x"]),
        ("import torch as t\nt._C.f", ["torch._C.f"]),
        ("import torch._inductor.config", ["torch._inductor.config"]),
        ("import torch._inductor.config as c\nc.x = 1", ["torch._inductor.config.x"]),
        ("from torch import _inductor", ["torch._inductor"]),
        ("from torch import nn\nnn.Module._call_impl(1)", ["torch.nn.Module._call_impl"]),
        ("def f():\n    from torch._dynamo import config, exc", ["torch._dynamo.config", "torch._dynamo.exc"]),
        ("from torch.nn.modules.conv import _ConvNd as C", ["torch.nn.modules.conv._ConvNd"]),
        ("import torch\ntorch.f(torch._g).h", ["torch._g"]),
        ("import torch\ntorch.__version__, torch.nn.Linear, _torch._x", []),
        ("from ._torch import _x\nself._x, module._parameters", []),
        ("'torch._C'  # torch._C", []),
    ],
)
def test_scan_of_a_file(source: str, names: list[str]) -> None:
    assert private_names(source) == names
