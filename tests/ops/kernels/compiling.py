"""Compiles a kernel for a GPU that need not be there: what a call would launch is caught, and built."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
triton = pytest.importorskip("triton")
backend = pytest.importorskip("triton.backends.compiler")
compiler = pytest.importorskip("triton.compiler")

ARCHITECTURES = {"hopper": 90, "ampere": 80}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_BYTES = {"hopper": 227 * 1024, "ampere": 163 * 1024}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass
class Launch:
    """Holds one launch: the kernel, and its arguments by name."""

    kernel: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._catch

    def _catch(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

    def option(self, name: str) -> int:
        return int(self.arguments[name])


@contextmanager
def caught(module: Any, name: str) -> Iterator[Launch]:
    """Catches the launch of ``module.name`` instead of making it."""
    launch = Launch(getattr(module, name))
    with mock.patch.object(module, name, launch):
        yield launch
    assert launch.arguments, f"{name} was not launched"


def caught_step(updates: list[Any]) -> dict[str, Launch]:
    """Catches all launches of a step of Triton's AdamW, by the kernel's name; one that is not made has no arguments."""
    from smet_compile.ops.kernels.triton import adamw, adamw_tables, places

    kernels = {"_write_addresses": adamw_tables, "write_places": places, "prepare": adamw, "update": adamw}
    launches = {name: Launch(getattr(module, name)) for name, module in kernels.items()}
    with ExitStack() as stack:
        for name, module in kernels.items():
            stack.enter_context(mock.patch.object(module, name, launches[name]))
        adamw.update_all(updates)
    return launches


@dataclass(frozen=True)
class Loop:
    """Holds the PTX of a loop, whose instructions can be counted."""

    body: str

    def count(self, instruction: str) -> int:
        """Counts the instructions that begin with a pattern, whether they have a predicate or not."""
        return len(re.findall(rf"^\s*(?:@!?%p\d+ )?(?:{instruction})", self.body, re.MULTILINE))

    def order(self, instructions: str) -> list[str]:
        """Returns the instructions that match a pattern as they come, each once for all that follow one another."""
        return [name for name, _ in itertools.groupby(re.findall(instructions, self.body))]

    def copies(self, num_bytes: str) -> int:
        """Counts the copies to shared memory, each of so many bytes of a thread, that no thread waits for."""
        return len(re.findall(rf"cp\.async\.c[ag]\.shared\.global [^;]*, 0x{num_bytes}\b", self.body))


@dataclass(frozen=True)
class Compiled:
    """Holds what the compiler says of a kernel. ``spilled_bytes``: None where nothing tells."""

    ptx: str
    cubin: bytes
    shared_bytes: int
    spilled_bytes: int | None

    def loop(self) -> Loop:
        """Returns the innermost loop that multiplies."""
        return min((loop for loop in _loops(self.ptx) if loop.count(_MULTIPLY)), key=lambda loop: len(loop.body))


_MULTIPLY = r"wgmma\.mma_async|mma\.sync|fma\.rn\.f32"


def _loops(ptx: str) -> list[Loop]:
    """Returns what lies between a label and a jump back to it."""
    lines, labels, found = ptx.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = number
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if jump and jump[1] in labels:
            found.append(Loop("\n".join(lines[labels[jump[1]] : number + 1])))
    return found


def compile_for(launch: Launch, architecture: str) -> Compiled:
    """Specialises the kernel as a launch does: on integers that are 1 or multiples of 16, and on aligned pointers."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, tuple):
            signature[name] = tuple(_POINTERS[each.dtype] for each in value)
            attributes |= {(number, i): _ALIGNED for i, each in enumerate(value) if each.data_ptr() % 16 == 0}
            continue
        if isinstance(value, TensorDescriptor):
            dtype, sides = _POINTERS[value.base.dtype][1:], ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{dtype}[{sides}]>"
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = _POINTERS[value.dtype] if is_tensor else "i32" if value < 2**31 else "i64"
        if (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[(number,)] = _ALIGNED
    source = compiler.ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = backend.GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    built = triton.compile(source, target=target, options=options)
    return Compiled(built.asm["ptx"], built.asm["cubin"], built.metadata.shared, _stack_bytes(built.asm["cubin"]))


def _stack_bytes(cubin: bytes) -> int | None:
    """Returns the memory of a thread beside its registers: spilled registers, since no kernel here has arrays."""
    if not CUOBJDUMP.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    return int(found[1]) if found else None
