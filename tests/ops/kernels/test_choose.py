"""Which kernel is chosen: by the case, or as the environment says; and every kernel there is gives the same."""

import dataclasses

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.format import Layout
from smet_compile.ops import choose
from smet_compile.ops.kernels.native.build import library
from tests.ops.kernels.adamw_cases import Case as Parameter
from tests.ops.kernels.adamw_cases import update_of
from tests.ops.kernels.tolerances import assert_close
from tests.ops.matmul_cases import case

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(library("tiles") is None, reason="there is no C++ compiler")


def chosen(op: str, dtype: torch.dtype, block_shape: tuple[int, int], density: float) -> str:
    layout = Layout.of((512, 512), block_shape)
    return choose.kernel_of(op, choose.Case(CPU, dtype, layout, layout.num_active(density)))


@compiles
def test_by_dtype_block_shape_and_density() -> None:
    assert chosen("masked_matmul", torch.float32, (64, 64), 0.25) == "cpu_tiles"
    assert chosen("sampled_matmul", torch.float32, (64, 64), 0.25) == "cpu_tiles"
    assert chosen("masked_matmul", torch.float32, (1, 1), 0.25) == "cpu_expand"
    assert chosen("masked_matmul", torch.float32, (1, 16), 0.25) == "cpu_expand"
    assert chosen("masked_matmul", torch.float32, (4, 4), 0.2) == "cpu_tiles"
    assert chosen("masked_matmul", torch.float32, (4, 4), 0.3) == "cpu_expand"  # a quarter of a vector is filled
    assert chosen("masked_matmul", torch.float64, (64, 64), 0.25) == "cpu_expand"
    assert chosen("unpack", torch.float16, (1, 1), 0.25) == "cpu_expand"


@compiles
def test_with_amx_dense_matrices_are_multiplied_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    case_of = choose.Case(CPU, torch.bfloat16, Layout.of((512, 512), (64, 64)), 1)
    for amx, density, pays in ((False, 0.5, True), (True, 0.5, False), (True, 0.2, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert choose._cpu_tiles_pay(case_of._replace(num_active=case_of.layout.num_active(density))) is pays


def test_without_a_compiler_plain_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.native import adamw, expand, matmul_tiles

    for module in (adamw, expand, matmul_tiles):
        monkeypatch.setattr(module, "library", lambda name: None)
    choose._chosen.cache_clear()
    try:
        assert {chosen(op, torch.float32, (64, 64), 0.25) for op in ("masked_matmul", "unpack")} == {"torch"}
        update = update_of(Parameter((8, 8), (4, 4)), torch.float32, torch.float32)
        assert choose.update_kernel_of(update).name == "torch"
    finally:
        choose._chosen.cache_clear()


@pytest.mark.parametrize("name", ["reference", "torch", "cpu_tiles", "cpu_expand", "cpu"])
@pytest.mark.parametrize("block_shape", [(1, 1), (1, 8), (16, 8)], ids=str)
@pytest.mark.parametrize("shape", ["ragged", "stack"])
def test_a_forced_kernel_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: str, block_shape: tuple[int, int], name: str
) -> None:
    each = case(shape, block_shape)
    _, rows, cols = each.grid.matrix
    x, gy, bias = each.tokens(7, cols), each.tokens(7, rows), torch.randn(rows, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x_, gy_, bias_, values = (t.bfloat16().to(dtype) for t in (x, gy, bias, each.values()))
        monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
        out = torch.ops.smet.masked_matmul(x_, values, *each.topology, True, bias_)
        grad = torch.ops.smet.sampled_matmul(gy_, x_, *each.topology, each.compact.num_active)
        monkeypatch.setenv("SMET_COMPILE_KERNEL", "reference")
        exact = (t.double() for t in (x_, values, bias_, gy_))
        x64, values64, bias64, gy64 = exact
        assert_close("out", out, torch.ops.smet.masked_matmul(x64, values64, *each.topology, True, bias64))
        assert_close("grad", grad, torch.ops.smet.sampled_matmul(gy64, x64, *each.topology, each.compact.num_active))


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "cuda")
    with pytest.raises(ValueError, match=r"SMET_COMPILE_KERNEL: expected one of .*reference.*, got 'cuda'"):
        chosen("masked_matmul", torch.float32, (64, 64), 0.25)


@pytest.mark.parametrize("name", [None, "reference"])
def test_explain_says_which_kernel(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    if name is not None:
        monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
    model = smet.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), 0.25, block_shape=(32, 32))
    step = smet.compile_train_step(model, smet.ActiveAdamW(model), lambda model, batch: model(batch).square().mean())
    batch = torch.randn(4, 64)
    said = smet.explain(step, batch).sites[1]
    expected = {
        part: choose.kernel_of(op, choose.Case(CPU, torch.float32, Layout.of((64, 64), (32, 32)), 1))
        for part, op in (
            ("forward", "masked_matmul"),
            ("input gradient", "masked_matmul"),
            ("weight gradient", "sampled_matmul"),
        )
    }
    update = update_of(Parameter((64, 64), (32, 32)), torch.float32, torch.float32)
    assert said.kernels == {**expected, "update": choose.update_kernel_of(update).name}
    assert all(kernel in str(smet.explain(step, batch)) for kernel in said.kernels.values())
    assert dataclasses.replace(said, kernels={}).parts == dict.fromkeys(said.parts, "fused")
