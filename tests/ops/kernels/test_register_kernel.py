"""Tests kernels from outside: they are registered, chosen, forced by name, refuse with a reason, and are taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smet_compile.ops import choose, law_of_updates, plain, torch_insides
from smet_compile.ops.updates import Update
from tests.ops.kernels.adamw_cases import Case as Parameter
from tests.ops.kernels.adamw_cases import update_of
from tests.ops.kernels.cpu_cases import weight


@pytest.fixture
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_insides, "_warned", set())


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Collects names of kernels, which are taken back after the test."""
    names: list[str] = []
    yield names
    for name in names:
        choose.unregister_kernel(name)


def only_small(op: str, case: Any) -> str | None:
    """Refuses weights of more than 100 active blocks."""
    return None if case.num_active <= 100 else "takes up to 100 blocks"


def doubled(values: torch.Tensor, topology: Any) -> torch.Tensor:
    return 2 * plain.unpack(values, topology)


@pytest.mark.usefixtures("nothing_warned_yet")
def test_a_kernel_from_outside(monkeypatch: pytest.MonkeyPatch, registered: list[str]) -> None:
    small, large = weight((16, 16), (8, 8), "all"), weight((37, 29), (1, 1), "all")
    values = {each: each.values(torch.float32) for each in (small, large)}
    expected = {each: plain.unpack(values[each], each.topology) for each in (small, large)}

    def unpacked(each: Any) -> torch.Tensor:
        result: torch.Tensor = choose.compute("unpack", values[each], each.topology)(values[each], each.topology)
        return result

    before = choose.names()
    assert torch.equal(unpacked(small), expected[small])  # the topology keeps this choice
    choose.register_kernel(choose.Kernel("outside", {"unpack": doubled}, only_small))
    registered.append("outside")
    assert choose.names() == ("outside", *before)
    assert choose.kernel_of("unpack", choose.case_of(values[small], small.topology)) == "outside"
    assert choose.kernel_of("pack", choose.case_of(values[small], small.topology)) != "outside"
    assert torch.equal(unpacked(small), 2 * expected[small]) and torch.equal(unpacked(large), expected[large])

    monkeypatch.setenv("SMET_COMPILE_KERNEL", "outside")
    assert torch.equal(unpacked(small), 2 * expected[small])
    other = choose.kernel_of("unpack", choose.case_of(values[large], large.topology))
    message = (
        f"SMET_COMPILE_KERNEL=outside: {other} computes unpack of torch.float32 single weights on cpu, since outside "
    )
    with pytest.warns(UserWarning, match=f"{message}takes up to 100 blocks; name a kernel that can"):
        assert torch.equal(unpacked(large), expected[large])

    choose.unregister_kernel(registered.pop())
    assert choose.names() == before
    with pytest.raises(ValueError, match=r"SMET_COMPILE_KERNEL: expected one of .*, got 'outside'"):
        unpacked(small)
    monkeypatch.delenv("SMET_COMPILE_KERNEL")
    assert torch.equal(unpacked(small), expected[small])


def test_a_kernel_from_outside_goes_where_it_is_told_and_only_where_it_is_profitable(registered: list[str]) -> None:
    case = choose.case_of(torch.zeros(1), weight((16, 16), (1, 1)).topology)
    last = choose.Kernel("last", {"unpack": doubled})
    choose.register_kernel(last, before="torch")
    registered.append("last")
    assert choose.names().index("last") + 1 == choose.names().index("torch")
    dear = choose.Kernel("dear", {"unpack": doubled}, is_profitable=lambda case: case.density > 2)
    choose.register_kernel(dear)
    registered.append("dear")
    assert choose.kernel_of("unpack", case) != "dear"
    with pytest.raises(ValueError, match="kernel 'last': expected a name of its own"):
        choose.register_kernel(last)
    with pytest.raises(ValueError, match=r"kernel 'other': expected functions for masked_matmul, .*, got \['divide'\]"):
        choose.register_kernel(choose.Kernel("other", {"divide": doubled}))
    with pytest.raises(ValueError, match=r"before: expected one of dear, .*, got 'nobody'"):
        choose.register_kernel(choose.Kernel("other", {"unpack": doubled}), before="nobody")


@pytest.mark.usefixtures("nothing_warned_yet")
def test_an_optimizer_step_by_a_kernel_from_outside(monkeypatch: pytest.MonkeyPatch, registered: list[str]) -> None:
    calls: list[int] = []

    def update_all(updates: list[Update]) -> None:
        calls.append(len(updates))
        law_of_updates.update_all(updates)

    def refusal(op: str, case: choose.UpdateCase) -> str | None:
        return None if case.update.topology is not None else "takes compact weights only"

    choose.register_kernel(choose.Kernel("outside", {"update_all": update_all}, refusal))
    registered.append("outside")
    cases = (Parameter((8, 8), (4, 4)), Parameter((8, 8)), Parameter((8, 8), (1, 1)))
    updates = [update_of(case, torch.float32, torch.float32) for case in cases]
    choose.update_all(updates)
    assert calls == [2] and all(int(update.step) == 101 for update in updates)
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "outside")
    with pytest.warns(UserWarning, match=r"SMET_COMPILE_KERNEL=outside: .* since outside takes compact weights only"):
        choose.update_all(updates)
    assert calls == [2, 2]
    monkeypatch.delenv("SMET_COMPILE_KERNEL")
    choose.unregister_kernel(registered.pop())
    choose.update_all(updates)
    assert calls == [2, 2] and all(int(update.step) == 103 for update in updates)
