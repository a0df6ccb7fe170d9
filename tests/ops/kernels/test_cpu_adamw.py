"""The optimizer step in C++, against the op in plain torch.

Moments and their codes and roundings are the same bits. Weights differ by the last bits of a step, since torch takes
square roots that are not rounded to nearest: so bf16 weights, whose noise is the same, may differ in one last place.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from smet_compile.format import empty_index, pack_bits, write_index
from smet_compile.ops import adamw as plain
from smet_compile.ops.kernels.native import adamw as native
from tests.ops.kernels.adamw_cases import MOVED, NUM_SKIPPED, Case, copy_of, update_of
from tests.ops.kernels.tolerances import relative_rms

CPU = torch.device("cpu")
VALUES, GRAD = 0, 1
CASES = {
    "single": Case((37, 61), (1, 1)),
    "single_stack": Case((3, 70, 50), (1, 1)),
    "single_sparse": Case((300, 300), (1, 1), 0.02),
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
OPTIONS = {
    "": {},
    "shared": {"shared_step": True},
    "no_warmup": {"warmup_steps": 0, "weight_decay": 0.0},
    "eps0": {"eps": 0.0},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_moment = pytest.mark.parametrize(
    "moments", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "codes"]
)

pytestmark = pytest.mark.skipif(native.library("adamw") is None, reason="there is no C++ compiler")


def assert_same_step(actual: tuple[object, ...], expected: tuple[object, ...], before: torch.Tensor) -> None:
    for name, x, y in zip(MOVED, actual, expected, strict=False):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            assert x is y is None
        elif name != "values":
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name
    x, y = actual[VALUES], expected[VALUES]
    assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    assert torch.equal(x == before, y == before) or x.dtype == torch.bfloat16  # what was skipped stays, to the bit
    if x.dtype == torch.float32:
        moved, expected_move = (x - before).double(), (y - before).double()
        slack = before.abs().max() * 2**-24  # a weight is stored with an error of that, whatever its step
        assert relative_rms(moved, expected_move) < 1e-6 + float(slack / expected_move.norm().clamp(min=1e-30))
    else:
        places = (x.view(torch.int16).int() - y.view(torch.int16).int()).abs()
        assert places.max() <= 1 and (places > 0).float().mean() < 1e-3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("noise_seed", [None, 5], ids=["nearest", "stochastic"])
@every_moment
@every_dtype
@every_case
def test_a_step_is_that_of_plain_torch(
    case: Case, dtype: torch.dtype, moments: torch.dtype, noise_seed: int | None, options: dict[str, object]
) -> None:
    for broken in (False, True):
        given = update_of(dataclasses.replace(case, options=options), dtype, moments, noise_seed, broken)
        actual, expected = copy_of(given, CPU), copy_of(given, CPU)
        native.update_all([actual])
        plain.active_adamw_(*expected)
        assert_same_step(actual, expected, given[VALUES])
        assert int(actual[NUM_SKIPPED]) > int(given[NUM_SKIPPED]) or not broken


@pytest.mark.parametrize("generations", [32, 33, 64, 65, 128, 129, 256, 300])
def test_every_number_of_generations(generations: int) -> None:
    """Ages are looked up in registers, in as many as their number needs."""
    given = list(update_of(Case((100, 200), (1, 1)), torch.float32, torch.float32))
    number = torch.arange(given[0].numel()) * 7919 % generations
    given[8] = number.to(torch.uint8 if generations <= 256 else torch.int16)
    given[9] = torch.full((256 if generations <= 256 else 512,), -1)
    given[9][:generations] = torch.arange(generations) % 100
    actual, expected = copy_of(tuple(given), CPU), copy_of(tuple(given), CPU)
    native.update_all([actual])
    plain.active_adamw_(*expected)
    assert_same_step(actual, expected, given[VALUES])


def test_many_parameters_in_one_call() -> None:
    given = [update_of(case, torch.bfloat16, torch.uint8, seed=n) for n, case in enumerate(CASES.values())]
    together, alone = ([copy_of(each, CPU) for each in given] for _ in range(2))
    versions = [each[VALUES]._version for each in together]
    native.update_all(together)
    for one, other, version in zip(together, alone, versions, strict=True):
        native.update_all([other])
        for name, x, y in zip(MOVED, one, other, strict=False):
            assert x is y is None or (name == "grad") or torch.equal(x, y), name
        assert one[VALUES]._version > version  # autograd sees that it was changed


def test_positions_beyond_32_bits_make_other_noise() -> None:
    """A plain parameter is never that large here, so the dense weight is: a stack of which little is active."""
    shape, block_shape = (5, 2**16, 2**14), (2**13, 1)
    case = Case(shape, block_shape)
    layout = case.layout
    assert layout is not None and layout.num_weights > 2**32
    given = list(update_of(Case((2**13, 4), block_shape, 1.0), torch.bfloat16, torch.bfloat16, 5, broken=False))
    positions = torch.tensor([0, 2**14 * 8, 4 * 2**17 + 5, layout.num_blocks - 1])
    mask = torch.zeros(layout.num_blocks, dtype=torch.bool)
    mask[positions] = True
    topology, index = pack_bits(mask), empty_index(layout, 4, CPU)
    write_index(index, topology, layout)
    given[10], given[11] = topology, [index]
    given[12:15] = list(layout.shape), list(layout.matrix), list(layout.block_shape)
    actual, expected = copy_of(tuple(given), CPU), copy_of(tuple(given), CPU)
    native.update_all([actual])
    plain.active_adamw_(*expected)
    assert_same_step(actual, expected, given[VALUES])


def test_what_it_does_not_take() -> None:
    takes = update_of(CASES["tiles"], torch.float32, torch.float32)
    assert native.supports(takes)
    changed = {
        VALUES: [takes[VALUES].double(), takes[VALUES].transpose(1, 2), takes[VALUES].to("meta")],
        GRAD: [takes[GRAD].bfloat16(), takes[GRAD][:1]],
        2: [takes[2].to("meta"), takes[2].half()],
        6: [takes[6].float()],
        8: [takes[8].long(), torch.stack((takes[8], takes[8]), 1)[:, 0]],
        9: [takes[9].int(), takes[9][:32]],
        11: [[]],
    }
    for place, others in changed.items():
        for other in others:
            assert not native.supports((*takes[:place], other, *takes[place + 1 :])), place
    with torch._subclasses.FakeTensorMode() as mode:
        assert not native.supports(tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in takes))
