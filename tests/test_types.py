"""Tests what a type checker knows of a program that uses the library."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from smet_compile.optim import OPTIMIZERS
from smet_compile.plan.request import DTYPES, DtypeName, OptimizerName

PROGRAM = """
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
import smet_compile as smet

model = smet.sparsify(nn.Linear(8, 8), 0.5)
reveal_type(model)  # Linear
reveal_type(smet.materialize(model))  # Linear
reveal_type(smet.export_dense(model))  # Linear
reveal_type(smet.export_dense(nn.Sequential()))  # Sequential

def of_wrapped(one: DistributedDataParallel, other: DataParallel[nn.Linear], optimizer: smet.ActiveAdamW) -> None:
    reveal_type(smet.export_dense(one))  # Module
    reveal_type(smet.export_dense(other))  # Linear
    smet.plan("7b", 0.25, optimizer="lion", dtype="bfloat16", distribution="erk")
    smet.TopologyManager(model, optimizer, total_steps=1, grow=lambda site, context: site.values)

smet.sparsify(model, select="magnitud")  # error
smet.sparsify(model, distribution="even")  # error
smet.sparsify(model, masks="pruned")  # error
smet.export_dense(model, "coo")  # error
smet.plan(model, optimizer="rmsprop")  # error
smet.plan(model, dtype="int8")  # error
smet.sparsify("model")  # error
"""


@pytest.mark.slow
def test_a_type_checker_sees_classes_and_names_through_the_library(tmp_path: Path) -> None:
    """It takes a minute without mypy's cache."""
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    output, _, _ = api.run(["--config-file=", "--cache-dir", str(tmp_path / "cache"), "--strict", str(file)])
    found: dict[int, str] = {}
    for line in output.splitlines():
        place, _, message = line.partition(": ")
        if Path(place.rpartition(":")[0]).name == "program.py" and not message.startswith("note: See"):
            found.setdefault(int(place.rpartition(":")[2]), message)
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        _, marked, expected = line.partition("  # ")
        if expected == "error":
            assert found[number].startswith("error: "), f"{line}: {output}"
        elif marked:
            assert found[number].endswith(f'.{expected}"'), f"{line}: {output}"
        else:
            assert number not in found, f"{line}: {output}"


def test_names_for_a_type_checker_are_those_that_are_taken() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)
    assert set(get_args(DtypeName)) == set(DTYPES)
