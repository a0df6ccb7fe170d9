"""One kernel for a gradient and its update is possible where the product is not split, and taken only on request."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smet_compile.format import Layout, Topology, empty_lists
from smet_compile.ops import choose
from smet_compile.ops.updates import Update
from tests.ops.kernels.adamw_cases import Case, update_of

pytest.importorskip("triton")
from smet_compile.ops.kernels.triton import sampled_tiles, sampled_update, supports

SIDES, TOKENS = (128, 64, 32), (512, 2048, 16384)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def as_on_a_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supports, "architecture", lambda _: "hopper")
    monkeypatch.setattr(supports, "num_sms", lambda _: 132)


def topology_of(side: int) -> Topology:
    """Makes the topology, unwritten, of a 4096 by 4096 weight with a quarter of its blocks active."""
    layout = Layout.of((4096, 4096), (side, side))
    num_active = layout.num_active(0.25)
    bits = torch.empty(-(-layout.num_blocks // 8), dtype=torch.uint8)
    return Topology(layout, bits, empty_lists(layout, num_active, torch.device("cpu")), num_active)


def splits_of_product(left: torch.Tensor, topology: Topology, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns in how many parts a product that is made alone sums its tokens."""
    grids: list[Any] = []

    class Recorded:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: None

    with monkeypatch.context() as patch:
        for name in ("_sampled_tiles", "_add_splits"):
            patch.setattr(sampled_tiles, name, Recorded())
        sampled_tiles.sampled_matmul(left, left, topology)
    return int(grids[0][1])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("side", SIDES)
def test_a_product_that_is_not_split_can_be_fused(side: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = topology_of(side)
    left = torch.empty(tokens, 4096, dtype=BF16)
    splits = splits_of_product(left, topology, monkeypatch)
    update: Any = SimpleNamespace(topology=topology)
    assert sampled_update.fuses(left, None, update) == (splits == 1)


@pytest.mark.parametrize(("side", "tokens"), [(128, 2048), (128, 16384), (64, 4096), (32, 8192)])
def test_many_tokens_can_be_fused(side: int, tokens: int) -> None:
    """A program of several blocks counts as that many blocks, not as that many columns."""
    update: Any = SimpleNamespace(topology=topology_of(side))
    assert sampled_update.fuses(torch.empty(tokens, 4096, dtype=BF16), None, update)


def a_case() -> tuple[torch.Tensor, Update]:
    update = update_of(Case((64, 64), (32, 32)), BF16, BF16, broken=False)
    return torch.empty(8, 64, dtype=BF16), update


@pytest.fixture
def nothing_chosen_yet() -> Iterator[None]:
    choose._chosen.cache_clear()
    yield
    choose._chosen.cache_clear()


@pytest.mark.usefixtures("nothing_chosen_yet")
def test_two_kernels_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supports, "runs_on", lambda _: True)
    for name in ("triton", "", "triton_tiles"):
        monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
        assert choose.fused_update(a_case()[0], None, a_case()[1]) is None
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "triton_fused")
    assert choose.fused_update(a_case()[0], None, a_case()[1]) is sampled_update.sampled_update
