"""Triton's kernels tell what they can do, without Triton."""

import pytest
import torch

from smet_compile.format import Layout
from smet_compile.ops.kernels.triton import supports as module
from smet_compile.ops.kernels.triton.supports import OPS, supports
from tests.support.fresh_process import run_python

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
TILES, SINGLE = Layout.of((64, 64), (32, 32)), Layout.of((64, 64), (1, 1))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(module, "_is_installed", lambda: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", OPS)
def test_dtypes_on_a_gpu(op: str) -> None:
    for layout in (TILES, SINGLE):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert supports(op, CUDA, dtype, layout, False)
        assert not supports(op, CUDA, torch.float64, layout, False)
        assert not supports("update_all", CUDA, torch.float32, layout, False)


@pytest.mark.usefixtures("hopper")
def test_only_tiles_take_tokens_sorted_by_matrix() -> None:
    assert supports("masked_matmul", CUDA, torch.bfloat16, TILES, True)
    assert not supports("masked_matmul", CUDA, torch.bfloat16, SINGLE, True)


@pytest.mark.usefixtures("hopper")
def test_without_triton_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_installed", lambda: False)
    assert not any(supports(op, CUDA, torch.bfloat16, TILES, False) for op in OPS)
    assert not module.runs_on(CUDA)


def test_older_gpus_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not supports("unpack", CUDA, torch.float16, TILES, False)


def test_the_cpu_does_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not supports("unpack", CPU, torch.float32, TILES, False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports("unpack", CPU, torch.float32, TILES, False)


def test_asking_imports_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import smet_compile; "
        "from smet_compile.ops.kernels.triton.supports import supports; print(supports)"
    )
    assert "supports" in run_python("-c", code)
