"""Ctrl-C in the middle of a topology update waits for its end; training then goes on as if nobody had asked."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.runtime.interrupts import waiting_interrupts
from tests.support.snapshots import assert_same, snapshot

Run = tuple[nn.Module, Any, smet.TopologyManager]


@pytest.fixture(autouse=True)
def handler_of_python() -> Iterator[None]:
    """Has Ctrl-C raise, which a shell that runs the tests in the background has had ignored."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def begin(auto_step: bool, **options: Any) -> Run:
    torch.manual_seed(0)
    model = smet.sparsify(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), 0.3)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    return (
        model,
        optimizer,
        smet.TopologyManager(model, optimizer, total_steps=100, every=4, auto_step=auto_step, **options),
    )


def go(run: Run, steps: range) -> int:
    """Trains as a loop that survives Ctrl-C; returns how often that came."""
    model, optimizer, manager = run
    num_interrupts = 0
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        try:
            optimizer.step()
            if not manager.auto_step:
                manager.step()
        except KeyboardInterrupt:
            num_interrupts += 1
        optimizer.zero_grad()
    return num_interrupts


def interrupting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Interrupts the process before the first call of ``function``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not waits:
            waits.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    waits: list[bool] = []
    return call


@pytest.mark.parametrize("auto_step", [True, False])
@pytest.mark.parametrize("options", [{"grow": "gradient"}, {"density_schedule": [(8, 0.2)]}], ids=str)
@pytest.mark.parametrize("place", ["set_bits", "mask"])
def test_an_update_that_is_interrupted_is_complete(
    place: str, options: Any, auto_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, run = begin(auto_step, **options), begin(auto_step, **options)
    go(expected, range(16))
    go(run, range(7))
    monkeypatch.setattr(CompactWeight, place, interrupting(getattr(CompactWeight, place)))
    handler = signal.getsignal(signal.SIGINT)
    assert go(run, range(7, 16)) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(snapshot(run[0], run[1]), snapshot(expected[0], expected[1]))
    assert run[2].history == expected[2].history and run[2].num_steps == 16


@pytest.mark.parametrize("depth", [1, 2])
def test_a_second_signal_is_handled_at_once(depth: int) -> None:
    """A manager that steps by itself waits twice: in the optimizer's hook and in its step."""
    seen = []
    with pytest.raises(KeyboardInterrupt), waiting_interrupts(), waiting_interrupts() if depth == 2 else nullcontext():
        signal.raise_signal(signal.SIGINT)
        seen.append("first")
        signal.raise_signal(signal.SIGINT)
        seen.append("second")
    assert seen == ["first"]


def test_the_handler_of_the_user_is_called_once_and_stays() -> None:
    calls: list[int] = []

    def handle(number: int, frame: Any) -> None:
        calls.append(number)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with waiting_interrupts():
            signal.raise_signal(signal.SIGTERM)
            assert not calls
        assert calls == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is handle
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with waiting_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_an_error_within_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="mine"), waiting_interrupts():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_train_too() -> None:
    run, counts = begin(True), []
    thread = threading.Thread(target=lambda: counts.append(go(run, range(8))))
    thread.start()
    thread.join()
    assert counts == [0] and len(run[2].history) == 2
