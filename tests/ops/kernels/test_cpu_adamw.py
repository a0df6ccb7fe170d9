"""Tests the optimizer step in C++ against plain torch.

Moments and their codes and roundings are the same bits. Weights differ by the last bits of a step, since torch takes
square roots that are not rounded to nearest: so bf16 weights, whose noise is the same, may differ in one last place.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smet_compile.format import Topology
from smet_compile.ops import plain
from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.kernels.native import adamw as native
from smet_compile.ops.rules import find_rule
from smet_compile.ops.updates import Update, check_names
from tests.ops.kernels.adamw_cases import (
    NO_WARMUP,
    SHARDED,
    SHARDED_DTYPES,
    Case,
    copy_of,
    differences,
    joined,
    sharded,
    tensors_of,
    update_of,
)
from tests.ops.kernels.tolerances import relative_rms
from tests.support.pairs import pairwise

CPU = torch.device("cpu")
CASES = {
    "single": Case((37, 61), (1, 1)),
    "single_stack": Case((3, 70, 50), (1, 1)),
    "single_sparse": Case((300, 300), (1, 1), 0.02),
    "single_of_several_spans": Case((3, 300, 300), (1, 1), 0.03),
    "runs": Case((40, 97), (1, 16)),
    "long_runs": Case((9, 1900), (1, 700)),
    "runs_of_a_quarter_group": Case((5, 1100), (1, 256)),
    "runs_of_half_a_group": Case((300, 1030), (1, 512), 0.1),
    "long_columns": Case((310, 40), (300, 1)),
    "columns": Case((40, 97), (16, 1)),
    "tiles": Case((2, 50, 70), (16, 32)),
    "odd_tiles": Case((31, 45), (3, 7)),
    "large_tiles": Case((300, 290), (64, 128)),
    "wide_tile": Case((4, 1500), (2, 1100)),
    "one_block": Case((5, 5), (8, 8), 1.0),
    "plain": Case((50, 41)),
    "scalar": Case(()),
}
KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "shared": {"rule": find_rule("naive_adamw")},
    "no_warmup": {"options": {**NO_WARMUP, "weight_decay": 0.0}},
    "no_initial_warmup": {"options": {"initial_warmup_steps": 0}},
    "eps0": {"options": {"eps": 0.0}},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES, MOMENTS = [torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16, torch.uint8]
STORED = list(itertools.product(DTYPES, MOMENTS, [None, 5]))
"""Dtypes of weights and moments, and the seed of the noise with which they are rounded, if any."""
every_moment = pytest.mark.parametrize("moments", MOMENTS, ids=["fp32", "bf16", "codes"])

pytestmark = pytest.mark.skipif(native.library("adamw") is None, reason="there is no C++ compiler")


def assert_same_step(actual: Update, expected: Update, before: torch.Tensor) -> None:
    others = tensors_of(expected)
    for name, x in tensors_of(actual).items():
        y = others[name]
        if x is None or y is None:
            assert x is y is None
        elif name != "values":
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name
    x, y = actual.values, expected.values
    assert torch.equal(x == before, y == before) or x.dtype == torch.bfloat16  # skipped weights stay, to the bit
    if x.dtype == torch.float32:
        moved, expected_move = (x - before).double(), (y - before).double()
        slack = before.abs().max() * 2**-24  # the error with which a weight is stored, whatever its step
        assert relative_rms(moved, expected_move) < 1e-6 + float(slack / expected_move.norm().clamp(min=1e-30))
    else:
        places = (x.view(torch.int16).int() - y.view(torch.int16).int()).abs()
        assert places.max() <= 1 and (places > 0).float().mean() < 1e-3


def check_step(given: Update) -> Update:
    """Compares the step with plain torch's, and returns what the kernel made."""
    actual, expected = copy_of(given, CPU), copy_of(given, CPU)
    native.update_all([actual])
    plain.update_all([expected])
    assert_same_step(actual, expected, given.values)
    return actual


@pytest.mark.parametrize(("case", "stored", "kind"), pairwise(list(CASES), STORED, list(KINDS)), ids=str)
def test_a_step_is_that_of_plain_torch(
    case: str, stored: tuple[torch.dtype, torch.dtype, int | None], kind: str
) -> None:
    """Every case meets every way to store weights and moments, and every kind of step."""
    for broken in (False, True):
        given = update_of(dataclasses.replace(CASES[case], **KINDS[kind]), *stored, broken)
        actual = check_step(given)
        assert int(actual.num_skipped) > int(given.num_skipped) or not broken


@every_moment
@every_case
def test_blocks_without_ages_have_that_of_their_parameter(case: Case, moments: torch.dtype) -> None:
    check_step(copy_of(update_of(case, torch.bfloat16, moments), CPU, generation=None, births=None))


@pytest.mark.parametrize("generations", [32, 33, 64, 65, 128, 129, 256, 300])
def test_every_number_of_generations(generations: int) -> None:
    """Ages are looked up in registers, in as many as their number needs."""
    given = update_of(Case((100, 200), (1, 1)), torch.float32, torch.float32)
    number = torch.arange(given.values.numel()) * 7919 % generations
    births = torch.full((256 if generations <= 256 else 512,), -1)
    births[:generations] = torch.arange(generations) % 100
    check_step(
        copy_of(given, CPU, generation=number.to(torch.uint8 if generations <= 256 else torch.int16), births=births)
    )


def test_many_parameters_in_one_call() -> None:
    given = [update_of(case, torch.bfloat16, torch.uint8, seed=n) for n, case in enumerate(CASES.values())]
    together, alone = ([copy_of(each, CPU) for each in given] for _ in range(2))
    versions = [[tensor._version for tensor in each.changed()] for each in together]
    native.update_all(together)
    for one, other, before in zip(together, alone, versions, strict=True):
        native.update_all([other])
        others = tensors_of(other)
        for name, x in tensors_of(one).items():
            y = others[name]
            assert x is y is None or name == "grad" or torch.equal(x, y), name
        versions_now = [tensor._version for tensor in one.changed()]
        assert all(now > then for now, then in zip(versions_now, before, strict=True))  # autograd sees the change


def test_kept_updates_follow_gradients_and_rates() -> None:
    """Steps are made with some of the updates, in other orders and with other neighbours."""
    given = [update_of(case, torch.float32, torch.bfloat16, seed=n) for n, case in enumerate(CASES.values())]
    lr = torch.tensor(0.01, dtype=torch.float64)
    kept, fresh = ([copy_of(each, CPU, lr=lr) for each in given] for _ in range(2))
    steps = (slice(None), slice(None), slice(None, None, 2), slice(None, None, -1), slice(0, 1), slice(3), slice(None))
    for number, chosen in enumerate(steps):
        lr.fill_(0.01 / (number + 1))
        for one, other in zip(kept[chosen], fresh[chosen], strict=True):
            one.grad = other.grad = torch.randn_like(one.values)
        native.update_all(kept[chosen])
        for other in fresh[chosen]:
            native.update_all([dataclasses.replace(other, prepared={})])
        for one, other in zip(kept, fresh, strict=True):
            assert all(map(torch.equal, one.changed(), other.changed()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_rates_of_every_dtype_and_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = update_of(CASES["tiles"], torch.float32, torch.float32)
    check_step(copy_of(given, CPU, lr=torch.full(shape, 0.03, dtype=dtype)))


def test_gradients_that_are_not_contiguous() -> None:
    given = update_of(CASES["tiles"], torch.float32, torch.float32)
    for grad in (given.grad.mT.contiguous().mT, given.grad[:1, :1, :1].clone().expand(given.grad.shape)):
        assert not grad.is_contiguous()
        actual, expected = (copy_of(given, CPU, grad=each) for each in (grad, grad.contiguous()))
        native.update_all([actual])
        native.update_all([expected])
        assert all(map(torch.equal, actual.changed(), expected.changed()))


def test_gradients_of_another_dtype_shape_or_device_are_refused() -> None:
    given = update_of(CASES["tiles"], torch.float32, torch.float32)
    before = [tensor.clone() for tensor in given.changed()]
    for grad in (given.grad.double(), given.grad[:1], given.grad.to("meta")):
        with pytest.raises(ValueError, match=r"expected a gradient of torch.float32 and .*; choose a kernel for it"):
            native.update_all([given, dataclasses.replace(given, grad=grad, prepared={})])
    assert all(map(torch.equal, given.changed(), before))


def test_nothing_to_update() -> None:
    native.update_all([])
    given = update_of(Case((0, 3)), torch.float32, torch.float32, broken=False)
    native.update_all([given])
    assert int(given.step) == 101 and int(given.num_skipped) == 3


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.uint8], ids=str)
def test_noise_of_plain_parameters_of_several_spans(moments: torch.dtype) -> None:
    check_step(update_of(Case((70_000,)), torch.float32, moments))


@pytest.mark.parametrize("stored", SHARDED_DTYPES)
@pytest.mark.parametrize("name", SHARDED)
def test_shards_of_a_plain_parameter_make_the_step_of_the_whole(name: str, stored: str) -> None:
    given, shards = sharded(name, stored)
    whole = check_step(given)
    native.update_all(shards)
    assert differences(joined(shards, given), whole) == []
    elsewhere = copy_of(given, CPU, first_place=given.first_place + 2**16)
    native.update_all([elsewhere])
    assert differences(elsewhere, whole), "noise must follow the place"


def test_noise_of_blocks_far_away() -> None:
    """The weight has more than 2^32 numbers, so it is a stack of which little is active."""
    shape, block_shape = (5, 2**16, 2**14), (2**13, 1)
    layout = Case(shape, block_shape).layout
    assert layout is not None and layout.num_weights > 2**32
    given = update_of(Case((2**13, 4), block_shape, 1.0), torch.bfloat16, torch.bfloat16, 5, broken=False)
    positions = torch.tensor([0, 2**14 * 8, 4 * 2**17 + 5, layout.num_blocks - 1])
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool)
    mask[positions] = True
    check_step(dataclasses.replace(given, topology=Topology.from_mask(mask, layout), layout=layout, prepared={}))


def reason(update: Update, is_traced: bool = False) -> str | None:
    return native.refusal(UpdateCase(update, is_traced))


def test_updates_that_are_refused() -> None:
    usual = update_of(CASES["tiles"], torch.float32, torch.float32)
    assert reason(usual) is None
    (exp_avg, exp_avg_sq), values, grad = usual.slots, usual.values, usual.grad
    generation, births = usual.generation, usual.births
    assert generation is not None and births is not None
    changed: dict[str, list[Any]] = {
        "values": [values.double(), values.transpose(1, 2), values.to("meta")],
        "grad": [grad.bfloat16(), grad[:1], grad.to("meta")],
        "slots": [
            (exp_avg.to("meta"), exp_avg_sq),
            (exp_avg.half(), exp_avg_sq.half()),
            (exp_avg.bfloat16(), exp_avg_sq),
            (exp_avg.to(torch.uint8), exp_avg_sq.to(torch.uint8)),  # codes without scales
            (exp_avg,),
        ],
        "step": [usual.step.float()],
        "generation": [generation.long(), torch.stack((generation, generation), 1)[:, 0]],
        "births": [births.int(), births[:32]],
    }
    for name, others in changed.items():
        for other in others:
            message = reason(dataclasses.replace(usual, prepared={}, **{name: other}))
            assert message is not None and "of this dtype, memory layout or device" in message, name
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {
            field.name: mode.from_tensor(getattr(usual, field.name))
            for field in dataclasses.fields(usual)
            if isinstance(getattr(usual, field.name), torch.Tensor)
        }
        fake["slots"] = tuple(map(mode.from_tensor, usual.slots))
        assert reason(dataclasses.replace(usual, prepared={}, **fake)) is not None
        assert reason(dataclasses.replace(usual, prepared={}, **fake), is_traced=True) is None


def test_other_rules_are_refused() -> None:
    usual = update_of(CASES["tiles"], torch.float32, torch.float32)
    other = dataclasses.replace(usual.rule, name="other")
    assert reason(dataclasses.replace(usual, rule=other, prepared={})) == "computes the rule adamw only"
    assert reason(dataclasses.replace(usual, rule=find_rule("naive_adamw"), prepared={})) is None


def members_of(source: str, struct: str) -> list[tuple[str, str]]:
    """Returns type and name of each member of a struct in C++, in its order; every pointer is a ``*``."""
    body = re.search(rf"struct {struct} \{{(.*?)\}};", re.sub("//.*", "", source), re.DOTALL)
    assert body is not None
    found = []
    for declaration in filter(str.strip, body.group(1).split(";")):
        kind, _, names = re.sub(r"\bconst\b", "", declaration).strip().partition(" ")
        for name in names.split(","):
            is_pointer = "*" in name or "*" in kind
            found.append(("*" if is_pointer else kind, name.strip(" *")))
    return found


def test_the_struct_is_that_of_cpp_and_names_what_an_update_has() -> None:
    source = (Path(native.__file__).parent / "adamw.cpp").read_text()
    types = {"c_void_p": "*", "c_long": "int64_t", "c_longlong": "int64_t", "c_double": "double"}
    fields = [(types[kind.__name__], name) for name, kind in native.Job._fields_]
    assert fields == members_of(source, "Update")
    of_topology = {"bits", "positions", "group_starts", "wide_index", "num_positions", "num_groups", "blocks_per_group"}
    of_layout = {"block_size", "num_blocks"}
    of_tensors = {"num_births", "generation_bytes", "weight_kind", "moment_kind"}
    derived = of_topology | of_layout | of_tensors | {"shared_step", "rounds", "seed", "rate"}
    for rule in ("adamw", "naive_adamw"):
        check_names("Update of adamw.cpp", [name for name, _ in native.Job._fields_], find_rule(rule), derived)


@pytest.mark.parametrize(
    ("module", "python", "cpp"),
    [("expand", "_Move", "Weights"), ("tiles", "_Masked", "Masked"), ("tiles", "_Sampled", "Sampled")],
)
def test_the_structs_of_products_are_those_of_cpp(module: str, python: str, cpp: str) -> None:
    folder = Path(native.__file__).parent
    struct = getattr(importlib.import_module(f"smet_compile.ops.kernels.native.{module}"), python)
    members = members_of((folder / f"{module}.cpp").read_text(), cpp)
    assert [name for name, _ in struct._fields_] == [name for _, name in members]
    assert [kind is ctypes.c_void_p for _, kind in struct._fields_] == [kind == "*" for kind, _ in members]
