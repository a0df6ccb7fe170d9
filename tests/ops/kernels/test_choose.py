"""Tests which kernel is chosen: by the case, or as the environment says; and that every kernel gives the same."""

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.format import Layout
from smet_compile.ops import choose, default_kernels, law, law_of_updates, torch_insides
from smet_compile.ops.kernels.native.build import library
from tests.ops.kernels.adamw_cases import Case as Parameter
from tests.ops.kernels.adamw_cases import copy_of, update_of
from tests.ops.kernels.cpu_cases import weight
from tests.ops.kernels.tolerances import assert_close

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(library("tiles") is None, reason="there is no C++ compiler")


def chosen(op: str, dtype: torch.dtype, block_shape: tuple[int, int], density: float) -> str:
    layout = Layout.of((512, 512), block_shape)
    return choose.kernel_of(op, choose.Case(CPU, dtype, layout, layout.num_active(density)))


@compiles
def test_by_dtype_block_shape_and_density() -> None:
    assert chosen("masked_matmul", torch.float32, (64, 64), 0.25) == "cpu_tiles"
    assert chosen("sampled_matmul", torch.float32, (64, 64), 0.25) == "cpu_tiles"
    assert chosen("masked_matmul", torch.float32, (1, 1), 0.25) == "cpu_single"
    assert chosen("sampled_matmul", torch.float32, (1, 16), 0.25) == "cpu_single"
    assert chosen("masked_matmul", torch.float32, (16, 1), 0.25) == "cpu_expand"
    assert chosen("masked_matmul", torch.float32, (4, 4), 0.2) == "cpu_tiles"
    assert chosen("masked_matmul", torch.float32, (4, 4), 0.3) == "cpu_expand"  # a quarter of a vector is filled
    assert chosen("masked_matmul", torch.float64, (64, 64), 0.25) == "cpu_expand"
    assert chosen("unpack", torch.float16, (1, 1), 0.25) == "cpu_expand"


@compiles
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_single_weights_by_density(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    choose._chosen.cache_clear()
    try:
        for op in ("masked_matmul", "sampled_matmul"):
            assert chosen(op, torch.float32, (1, 1), 0.5) == "cpu_single"
            assert chosen(op, torch.float32, (1, 1), 0.51) == "cpu_expand"
    finally:
        choose._chosen.cache_clear()


@compiles
@pytest.mark.parametrize(("multiplies", "amx", "most"), [(False, False, 0.5), (True, False, 0.25), (True, True, 0.06)])
def test_single_weights_of_16_bits_by_the_speed_of_dense_products(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool, amx: bool, most: float
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(default_kernels, "multiplies_on_cpu", lambda dtype: multiplies)
    choose._chosen.cache_clear()
    try:
        for dtype in (torch.bfloat16, torch.float16):
            assert chosen("masked_matmul", dtype, (1, 1), most - 0.01) == "cpu_single"
            assert chosen("masked_matmul", dtype, (1, 1), most + 0.01) == "cpu_expand"
    finally:
        choose._chosen.cache_clear()


@compiles
def test_with_amx_dense_matrices_are_multiplied_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    case_of = choose.Case(CPU, torch.bfloat16, Layout.of((512, 512), (64, 64)), 1)
    for amx, density, is_profitable in ((False, 0.5, True), (True, 0.5, False), (True, 0.2, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        case = case_of._replace(num_active=case_of.layout.num_active(density))
        assert default_kernels._cpu_tiles_are_profitable(case) is is_profitable


def test_without_a_compiler_plain_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.native import adamw, expand, single, tiles

    for module in (adamw, expand, single, tiles):
        monkeypatch.setattr(module, "library", lambda name: None)
    choose._chosen.cache_clear()
    try:
        for block_shape in ((64, 64), (1, 1)):
            assert {chosen(op, torch.float32, block_shape, 0.25) for op in ("masked_matmul", "unpack")} == {"torch"}
        update = update_of(Parameter((8, 8), (4, 4)), torch.float32, torch.float32)
        assert choose.update_kernel_of(update).name == "torch"
    finally:
        choose._chosen.cache_clear()


def all_products(topology: Any, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes every product and move of (x, gy, bias, values, dense) by the kernels that are chosen."""
    x, gy, bias, values, dense = tensors
    return {
        "masked_matmul": choose.compute("masked_matmul", x, topology)(x, values, topology, True, bias),
        "sampled_matmul": choose.compute("sampled_matmul", gy, topology)(gy, x, topology),
        "unpack": choose.compute("unpack", values, topology)(values, topology),
        "pack": choose.compute("pack", dense, topology)(dense, topology),
    }


@pytest.mark.filterwarnings("ignore:SMET_COMPILE_KERNEL=cpu_tiles", "ignore:SMET_COMPILE_KERNEL=cpu_single")
@pytest.mark.parametrize("name", ["reference", "torch", "cpu_tiles", "cpu_single", "cpu_expand", "cpu"])
@pytest.mark.parametrize("block_shape", [(1, 1), (1, 8), (16, 8)], ids=str)
@pytest.mark.parametrize("size", [(37, 29), (3, 21, 29)], ids=["ragged", "stack"])
def test_a_forced_kernel_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], block_shape: tuple[int, int], name: str
) -> None:
    each = weight(size, block_shape)
    rows, cols = each.layout.matrix
    x, gy, bias = each.tokens(7, cols), each.tokens(7, rows), torch.randn(rows, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [t.bfloat16().to(dtype) for t in (x, gy, bias, each.values(), torch.randn(size))]
        monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
        found = all_products(each.topology, *tensors)
        monkeypatch.setenv("SMET_COMPILE_KERNEL", "reference")
        expected = all_products(each.topology, *(t.double() for t in tensors))
        for op, result in found.items():
            assert_close(op, result, expected[op])


def test_the_reference_is_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "reference")
    each = weight((37, 29), (8, 8))
    for op in ("masked_matmul", "sampled_matmul", "unpack", "pack"):
        assert choose.compute(op, each.values(), each.topology) is getattr(law, op)
    update = update_of(Parameter((8, 8), (4, 4)), torch.bfloat16, torch.uint8)
    assert choose.update_kernel_of(update).function("update_all") is law_of_updates.update_all
    by_law = [copy_of(update, CPU) for _ in range(2)]
    choose.update_all(by_law[:1])
    law_of_updates.update_all(by_law[1:])
    assert all(map(torch.equal, by_law[0].changed(), by_law[1].changed()))


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
    site = smet.explain(step, batch).sites[1]
    expected = {
        part: choose.kernel_of(op, choose.Case(CPU, torch.float32, Layout.of((64, 64), (32, 32)), 1))
        for part, op in (
            ("forward", "masked_matmul"),
            ("input gradient", "masked_matmul"),
            ("weight gradient", "sampled_matmul"),
        )
    }
    update = update_of(Parameter((64, 64), (32, 32)), torch.float32, torch.float32)
    assert site.kernels == {**expected, "update": choose.update_kernel_of(update).name}
    assert all(kernel in str(smet.explain(step, batch)) for kernel in site.kernels.values())
    assert dataclasses.replace(site, kernels={}).parts == dict.fromkeys(site.parts, "fused")


@pytest.fixture
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_insides, "_warned", set())


def warnings_of(monkeypatch: pytest.MonkeyPatch, name: str, op: str, case: choose.Case) -> list[str]:
    """Returns the warnings where ``name`` is forced, op and case come twice, and a report asks before."""
    monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        choose.kernel_of(op, case)
        assert not given
        for _ in range(2):
            choose._choose_and_warn(op, case)
    return [str(each.message) for each in given]


CUDA, META = torch.device("cuda"), torch.device("meta")
ONLY_GPU = "runs on CUDA GPUs only"
MISSED = [
    ("cpu_tiles", "masked_matmul", torch.float32, (1, 1), "float32 single weights on cpu, since cpu_tiles multiplies"),
    ("cpu_tiles", "sampled_matmul", torch.float32, (1, 8), "float32 runs on cpu, since cpu_tiles multiplies tiles"),
    ("cpu_tiles", "masked_matmul", torch.float64, (8, 8), "cpu_tiles does not multiply torch.float64 here"),
    ("triton_tiles", "masked_matmul", torch.float32, (8, 8), f"cpu_tiles computes .* since triton_tiles {ONLY_GPU}"),
    ("triton_tiles", "masked_matmul", torch.float32, (1, 1), "cpu_single computes .* since triton_tiles multiplies"),
    ("cpu_single", "masked_matmul", torch.float32, (8, 8), "cpu_single multiplies single weights and runs along a"),
    ("cpu_single", "sampled_matmul", torch.float32, (8, 1), "cpu_single multiplies single weights and runs along a"),
    ("cpu_single", "masked_matmul", torch.float64, (1, 1), "since cpu_single does not multiply torch.float64"),
    ("triton_expand", "sampled_matmul", torch.float32, (1, 1), f"since triton_expand {ONLY_GPU}"),
    ("triton_expand", "unpack", torch.float32, (8, 8), "cpu_expand computes unpack of torch.float32 tiles on cpu"),
    ("triton", "pack", torch.bfloat16, (8, 8), "cpu_expand computes pack of torch.bfloat16 tiles on cpu"),
    ("triton_tma", "masked_matmul", torch.bfloat16, (32, 32), f"since triton_tma {ONLY_GPU}"),
    ("triton_tma", "sampled_matmul", torch.bfloat16, (32, 32), "multiplies tiles with sides of 64 or 128 only"),
    ("triton_tma", "masked_matmul", torch.float32, (32, 32), "since triton_tma multiplies bf16 and fp16 only"),
    ("triton_tma", "masked_matmul", torch.bfloat16, (1, 1), "since triton_tma multiplies tiles only"),
    (
        "triton",
        "masked_matmul",
        torch.float32,
        (8, 8),
        f"{ONLY_GPU} and triton_expand {ONLY_GPU} and triton_tma .*; name",
    ),
]
NOT_MISSED = [
    ("cpu", "masked_matmul", torch.float32, (1, 1)),
    ("cpu", "masked_matmul", torch.float64, (8, 8)),
    ("cpu_tiles", "masked_matmul", torch.float32, (8, 8)),
    ("cpu_tiles", "unpack", torch.float32, (1, 1)),
    ("cpu_single", "masked_matmul", torch.float32, (1, 8)),
    ("cpu_tiles", "pack", torch.float64, (8, 8)),
    ("triton_tiles", "unpack", torch.float32, (8, 8)),
    ("cpu_adamw", "unpack", torch.float32, (8, 8)),
    ("triton_adamw", "masked_matmul", torch.float32, (8, 8)),
    ("cpu_expand", "sampled_matmul", torch.float32, (8, 8)),
    ("torch", "masked_matmul", torch.float64, (1, 1)),
    ("reference", "pack", torch.float16, (1, 8)),
]


def case_on(
    device: torch.device, dtype: torch.dtype, block_shape: tuple[int, int], grouped: bool, one_more: bool = False
) -> choose.Case:
    layout = Layout.of((2, 64, 64) if grouped else (64, 64), block_shape)
    return choose.Case(device, dtype, layout, layout.num_active(0.2) + one_more, grouped)


@compiles
@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize(("name", "op", "dtype", "block_shape", "reason"), MISSED)
def test_a_named_kernel_that_cannot_compute_a_case_is_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str, dtype: torch.dtype, block_shape: tuple[int, int], reason: str
) -> None:
    (message,) = warnings_of(monkeypatch, name, op, case_on(CPU, dtype, block_shape, False))
    assert message.startswith(f"SMET_COMPILE_KERNEL={name}: ") and re.search(reason, message)
    assert f": {choose.kernel_of(op, case_on(CPU, dtype, block_shape, False))} computes {op} of " in message
    assert warnings_of(monkeypatch, name, op, case_on(CPU, dtype, block_shape, False, one_more=True)) == []


@compiles
@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize(("name", "op", "dtype", "block_shape"), NOT_MISSED)
def test_a_kernel_that_is_used_or_has_no_such_op_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str, dtype: torch.dtype, block_shape: tuple[int, int]
) -> None:
    assert warnings_of(monkeypatch, name, op, case_on(CPU, dtype, block_shape, False)) == []


@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize("name", ["cpu", "cpu_expand", "triton_expand"])
def test_another_device_and_sorted_tokens_are_reported(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = case_on(META, torch.float32, (8, 8), grouped=True)
    (message,) = warnings_of(monkeypatch, name, "masked_matmul", case)
    assert "torch.float32 tiles, with tokens sorted by matrix, on meta, since " in message
    reason = {"triton_expand": "does not take tokens sorted by matrix"}.get(name, "runs on the CPU only")
    assert message.count(reason) == (3 if name == "cpu" else 1)


@pytest.mark.usefixtures("nothing_warned_yet")
def test_a_named_kernel_that_did_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from smet_compile.ops.kernels.native import tiles

    monkeypatch.setattr(tiles, "library", lambda name: None)
    choose._chosen.cache_clear()
    try:
        (message,) = warnings_of(monkeypatch, "cpu_tiles", "masked_matmul", case_on(CPU, torch.float32, (8, 8), False))
    finally:
        choose._chosen.cache_clear()
    assert "since cpu_tiles could not be compiled; name a kernel that can" in message


@compiles
@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("triton_adamw", torch.float32, f"cpu_adamw computes the optimizer step of .*, since triton_adamw {ONLY_GPU}"),
        ("triton", torch.float32, f"cpu_adamw computes the optimizer step of .*, since triton_adamw {ONLY_GPU}"),
        (
            "cpu_adamw",
            torch.float64,
            "torch computes the .* of torch.float64 parameters with torch.float64 state by the rule adamw on cpu",
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
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
    update = update_of(Parameter((8, 8), (4, 4)), dtype, dtype)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        choose.update_kernel_of(update, is_traced=True)
        assert not given
        for _ in range(2):
            choose.update_kernel_of(update)
    assert len(given) == (reason is not None) and all(re.search(str(reason), str(each.message)) for each in given)


@compiles
@pytest.mark.usefixtures("nothing_warned_yet")
def test_a_warning_that_is_an_error_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(strict: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = smet.sparsify(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 0.5, block_shape=(8, 8))
        optimizer, x = smet.ActiveAdamW(model), torch.randn(4, 32)
        if strict:
            monkeypatch.setenv("SMET_COMPILE_KERNEL", "triton")
            before = [parameter.clone() for parameter in model.parameters()]
            with pytest.raises(UserWarning, match="computes masked_matmul of"):
                model(x)
        model(x).square().sum().backward()  # the warning is shown: an exception would leave some gradients out
        if strict:
            with pytest.raises(UserWarning, match="computes the optimizer step of"):
                optimizer.step()
            assert all(map(torch.equal, model.parameters(), before))
        optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = trained(strict=False)
    with pytest.warns(UserWarning, match="computes sampled_matmul of"):
        warnings.simplefilter("error")
        found = trained(strict=True)
    assert all(map(torch.equal, found, expected))


@compiles
def test_a_gradient_of_another_dtype_goes_to_plain_torch() -> None:
    updates = [update_of(Parameter((8, 8), (4, 4)), torch.float32, torch.float32, broken=False) for _ in range(2)]
    first, second = updates
    for grad in (first.grad, first.grad.double(), first.grad):  # the third time as the first
        first.grad, second.grad = grad, grad.float()
        choose.update_all([first])
        choose.update_all([second])
    assert choose.update_kernel_of(first).name == "cpu_adamw"
    assert torch.allclose(first.values, second.values, rtol=1e-5) and int(first.step) == 103
