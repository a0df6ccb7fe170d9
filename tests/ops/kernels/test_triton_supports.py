"""Triton's kernels tell what they can do, without Triton."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smet_compile.format import Layout
from smet_compile.ops import choose
from smet_compile.ops.choose import kernel_of
from smet_compile.ops.default_kernels import DEFAULT_KERNELS
from smet_compile.ops.kernel import Case
from smet_compile.ops.kernels.triton import supports as module
from smet_compile.ops.kernels.triton.supports import OPS, supports
from tests.support.fresh_process import run_python

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
TILES, SINGLE = Layout.of((64, 64), (32, 32)), Layout.of((64, 64), (1, 1))


matmul_expanded = pytest.importorskip("smet_compile.ops.kernels.triton.matmul_expanded", exc_type=ImportError)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(module, "_is_installed", lambda: True)
    choose._chosen.cache_clear()
    yield
    choose._chosen.cache_clear()


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


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", ["masked_matmul", "unpack", "update_all"])
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Every kernel of Triton says why it does not run: another device, another maker, an old GPU, no Triton."""
    kernels = [kernel for kernel in DEFAULT_KERNELS if kernel.name.startswith("triton") and op in kernel.functions]
    assert kernels

    def reasons(device: torch.device) -> set[str | None]:
        if op == "update_all":
            case: Any = SimpleNamespace(update=SimpleNamespace(values=SimpleNamespace(device=device)))
        else:
            case = Case(device, torch.bfloat16, TILES, 2)
        return {kernel.refusal(op, case) for kernel in kernels}

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reasons(CPU) == reasons(torch.device("mps")) == {"runs on CUDA GPUs only"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert reasons(CUDA) == {"needs a GPU of compute capability 8.0 or newer, not 7.5"}
    monkeypatch.setattr(module, "_is_installed", lambda: False)
    assert reasons(CUDA) == {"needs Triton, which is not installed"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons(CPU) == {"needs Triton, which is not installed"}
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert reasons(CUDA) == {"is not written for AMD GPUs"}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("side", "dtype", "density", "expected"),
    [
        (128, torch.bfloat16, 0.5, "triton_tiles"),
        (128, torch.bfloat16, 0.6, "triton_expand"),
        ((256, 128), torch.bfloat16, 0.5, "triton_tiles"),
        (64, torch.bfloat16, 0.25, "triton_tiles"),
        (64, torch.float16, 0.5, "triton_expand"),
        ((128, 64), torch.float16, 0.5, "triton_expand"),
        (48, torch.bfloat16, 0.1, "triton_tiles"),
        (48, torch.bfloat16, 0.25, "triton_expand"),
        (32, torch.bfloat16, 0.1, "triton_tiles"),
        (32, torch.bfloat16, 0.25, "triton_expand"),
        (32, torch.float32, 0.25, "triton_tiles"),
        (32, torch.float32, 0.6, "triton_expand"),
        (16, torch.bfloat16, 0.05, "triton_tiles"),
        (16, torch.bfloat16, 0.12, "triton_expand"),
        (8, torch.bfloat16, 0.01, "triton_expand"),
        (1, torch.bfloat16, 0.01, "triton_expand"),
    ],
)
def test_tiles_are_chosen_below_the_density_at_which_a_dense_product_is_faster(
    side: int | tuple[int, int], dtype: torch.dtype, density: float, expected: str
) -> None:
    layout = Layout.of((3072, 3072), side if isinstance(side, tuple) else (side, side))
    case = Case(CUDA, dtype, layout, layout.num_active(density))
    assert kernel_of("masked_matmul", case) == kernel_of("sampled_matmul", case) == expected


@pytest.mark.usefixtures("hopper")
def test_the_kernel_with_tma_is_chosen_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of((256, 256), (64, 64))
    case = Case(CUDA, torch.bfloat16, layout, 3)
    for name, expected in (("", "triton_tiles"), ("triton", "triton_tiles"), ("triton_tma", "triton_tma")):
        monkeypatch.setenv("SMET_COMPILE_KERNEL", name)
        assert kernel_of("masked_matmul", case) == kernel_of("sampled_matmul", case) == expected


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_cards_without_tma_or_its_memory_are_told_so(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    module.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    (kernel,) = (kernel for kernel in DEFAULT_KERNELS if kernel.name == "triton_tma")
    case = Case(CUDA, torch.bfloat16, Layout.of((256, 256), (64, 64)), 3)
    reason = kernel.refusal("masked_matmul", case)
    module.architecture.cache_clear()
    assert reason == "needs the TMA and the shared memory of a GPU of compute capability 9.0 or 10.0"


@pytest.mark.usefixtures("hopper")
def test_what_the_kernel_with_tma_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_descriptors", lambda: False)
    layout, half = Layout.of((256, 256), (64, 64)), torch.bfloat16
    assert module.tma_refusal("masked_matmul", CUDA, half, layout, False) == (
        "needs a Triton with tensor descriptors, 3.4 or newer"
    )
    stack = Layout.of((3, 256, 256), (64, 64))
    for grouped in (False, True):
        assert module.tma_refusal("masked_matmul", CUDA, half, stack, grouped) == ("multiplies one matrix, not a stack")


@pytest.mark.usefixtures("hopper")
def test_tokens_sorted_by_matrix_are_multiplied_with_tiles_at_any_density() -> None:
    layout = Layout.of((4, 128, 128), (32, 32))
    assert kernel_of("masked_matmul", Case(CUDA, torch.bfloat16, layout, 60, grouped=True)) == "triton_tiles"


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "architecture", lambda _: "hopper")
    monkeypatch.setattr(module, "num_sms", lambda _: 132)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("tokens", "lines", "width", "length", "expected"),
    [
        (16384, 32, 128, 1024, 256),
        (16384, 86, 128, 1024, 256),
        (2048, 8, 128, 1024, 128),  # 64 programs of 256 tokens would leave half of the multiprocessors idle
        (1024, 8, 128, 1024, 64),
        (64, 8, 128, 1024, 64),
        (4096, 86, 64, 512, 128),
        (16384, 32, 128, 256, 128),  # two short lines fill and drain the pipeline beside one another
        (16384, 128, 32, 2048, 256),
    ],
)
def test_tokens_of_a_program(tokens: int, lines: int, width: int, length: float, expected: int) -> None:
    work = module.MaskedWork(tokens, 1, lines, width, length)
    sizes = module.masked_sizes(CUDA, torch.bfloat16, "tf32", work)
    assert sizes.tokens == expected


@pytest.mark.usefixtures("on_hopper")
def test_each_matrix_begins_programs_of_its_own() -> None:
    """64 experts with 64 tokens each are as many programs of 64 as of 256."""
    one = module.MaskedWork(4096, 1, 32, 128, 1024)
    assert module.masked_sizes(CUDA, torch.bfloat16, "tf32", one).tokens == 256
    assert module.masked_sizes(CUDA, torch.bfloat16, "tf32", one._replace(groups=64)).tokens == 64


@pytest.mark.parametrize(
    ("shape", "sms", "rows", "waves"),
    [
        ((4096, 4096), 132, 2048, 4),
        ((4096, 11008), 132, 768, 11),  # 512 rows at a time, 16 MiB, take 16 waves of the 11 of a whole product
        ((4096, 11008), 108, 640, 13),
        ((11008, 4096), 132, 3072, 11),
        ((2048, 5461), 132, 2048, 3),
        ((1024, 2736), 132, 1024, 1),
        ((8192, 28672), 132, 896, 55),  # larger than the cache, for want of whole waves within
    ],
    ids=str,
)
def test_a_weight_gradient_is_made_in_whole_waves(shape: tuple[int, int], sms: int, rows: int, waves: int) -> None:
    layout = Layout.of(shape, (1, 1))
    assert matmul_expanded._rows_at_once(layout, 2, sms) == rows
    columns = -(-shape[1] // 256)
    assert waves == -(-(-(-shape[0] // 128) * columns) // sms), "as many as one product of all rows"
    pieces = [slice_ for _, slice_ in matmul_expanded._pieces(layout, 2, sms)]
    sizes = [min(piece.stop, shape[0]) - piece.start for piece in pieces]
    assert sum(sizes) == shape[0] and sum(-(-(-(-size // 128) * columns) // sms) for size in sizes) == waves
    assert max(sizes) * shape[1] * 2 <= matmul_expanded.SCRATCH_BYTES


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
