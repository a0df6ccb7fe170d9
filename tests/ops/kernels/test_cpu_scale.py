"""Tests the steps of SCALE in C++ against plain torch.

A norm's squares add up in another order, in fp64, so that a weight may differ by the last bit of its step, and one in
bf16, whose noise is the same, rarely by one last place.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smet_compile.format import Layout
from smet_compile.ops import plain
from smet_compile.ops.choose import UpdateCase, update_kernel_of
from smet_compile.ops.kernels.native import jobs
from smet_compile.ops.kernels.native import scale as native
from smet_compile.ops.rules import find_rule
from smet_compile.ops.updates import Update
from smet_compile.optim.scale import SCALE, SCALE_MOMENTUM
from tests.ops.kernels.adamw_cases import Case, copy_of, update_of
from tests.support.pairs import pairwise

CPU = torch.device("cpu")
CASES = {
    "single": Case((37, 61), (1, 1)),
    "single_stack": Case((3, 70, 50), (1, 1)),
    "single_sparse": Case((300, 300), (1, 1), 0.003),
    "single_of_several_spans": Case((3, 300, 300), (1, 1), 0.3),
    "runs": Case((40, 97), (1, 16)),
    "columns": Case((40, 97), (16, 1)),
    "tiles": Case((2, 50, 70), (16, 32)),
    "odd_tiles": Case((31, 45), (3, 7)),
    "large_tiles": Case((300, 290), (64, 128)),
    "one_block": Case((5, 5), (8, 8), 1.0),
    "plain": Case((50, 41)),
    "plain_stack": Case((3, 20, 41)),
    "plain_of_several_spans": Case((300, 700)),
}
DTYPES = [torch.float32, torch.bfloat16]
STORED = list(itertools.product(DTYPES, [None, *DTYPES], [None, 5]))
"""Dtypes of weights and of a running mean, if one is kept, and the seed of the noise of roundings, if any."""
pytestmark = pytest.mark.skipif(native.library("scale") is None, reason="there is no C++ compiler")


def scale_update(
    case: Case, dtype: torch.dtype, mean: torch.dtype | None, seed: int | None, by_column: bool, broken: bool = False
) -> Update:
    given = update_of(case, dtype, mean or torch.float32, seed, broken)
    return dataclasses.replace(
        given,
        rule=SCALE_MOMENTUM if mean else SCALE,
        slots=given.slots[:1] if mean else (),
        generation=None,
        births=None,
        layout=given.layout or Layout.of(case.shape, (1, 1)),
        units_are_columns=by_column,
        options=(0.9, 0.1),
        warmup_steps=0,
        initial_warmup_steps=0,
        prepared={},
    )


def places_between(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kind = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return (x.contiguous().view(kind).int() - y.contiguous().view(kind).int()).abs()


def check_step(given: Update) -> Update:
    """Compares the step with plain torch's, and returns what the kernel made."""
    actual, expected = copy_of(given, CPU), copy_of(given, CPU)
    native.update_all([actual])
    plain.update_all([expected])
    assert torch.equal(actual.num_skipped, expected.num_skipped) and int(actual.step) == int(expected.step)
    for x, y in zip(actual.slots, expected.slots, strict=True):
        assert torch.equal(x, y)
    x, y, before = actual.values, expected.values, given.values
    assert not torch.equal(y, before) or len(before) == 1  # the one block was skipped
    if x.dtype == torch.float32:
        moved, expected_move = (x - before).double(), (y - before).double()
        # a last place of a weight, and one of its step
        slack = before.abs().max() * 2**-23 + expected_move.abs().max() * 2**-22
        assert float((moved - expected_move).abs().max()) <= float(slack)
    else:
        apart = places_between(x, y)
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    return actual


@pytest.mark.parametrize(
    ("case", "stored", "kind"), pairwise(list(CASES), STORED, list(itertools.product([0, 1], [0, 1]))), ids=str
)
def test_a_step_is_that_of_plain_torch(case: str, stored: tuple[Any, Any, int | None], kind: tuple[int, int]) -> None:
    """Every case meets every way to store weights and means, units of both kinds, and gradients that are not finite."""
    by_column, broken = map(bool, kind)
    given = scale_update(CASES[case], *stored, by_column, broken)
    actual = check_step(given)
    assert (int(actual.num_skipped) > int(given.num_skipped)) == broken


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("case", ["single", "tiles", "plain"])
def test_each_unit_moves_by_its_rate(case: str, by_column: bool) -> None:
    """Without decay the step of a unit has the norm lr · d^(-p), computed here by hand."""
    given = scale_update(CASES[case], torch.float32, None, None, by_column)
    given = copy_of(given, CPU, options=(0.9, 0.0))
    actual = copy_of(given, CPU)
    native.update_all([actual])
    moved = actual.values - given.values
    if given.topology is not None:
        moved = plain.unpack(moved, given.topology)
    assert given.layout is not None
    norms = moved.view(-1, *given.layout.matrix).norm(dim=1 if by_column else 2)
    rate = float(given.lr) * given.density_rate
    assert all(math.isclose(float(norm), rate, rel_tol=1e-4) for norm in norms.flatten() if norm > 0)


def test_a_unit_without_a_gradient_stays() -> None:
    given = scale_update(CASES["single"], torch.float32, None, None, False)
    given.grad.zero_()
    actual = copy_of(given, CPU, options=(0.9, 0.0))
    native.update_all([actual])
    assert torch.equal(actual.values, given.values) and int(actual.num_skipped) == int(given.num_skipped)


def test_many_parameters_in_one_call_with_any_number_of_threads() -> None:
    given = [scale_update(case, torch.bfloat16, None, n, n % 2 == 0) for n, case in enumerate(CASES.values())]
    together, alone = ([copy_of(each, CPU) for each in given] for _ in range(2))
    before, versions = torch.get_num_threads(), [[t._version for t in each.changed()] for each in together]
    try:
        torch.set_num_threads(2)
        native.update_all(together)
        torch.set_num_threads(1)
        for each in alone:
            native.update_all([each])
    finally:
        torch.set_num_threads(before)
    for one, other, its_versions in zip(together, alone, versions, strict=True):
        assert torch.equal(one.values, other.values)
        assert all(t._version > v for t, v in zip(one.changed(), its_versions, strict=True))


def test_no_active_block() -> None:
    given = scale_update(CASES["single"], torch.float32, None, None, False)
    assert given.topology is not None
    empty = given.topology.from_mask(torch.zeros(37 * 61, dtype=torch.bool), given.topology.layout)
    update = copy_of(given, CPU, topology=empty, values=torch.zeros(0), grad=torch.zeros(0))
    native.update_all([update])
    assert int(update.step) == int(given.step) + 1 and int(update.num_skipped) == int(given.num_skipped)


def test_the_struct_is_that_of_the_source() -> None:
    """Names and order of the members are those in C++, since nothing else checks them."""
    source = (Path(native.__file__).parent / "scale.cpp").read_text()
    body = re.search(r"struct Update \{(.*?)\n\};", source, re.S)
    assert body is not None
    lines = re.sub(r"//.*", "", body[1]).split(";")
    types = "void|int64_t|double|uint8_t|const"
    names = [name for line in lines for name in re.findall(r"\w+", line) if not re.fullmatch(types, name)]
    assert names == [name for name, _ in native.Job._fields_]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rule": find_rule("adamw")}, "rule scale only"),
        ({"warmup_steps": 10}, "ages of blocks"),
        ({"sum_over_ranks": lambda squares: squares}, "a shard"),
        ({"first_place": 10}, "a shard"),
        ({"layout": None}, "dtype, memory layout or device"),
        ({"values": torch.zeros(50, 41, dtype=torch.float64)}, "dtype, memory layout or device"),
        ({"values": torch.zeros(41, 50).t()}, "dtype, memory layout or device"),
    ],
)
def test_other_updates_are_left_to_others(changes: dict[str, Any], reason: str) -> None:
    given = scale_update(CASES["plain"], torch.float32, None, None, False)
    assert native.refusal(UpdateCase(given)) is None and update_kernel_of(given).name == "cpu_scale"
    changed = dataclasses.replace(given, **changes, prepared={})
    found = native.refusal(UpdateCase(changed))
    assert found is not None and reason in found and update_kernel_of(changed).name != "cpu_scale"


def test_a_gradient_of_another_dtype_is_named() -> None:
    given = scale_update(CASES["plain"], torch.float32, None, None, False)
    given.grad = given.grad.double()
    with pytest.raises(ValueError, match=r"expected a gradient of torch.float32 and \(50, 41\) on the CPU, got"):
        jobs.update_all("scale", native._job, [given])
