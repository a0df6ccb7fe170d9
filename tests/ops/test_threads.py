"""Threads that spin while others use the cores are warned of, once, with what to set."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from smet_compile.ops import threads


@pytest.fixture(autouse=True)
def shared_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, of which others use three, and as many threads."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "warn_once", warnings.warn)


def test_shared_cores() -> None:
    message = r"4 threads here share 4 cores with others \(load 3.0\).*set OMP_WAIT_POLICY=PASSIVE"
    with pytest.warns(UserWarning, match=message):
        threads.warn_of_spinning()


@pytest.mark.parametrize("cause", ["policy", "spin count", "one thread", "free cores", "no load known"])
def test_nothing_to_say(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cause == "policy":
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    elif cause == "spin count":
        monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    elif cause == "one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    elif cause == "free cores":
        monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 0.0, 0.0))
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (_ for _ in ()).throw(OSError()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads.warn_of_spinning()


_SCRIPT = """
import os, warnings
os.getloadavg = lambda: (100.0, 0.0, 0.0)
import torch, smet_compile as smet
torch.set_num_threads(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = smet.sparsify(torch.nn.Linear(64, 64), density=0.1)
    for _ in range(2):
        model(torch.randn(8, 64)).sum().backward()
print(sum("OMP_WAIT_POLICY" in str(each.message) for each in caught))
"""


def test_a_first_product_says_it_once() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    run = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
