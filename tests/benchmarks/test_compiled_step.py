"""The benchmark of compiled steps measures what it says, in a small form."""

import json

import pytest

from tests.support.fresh_process import ROOT, run_python

SCRIPT = str(ROOT / "benchmarks" / "compiled_step.py")
SMALL = ("--layers=1", "--hidden=128", "--vocabulary=256", "--steps=1")


def measured(*child: str) -> dict[str, float]:
    result: dict[str, float] = json.loads(run_python(SCRIPT, *SMALL, "--child", *child).splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "two calls", "fused"])
def test_memory(method: str) -> None:
    found = measured("memory", method, "True")
    assert 0 < found["formula"] < found["allocated"]
    assert found["resident"] > 0.9 * found["formula"]


@pytest.mark.slow
def test_the_formula_counts_the_gradients_that_a_fused_update_has_not() -> None:
    dense, loop, fused = (measured("memory", method, "False")["formula"] for method in ("dense", "two calls", "fused"))
    assert fused < loop < dense


@pytest.mark.slow
def test_times() -> None:
    found = measured("times", "fused", "False")
    assert found["compile"] > found["step"] > 0
    assert found["compile_cpu"] > 0
