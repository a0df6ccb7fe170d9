"""A shard of a plain parameter makes the step of the whole, with the noise and the output units of its place there."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.format import Layout
from smet_compile.ops import law, law_of_updates, plain
from smet_compile.ops.law_of_updates import Begun, Location, locate_all
from smet_compile.ops.updates import Settings, Update, check, flatten, unflatten
from smet_compile.optim.scale import SCALE_MOMENTUM
from tests.ops.kernels.adamw_cases import (
    SHARDED,
    SHARDED_DTYPES,
    Case,
    copy_of,
    differences,
    joined,
    sharded,
    shards_of,
    update_of,
)
from tests.support.updates import settings
from tests.train_step.setting import Net, Run, batch_of

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
every_dtype = pytest.mark.parametrize("stored", SHARDED_DTYPES)


def in_chunks_of(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_WEIGHTS_AT_ONCE", "_WEIGHTS_IN_CACHE"):
        monkeypatch.setattr(plain, name, number)


def make_steps(shards: list[Update], at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the steps by the law, or by chunks of so many entries."""
    if at_once is None:
        law_of_updates.update_all(shards)
    else:
        in_chunks_of(at_once, monkeypatch)
        plain.update_all(shards)


@pytest.mark.parametrize("at_once", [None, 1000, 5000, 10**9])
@every_dtype
@pytest.mark.parametrize("name", SHARDED)
def test_shards_make_the_step_of_the_whole(
    name: str, stored: str, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, shards = sharded(name, stored)
    whole = copy_of(given, CPU)
    law_of_updates.update_all([whole])
    make_steps(shards, at_once, monkeypatch)
    assert differences(whole, given), "the step must have moved something"
    assert differences(joined(shards, given), whole) == []


@pytest.mark.parametrize("first_place", [0, 17, 2**16 - 1, 2**31 + 5, 2**47])
def test_noise_is_that_of_the_place_in_the_whole(first_place: int) -> None:
    begun = Begun(dataclasses.replace(update_of(Case((3,)), BF16, BF16), first_place=first_place))
    key = begun.noise_key
    assert key is not None
    location = locate_all(begun)
    whole = Location(torch.arange(first_place, first_place + 3), None)
    for stream in range(3):
        noise = location.noise(key).bits(stream)
        assert torch.equal(noise, whole.noise(key).bits(stream))
        block, place = divmod(first_place, 2**16)
        assert noise[0] == law.noise_bits(law.block_keys(key, torch.tensor(block)), torch.tensor(place), stream)


def test_groups_of_codes_are_counted_from_the_shards_first_entry() -> None:
    begun = Begun(dataclasses.replace(update_of(Case((2500,)), FP32, torch.uint8), first_place=1000))
    groups = locate_all(begun).groups
    assert groups.numbers.tolist() == [0, 1, 2]
    assert groups.of_block.bincount().tolist() == [1024, 1024, 452]


def scaled(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, are_columns: bool = False) -> Update:
    """Makes an update by a normalized rule with a momentum."""
    given = update_of(Case(shape), dtype, BF16)
    return dataclasses.replace(
        given,
        rule=SCALE_MOMENTUM,
        slots=given.slots[:1],
        options=(0.9, 0.1),
        layout=layout,
        units_are_columns=are_columns,
        warmup_steps=0,
        initial_warmup_steps=0,
    )


@pytest.mark.parametrize("at_once", [None, 100, 10**9])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(60, 41), (3, 20, 41)], ids=str)
def test_output_units_of_whole_rows(
    shape: tuple[int, ...], dtype: torch.dtype, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scaled(shape, Layout.of(shape, (1, 1)), dtype)
    whole, shards = copy_of(given, CPU), shards_of(given, (17 * 41, 23 * 41))
    law_of_updates.update_all([whole])
    make_steps(shards, at_once, monkeypatch)
    assert differences(whole, given)
    assert differences(joined(shards, given), whole) == []


@pytest.mark.parametrize("are_columns", [False, True])
def test_units_are_counted_in_the_whole(are_columns: bool) -> None:
    layout = Layout.of((3, 20, 41), (1, 1))
    given = scaled((3, 20, 41), layout, FP32, are_columns)
    units = locate_all(Begun(copy_of(given, CPU))).units(layout, are_columns)
    _, shard = shards_of(given, (801,))
    assert torch.equal(locate_all(Begun(shard)).units(layout, are_columns), units[801:])


def test_settings_travel_as_text() -> None:
    usual = settings(noise_seed=5)
    for first_place in (0, 1, 2**40 + 3):
        given = usual._replace(first_place=first_place)
        assert Settings.from_text(given.text()) == given
    assert usual.first_place == 0
    (_, shard) = shards_of(update_of(Case((50,)), BF16, BF16), (17,))
    assert unflatten(shard.values, shard.grad, flatten(shard)).first_place == 17


@pytest.mark.parametrize(
    ("case", "layout", "first_place", "message"),
    [
        (Case((16, 16), (4, 4)), None, 1, "weight: expected first_place of 0 beside a topology, got 1; restrict"),
        (Case((16, 16)), None, -1, "weight: expected first_place of at least 0, got -1; pass"),
        (Case((16, 16)), Layout.of((20, 16), (1, 1)), 65, r"so that 256 entries lie within \(20, 16\), got 65; pass"),
    ],
)
def test_places_that_cannot_be_are_refused(case: Case, layout: Layout | None, first_place: int, message: str) -> None:
    given = update_of(case, BF16, FP32)
    check("weight", given)
    changed = dataclasses.replace(given, first_place=first_place, layout=layout or given.layout)
    with pytest.raises(ValueError, match=message):
        check("weight", changed)
    with pytest.raises(ValueError, match="first_place"):
        torch.ops.smet.update_(changed.values, changed.grad, *flatten(changed))
    if layout is not None:
        check("weight", dataclasses.replace(changed, first_place=64))


@pytest.mark.parametrize("through", ["the op", "a sink"])
@every_dtype
def test_ops_keep_the_place(through: str, stored: str) -> None:
    given, shards = sharded("from an odd place", stored)
    whole = copy_of(given, CPU)
    torch.ops.smet.update_(whole.values, whole.grad, *flatten(whole))
    for shard in shards:
        if through == "the op":
            torch.ops.smet.update_(shard.values, shard.grad, *flatten(shard))
        else:
            leaf = torch.zeros_like(shard.values).requires_grad_()
            torch.ops.smet.update_sink(leaf, shard.values, *flatten(shard)).backward(shard.grad)
    assert differences(joined(shards, given), whole) == []
    assert differences(whole, given)


class Sharded(smet.ActiveAdamW):
    """Takes every vector for a shard that begins at ``first_place``."""

    first_place = 2**31 + 2**16 - 11

    def update_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> Update:
        update = super().update_of(parameter, group)
        if update.layout is None:
            update.first_place = self.first_place
        return update


def test_a_compiled_step_keeps_the_place() -> None:
    """Its update sinks hold the place in their settings; roundings of moments to bf16 show which it was."""
    model, found = smet.sparsify(Net(), 0.5), []
    for optimizer_class, compiled in ((Sharded, True), (Sharded, False), (smet.ActiveAdamW, False)):
        each = copy.deepcopy(model)
        run = Run(each, optimizer_class(each, lr=1e-2, warmup_steps=0, moment_dtype=BF16))
        if compiled:
            step = run.compiled()
            run.in_step(step, [batch_of(0, FP32)])
            assert step.fused
        else:
            run.in_loop([batch_of(0, FP32)])
        vectors = [state for name, state in run.state().items() if not name.endswith("original")]
        found.append(torch.cat([state[slot] for state in vectors for slot in ("exp_avg", "exp_avg_sq")]))
    in_step, in_loop, elsewhere = found
    assert torch.equal(in_step, in_loop)
    assert not torch.equal(in_loop, elsewhere)
