"""Without a GPU: the tests of Triton's kernels in its interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.kernels.device import HAS_GPU, INTERPRETED

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="they run on the GPU, or run already")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_triton_*.py") if path != Path(__file__)))
def test_in_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", str(FOLDER / file), "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    nothing_to_run = result.returncode == 0 and " passed" not in result.stdout
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert not nothing_to_run or "replaced the compiler" in result.stdout, result.stdout[-1000:]
