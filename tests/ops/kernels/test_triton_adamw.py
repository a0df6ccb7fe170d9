"""The optimizer's kernels against active_adamw_ in plain torch: bit for bit, since they round where it does.

But for one thing: roots of fp32 numbers are not always the nearest ones in torch on the CPU, and are here.
"""

import pytest
import torch
from smet_compile.ops.adamw import active_adamw_

from tests.ops.kernels.adamw_cases import Case, copy_of, differences, update_of
from tests.ops.kernels.device import DEVICE, on_device

pytest.importorskip("triton")
from smet_compile.ops.kernels.triton import adamw

pytestmark = on_device

CASES = {
    "plain": Case((37, 29), options={"density_rate": 1.0, "warmup_steps": 0}),
    "plain of many": Case((2048,), options={"density_rate": 1.0, "warmup_steps": 0}),
    "weights": Case((45, 67), (1, 1)),
    "stacked weights": Case((3, 21, 33), (1, 1), density=0.1),
    "runs": Case((30, 70), (1, 16)),
    "column runs": Case((70, 9), (6, 1)),
    "long runs": Case((2, 2500), (1, 1200)),
    "small tiles": Case((10, 50), (4, 8)),
    "tiles": Case((70, 100), (32, 32)),
    "stacked tiles": Case((2, 40, 30), (16, 16)),
    "wide tiles": Case((60, 130), (48, 64), density=0.7),
    "large tiles": Case((129, 128), (128, 128), density=0.7),
    "without weight decay": Case((45, 67), (1, 1), options={"weight_decay": 0.0, "eps": 0.0, "warmup_steps": 0}),
    "naive rule": Case((10, 50), (4, 8), options={"shared_step": True, "beta1": 0.0}),
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


@pytest.fixture(autouse=True)
def nearest_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A root in fp64, rounded, is the nearest one in fp32."""
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))


OF_EVERY_KIND = ("plain", "weights", "runs", "small tiles", "tiles", "large tiles")
STEPS = [(case, stored) for case in CASES for stored in STORED if stored in ("bf16", "codes") or case in OF_EVERY_KIND]


@pytest.mark.parametrize(("case", "stored"), STEPS)
def test_step(case: str, stored: str) -> None:
    dtype, moments, noise_seed = STORED[stored]
    before = update_of(CASES[case], dtype, moments, noise_seed)
    assert adamw.supports(before)
    expected, actual = copy_of(before, torch.device("cpu")), copy_of(before, DEVICE)
    active_adamw_(*expected)
    adamw.update_all([actual])
    assert differences(expected, before), "the reference must have moved something"
    assert differences(actual, expected) == []


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the optimizer's kernels that are launched from now on."""
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


@pytest.mark.parametrize("stored", ["fp32", "bf16", "codes"])
def test_all_parameters_in_one_launch(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launches(monkeypatch)
    dtype, moments, noise_seed = STORED[stored]
    cases = [CASES[name] for name in ("plain", "weights", "runs", "large tiles", "small tiles", "tiles")]
    before = [update_of(case, dtype, moments, noise_seed, seed=seed) for seed, case in enumerate(cases)]
    expected, actual = ([copy_of(each, device) for each in before] for device in (torch.device("cpu"), DEVICE))
    for each in expected:
        active_adamw_(*each)
    adamw.update_all(actual)
    assert [differences(*pair) for pair in zip(actual, expected, strict=True)] == [[]] * len(cases)
    assert launched == ["prepare", "update"]


def test_parameters_of_several_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launches(monkeypatch)
    before = [update_of(CASES["runs"], *STORED[stored], seed=seed) for seed, stored in enumerate(("fp32", "bf16") * 2)]
    expected, actual = ([copy_of(each, device) for each in before] for device in (torch.device("cpu"), DEVICE))
    for each in expected:
        active_adamw_(*each)
    adamw.update_all(actual)
    assert [differences(*pair) for pair in zip(actual, expected, strict=True)] == [[]] * 4
    assert launched == ["prepare", "update"] * 2


def test_what_changes_between_steps() -> None:
    """The learning rate and where it is, where gradients lie and how, and the ages of blocks, in place."""
    before = update_of(CASES["tiles"], BF16, FP32)
    expected, actual = copy_of(before, torch.device("cpu")), copy_of(before, DEVICE)
    generator = torch.Generator().manual_seed(6)
    for step, lr in enumerate((0.1, 0.2, 0.05)):
        grad = torch.randn(before[0].mT.shape, generator=generator).bfloat16()
        for update, device in ((expected, torch.device("cpu")), (actual, DEVICE)):
            if step == 2:
                update[8].fill_(3)
            on_device = (device if step else "cpu", torch.float32 if step == 1 else torch.float64)
            rate = torch.tensor(lr, dtype=on_device[1]).to(on_device[0])
            arguments = (update[0], grad.to(device).mT, *update[2:7], rate, *update[8:])
            (active_adamw_ if update is expected else lambda *a: adamw.update_all([a]))(*arguments)
    assert differences(actual, expected) == []


def test_nothing_to_update() -> None:
    """Of an empty parameter, the step counts all the same."""
    empty = copy_of(update_of(Case((0, 3)), FP32, FP32, broken=False), DEVICE)
    adamw.update_all([empty])
    assert int(empty[6]) == 101
    adamw.update_all([])


def test_a_skipped_group_keeps_codes_and_scale() -> None:
    before = update_of(CASES["tiles"], BF16, torch.uint8, broken=False)
    before[1][1, 5, 7] = float("inf")
    after = copy_of(before, DEVICE)
    adamw.update_all([after])
    for number in (0, 2, 3):
        same = (after[number].cpu() == before[number]).flatten(1).all(1)
        assert same[1] and not same[0]
    position = int(before[11][0][1])
    changed = (after[4].cpu() != before[4]).all(0)
    assert not changed[position] and changed.sum() == len(before[0]) - 1
    assert int(after[5]) == int(before[5]) + 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dtype": torch.float64, "moments": torch.float64}, "fp64 is the reference's alone"),
        ({"dtype": FP32, "moments": torch.float16}, "no such moments"),
    ],
)
def test_what_is_left_to_others(changed: dict[str, torch.dtype], why: str) -> None:
    assert not adamw.supports(update_of(CASES["tiles"], **changed)), why
    update = update_of(CASES["plain"], FP32, FP32)
    assert adamw.supports(update)
    assert not adamw.supports((update[0].mT, *update[1:])), "its entries are not in order"
