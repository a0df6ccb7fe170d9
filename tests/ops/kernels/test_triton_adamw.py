"""The optimizer's kernels equal the law in plain torch bit for bit, since they round where it does.

There is one exception: roots of fp32 numbers are not always the nearest ones in torch on the CPU, and are here.
"""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from smet_compile.ops import law_of_updates
from smet_compile.ops.choose import UpdateCase
from smet_compile.ops.updates import Update, check_names
from smet_compile.optim.adamw import ADAMW, NAIVE_ADAMW
from tests.ops.kernels.adamw_cases import (
    NO_WARMUP,
    Case,
    copy_of,
    differences,
    joined,
    sharded,
    update_of,
)
from tests.ops.kernels.device import DEVICE, on_device

pytest.importorskip("triton")
from smet_compile.ops.kernels.triton import adamw, adamw_step, adamw_tables

pytestmark = on_device

CASES = {
    "plain": Case((37, 29), options={"density_rate": 1.0, **NO_WARMUP}),
    "plain of many": Case((2048,), options={"density_rate": 1.0, **NO_WARMUP}),
    "weights": Case((45, 67), (1, 1)),
    "stacked weights": Case((3, 21, 33), (1, 1), density=0.1),
    "weights of several spans": Case((3, 300, 300), (1, 1), density=0.03),
    "few weights of several spans": Case((3, 300, 300), (1, 1), density=0.002),
    "runs": Case((30, 70), (1, 16)),
    "column runs": Case((70, 9), (6, 1)),
    "long runs": Case((2, 2500), (1, 1200)),
    "small tiles": Case((10, 50), (4, 8)),
    "tiles": Case((70, 100), (32, 32)),
    "stacked tiles": Case((2, 40, 30), (16, 16)),
    "wide tiles": Case((60, 130), (48, 64), density=0.7),
    "large tiles": Case((129, 128), (128, 128), density=0.7),
    "without weight decay": Case((45, 67), (1, 1), options={"weight_decay": 0.0, "eps": 0.0, **NO_WARMUP}),
    "one warm-up": Case((45, 67), (1, 1), options={"initial_warmup_steps": 100}),
    "naive rule": Case((10, 50), (4, 8), options={"beta1": 0.0}, rule=NAIVE_ADAMW),
}
BF16, FP32 = torch.bfloat16, torch.float32
STORED = {
    "fp32": (FP32, FP32, None),
    "bf16": (BF16, FP32, 5),
    "bf16 to nearest": (BF16, BF16, None),
    "bf16 with bf16 moments": (BF16, BF16, 5),
    "fp16": (torch.float16, FP32, 5),
    "codes": (BF16, torch.uint8, 5),
    "codes to nearest": (FP32, torch.uint8, None),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nearest_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch return the nearest root in fp32: one in fp64, rounded."""
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))


OF_EVERY_KIND = ("plain", "weights", "runs", "small tiles", "tiles", "large tiles")
STEPS = [(case, stored) for case in CASES for stored in STORED if stored in ("bf16", "codes") or case in OF_EVERY_KIND]


@pytest.mark.parametrize(("case", "stored"), STEPS)
def test_step(case: str, stored: str) -> None:
    dtype, moments, noise_seed = STORED[stored]
    before = update_of(CASES[case], dtype, moments, noise_seed)
    assert adamw.refusal(UpdateCase(before)) is None
    expected, actual = copy_of(before, CPU), copy_of(before, DEVICE)
    law_of_updates.update_all([expected])
    adamw.update_all([actual])
    assert differences(expected, before), "the law must have moved something"
    assert differences(actual, expected) == []


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list to which the names of the optimizer's kernels are added that are launched from now on."""
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(adamw, name)

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("prepare", "update"):
        monkeypatch.setattr(adamw, name, Counted(name))
    return launched


def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list to which the lengths of tables are added that are made for the device from now on."""
    copied: list[int] = []
    on_host = adamw_tables._on_host

    def counted(numbers: list[int], device: torch.device) -> Tensor:
        copied.append(len(numbers))
        return on_host(numbers, device)

    monkeypatch.setattr(adamw_tables, "_on_host", counted)
    return copied


def both(before: list[Update]) -> tuple[list[Update], list[Update]]:
    """Copies the updates for the law, and for the kernels."""
    return [copy_of(each, CPU) for each in before], [copy_of(each, DEVICE) for each in before]


@pytest.mark.parametrize("stored", ["fp32", "bf16", "codes"])
def test_all_parameters_in_one_launch(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launches(monkeypatch)
    dtype, moments, noise_seed = STORED[stored]
    cases = [CASES[name] for name in ("plain", "weights", "runs", "large tiles", "small tiles", "tiles")]
    before = [update_of(case, dtype, moments, noise_seed, seed=seed) for seed, case in enumerate(cases)]
    expected, actual = both(before)
    law_of_updates.update_all(expected)
    adamw.update_all(actual)
    assert [differences(*pair) for pair in zip(actual, expected, strict=True)] == [[]] * len(cases)
    assert launched == ["prepare", "update"]


@pytest.mark.parametrize("stored", ["bf16 with bf16 moments", "fp32 with bf16 moments", "fp32 with codes"])
@pytest.mark.parametrize("name", ["within a span", "from an odd place", "far away", "very far away"])
def test_shards_of_a_plain_parameter_make_the_step_of_the_whole(name: str, stored: str) -> None:
    given, shards = sharded(name, stored)
    whole, (expected, actual) = copy_of(given, CPU), both(shards)
    law_of_updates.update_all([whole, *expected])
    adamw.update_all(actual)
    assert [differences(*pair) for pair in zip(actual, expected, strict=True)] == [[]] * len(shards)
    assert differences(joined(actual, given), whole) == []


def test_parameters_of_several_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launches(monkeypatch)
    before = [update_of(CASES["runs"], *STORED[stored], seed=seed) for seed, stored in enumerate(("fp32", "bf16") * 2)]
    expected, actual = both(before)
    law_of_updates.update_all(expected)
    adamw.update_all(actual)
    assert [differences(*pair) for pair in zip(actual, expected, strict=True)] == [[]] * 4
    assert launched == ["prepare", "update"] * 2


def test_what_changes_between_steps() -> None:
    """A step follows the learning rate and its place, the place and strides of gradients, and ages changed in place."""
    before = update_of(CASES["tiles"], BF16, FP32)
    expected, actual = copy_of(before, CPU), copy_of(before, DEVICE)
    generator = torch.Generator().manual_seed(6)
    for step, lr in enumerate((0.1, 0.2, 0.05)):
        grad = torch.randn(before.values.mT.shape, generator=generator).bfloat16()
        for update, device in ((expected, CPU), (actual, DEVICE)):
            if step == 2:
                assert update.generation is not None
                update.generation.fill_(3)
            rate = torch.tensor(lr, dtype=torch.float32 if step == 1 else torch.float64)
            update.lr, update.grad = rate.to(device if step else "cpu"), grad.to(device).mT
            (law_of_updates if update is expected else adamw).update_all([update])
    assert differences(actual, expected) == []


def test_nothing_is_copied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later step copies the addresses of gradients where they changed, and nothing else. Rates stay on the device."""
    before = [update_of(CASES[name], BF16, FP32, seed=seed) for seed, name in enumerate(("runs", "tiles", "plain"))]
    expected, actual = both(before)
    rate = torch.tensor([0.01], dtype=torch.float64, device=DEVICE)
    for each in actual:
        each.lr = rate
    grads = [[each.grad.clone() for each in actual] for _ in range(2)]
    copied = copies(monkeypatch)
    table_numbers, numbers_of_step = len(adamw_step.Row._fields) * len(actual), 3 * len(actual)
    for number, (lr, which, expected_copies) in enumerate(
        [
            (0.01, 0, [table_numbers]),
            (0.01, 0, []),
            (0.02, 0, []),
            (0.02, 1, [numbers_of_step]),
        ]
    ):
        copied.clear()
        for each, grad in zip(actual, grads[which], strict=True):
            each.grad = grad
        for each in (*expected, *actual):
            each.lr.fill_(lr)
        adamw.update_all(actual)
        law_of_updates.update_all(expected)
        assert copied == expected_copies, f"step {number}"
    assert [differences(*pair) for pair in zip(actual, expected, strict=True)] == [[]] * 3


def test_other_lists_of_updates_and_other_dtypes_of_gradients() -> None:
    """Launches of the step before are not used for other updates, for fewer of them, or in another order."""
    before = [update_of(CASES[name], FP32, FP32, seed=seed) for seed, name in enumerate(("runs", "tiles", "plain"))]
    expected, actual = both(before)
    for order in ((0, 1, 2), (0, 2), (1, 0, 2), (0, 1), (0, 1, 2)):
        law_of_updates.update_all([expected[number] for number in order])
        adamw.update_all([actual[number] for number in order])
    for each in (expected[1], actual[1]):
        each.grad = each.grad.bfloat16()
    law_of_updates.update_all(expected)
    adamw.update_all(actual)
    replaced = [*expected[:2], copy_of(expected[2], CPU)], [*actual[:2], copy_of(actual[2], DEVICE)]
    law_of_updates.update_all(replaced[0])
    adamw.update_all(replaced[1])
    for updates in ((actual, expected), (replaced[1], replaced[0])):
        assert [differences(*pair) for pair in zip(*updates, strict=True)] == [[]] * 3


def test_nothing_keeps_tensors_alive() -> None:
    """Tensors of an update die with it, while others of its step live on; so do gradients of the step before."""
    updates = [copy_of(update_of(CASES[name], FP32, FP32), DEVICE) for name in ("runs", "tiles")]
    adamw.update_all(updates)
    gc.disable()
    try:
        dead = [weakref.ref(tensor) for tensor in (updates[1].values, updates[1].slots[0], updates[0].grad)]
        updates[0].grad = updates[0].grad.clone()
        del updates[1]
        assert [reference() for reference in dead] == [None] * 3
    finally:
        gc.enable()


def test_tensors_count_as_changed() -> None:
    update = copy_of(update_of(CASES["tiles"], BF16, torch.uint8), DEVICE)
    versions = [tensor._version for tensor in update.changed()]
    adamw.update_all([update])
    adamw.update_all([update])
    assert [tensor._version for tensor in update.changed()] == [version + 2 for version in versions]


def test_nothing_to_update() -> None:
    """The step of an empty parameter counts all the same."""
    empty = copy_of(update_of(Case((0, 3)), FP32, FP32, broken=False), DEVICE)
    adamw.update_all([empty])
    assert int(empty.step) == 101
    adamw.update_all([])


def test_a_skipped_group_keeps_codes_and_scale() -> None:
    before = update_of(CASES["tiles"], BF16, torch.uint8, broken=False)
    before.grad[1, 5, 7] = float("inf")
    after = copy_of(before, DEVICE)
    adamw.update_all([after])
    for changed, kept in zip((after.values, *after.slots), (before.values, *before.slots), strict=True):
        same = (changed.cpu() == kept).flatten(1).all(1)
        assert same[1] and not same[0]
    assert before.topology is not None and before.topology.positions is not None
    assert before.scales is not None and after.scales is not None
    position = int(before.topology.positions[1])
    differs = (after.scales.cpu() != before.scales).all(0)
    assert not differs[position] and differs.sum() == len(before.values) - 1
    assert int(after.num_skipped) == int(before.num_skipped) + 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dtype": torch.float64, "moments": torch.float64}, "fp64 is the law's alone"),
        ({"dtype": FP32, "moments": torch.float16}, "no such moments"),
    ],
)
def test_what_is_left_to_others(changed: dict[str, torch.dtype], why: str) -> None:
    assert adamw.refusal(UpdateCase(update_of(CASES["tiles"], **changed))), why
    update = update_of(CASES["plain"], FP32, FP32)
    assert adamw.refusal(UpdateCase(update)) is None
    update.values = update.values.mT
    assert adamw.refusal(UpdateCase(update)), "its entries are not in order"


def test_columns_have_the_names_of_an_update() -> None:
    """The tables' columns are found under their names, and hold fields of an update, or what is derived from them."""
    names = (*adamw_step.Row._fields, *adamw_step.StepRow._fields)
    derived = {"lr_is_address", "positions", "group_starts", "kind", "aligned", "numel", "block_size"}
    derived |= {"entries_at_once", "num_groups", "num_generations", "first_rate", "shared_step"}
    derived |= {"num_blocks", "places_start", "spans_start"}
    derived |= {"log_beta1", "log_beta2", "rest1", "rest2"}
    check_names("the table of Triton's AdamW", names, ADAMW, derived)
    for table in (adamw_step.Row, adamw_step.StepRow):
        columns = [getattr(adamw_step, name.upper()).value for name in table._fields]
        assert columns == list(range(len(table._fields)))
