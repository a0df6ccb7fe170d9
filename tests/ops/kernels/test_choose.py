"""Which kernel is chosen: by the case, or as the environment says; and every kernel there is gives the same."""

import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.format import Layout
from smet_compile.ops import choose, warn
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


@pytest.mark.filterwarnings("ignore:SMET_COMPILE_KERNEL=cpu_tiles")
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


@pytest.fixture
def none_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "_warned", set())


def misses(monkeypatch: pytest.MonkeyPatch, name: str, op: str, case: choose.Case) -> list[str]:
    """The warnings where ``name`` is forced, op and case come twice, and a report asks before."""
    monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        choose.kernel_of(op, case)
        assert not given
        for _ in range(2):
            choose.compute(op, case)
    return [str(each.message) for each in given]


CUDA, META = torch.device("cuda"), torch.device("meta")
ONLY_GPU = "needs Triton and a CUDA GPU of compute capability 8.0 or newer"
MISSED = [
    ("cpu_tiles", "masked_matmul", torch.float32, (1, 1), "float32 single weights on cpu, since cpu_tiles multiplies"),
    ("cpu_tiles", "sampled_matmul", torch.float32, (1, 8), "float32 runs on cpu, since cpu_tiles multiplies tiles"),
    ("cpu_tiles", "masked_matmul", torch.float64, (8, 8), "cpu_tiles does not multiply torch.float64 here"),
    ("triton_tiles", "masked_matmul", torch.float32, (8, 8), f"cpu_tiles computes .* since triton_tiles {ONLY_GPU}"),
    ("triton_tiles", "masked_matmul", torch.float32, (1, 1), "cpu_expand computes .* since triton_tiles multiplies"),
    ("triton_expand", "sampled_matmul", torch.float32, (1, 1), f"since triton_expand {ONLY_GPU}"),
    ("triton_expand", "unpack", torch.float32, (8, 8), "cpu_expand computes unpack of torch.float32 tiles on cpu"),
    ("triton", "pack", torch.bfloat16, (8, 8), "cpu_expand computes pack of torch.bfloat16 tiles on cpu"),
    ("triton", "masked_matmul", torch.float32, (8, 8), f"triton_tiles {ONLY_GPU} and triton_expand {ONLY_GPU}; name"),
]
NOT_MISSED = [
    ("cpu", "masked_matmul", torch.float32, (1, 1)),
    ("cpu", "masked_matmul", torch.float64, (8, 8)),
    ("cpu_tiles", "masked_matmul", torch.float32, (8, 8)),
    ("cpu_tiles", "unpack", torch.float32, (1, 1)),
    ("cpu_tiles", "pack", torch.float64, (8, 8)),
    ("triton_tiles", "unpack", torch.float32, (8, 8)),
    ("cpu_adamw", "unpack", torch.float32, (8, 8)),
    ("triton_adamw", "masked_matmul", torch.float32, (8, 8)),
    ("cpu_expand", "sampled_matmul", torch.float32, (8, 8)),
    ("torch", "masked_matmul", torch.float64, (1, 1)),
    ("reference", "pack", torch.float16, (1, 8)),
]


def case_on(device: torch.device, dtype: torch.dtype, block_shape: tuple[int, int], grouped: bool) -> choose.Case:
    layout = Layout.of((2, 64, 64) if grouped else (64, 64), block_shape)
    return choose.Case(device, dtype, layout, layout.num_active(0.2), grouped)


@compiles
@pytest.mark.usefixtures("none_warned")
@pytest.mark.parametrize(("name", "op", "dtype", "block_shape", "why"), MISSED)
def test_a_named_kernel_that_cannot_compute_a_case_is_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str, dtype: torch.dtype, block_shape: tuple[int, int], why: str
) -> None:
    (message,) = misses(monkeypatch, name, op, case_on(CPU, dtype, block_shape, False))
    assert message.startswith(f"SMET_COMPILE_KERNEL={name}: ") and re.search(why, message)
    assert f": {choose.kernel_of(op, case_on(CPU, dtype, block_shape, False))} computes {op} of " in message
    assert misses(monkeypatch, name, op, case_on(CPU, dtype, block_shape, False)._replace(num_active=3)) == []


@compiles
@pytest.mark.usefixtures("none_warned")
@pytest.mark.parametrize(("name", "op", "dtype", "block_shape"), NOT_MISSED)
def test_a_kernel_that_is_used_or_has_no_such_op_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str, dtype: torch.dtype, block_shape: tuple[int, int]
) -> None:
    assert misses(monkeypatch, name, op, case_on(CPU, dtype, block_shape, False)) == []


@pytest.mark.usefixtures("none_warned")
@pytest.mark.parametrize("name", ["cpu", "cpu_expand", "triton_expand"])
def test_another_device_and_sorted_tokens_are_reported(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = case_on(META, torch.float32, (8, 8), grouped=True)
    (message,) = misses(monkeypatch, name, "masked_matmul", case)
    assert "torch.float32 tiles, with tokens sorted by matrix, on meta, since " in message
    why = {"triton_expand": "does not take tokens sorted by matrix"}.get(name, "runs on the CPU only")
    assert message.count(why) == (2 if name == "cpu" else 1)


@pytest.mark.usefixtures("none_warned")
def test_a_named_kernel_that_did_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.native import build, matmul_tiles

    for module in (build, matmul_tiles):
        monkeypatch.setattr(module, "library", lambda name: None)
    choose._chosen.cache_clear()
    try:
        (message,) = misses(monkeypatch, "cpu_tiles", "masked_matmul", case_on(CPU, torch.float32, (8, 8), False))
    finally:
        choose._chosen.cache_clear()
    assert "since cpu_tiles could not be compiled; name a kernel that can" in message


@compiles
@pytest.mark.usefixtures("none_warned")
@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("triton_adamw", torch.float32, f"cpu_adamw computes the optimizer step of .*, since triton_adamw {ONLY_GPU}"),
        ("triton", torch.float32, f"cpu_adamw computes the optimizer step of .*, since triton_adamw {ONLY_GPU}"),
        (
            "cpu_adamw",
            torch.float64,
            "torch computes the .* step of torch.float64 parameters with torch.float64 moments",
        ),
        ("cpu_adamw", torch.float16, "since cpu_adamw does not take parameters, gradients or optimizer state of this"),
        ("cpu", torch.float64, "SMET_COMPILE_KERNEL=cpu: torch computes"),
        ("cpu_adamw", torch.float32, None),
        ("cpu", torch.bfloat16, None),
        ("cpu_tiles", torch.float32, None),
        ("cpu_expand", torch.float64, None),
        ("triton_tiles", torch.float32, None),
        ("torch", torch.float64, None),
        ("reference", torch.float32, None),
    ],
)
def test_an_update_by_another_kernel_is_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, why: str | None
) -> None:
    monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
    update = update_of(Parameter((8, 8), (4, 4)), dtype, dtype)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        choose.update_kernel_of(update, traced=True)
        assert not given
        for _ in range(2):
            choose.update_kernel_of(update)
    assert len(given) == (why is not None) and all(re.search(str(why), str(each.message)) for each in given)


@compiles
@pytest.mark.usefixtures("none_warned")
def test_a_report_that_is_an_error_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(strict: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = smet.sparsify(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 0.5, block_shape=(8, 8))
        optimizer, x = smet.ActiveAdamW(model), torch.randn(4, 32)
        if strict:
            monkeypatch.setenv("SMET_COMPILE_KERNEL", "triton")
            before = [parameter.clone() for parameter in model.parameters()]
            with pytest.raises(UserWarning, match="computes unpack of"):
                model(x)
        model(x).square().sum().backward()  # its own report is shown: an exception there would leave some gradients out
        if strict:
            with pytest.raises(UserWarning, match="computes the optimizer step of"):
                optimizer.step()
            assert all(map(torch.equal, model.parameters(), before))
        optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = trained(strict=False)
    with pytest.warns(UserWarning, match="computes pack of"):
        warnings.simplefilter("error")
        found = trained(strict=True)
    assert all(map(torch.equal, found, expected))
