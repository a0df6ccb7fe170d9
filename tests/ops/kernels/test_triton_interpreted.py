"""Without a GPU, the tests of Triton's kernels run in its interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ops.kernels.device import HAS_GPU, INTERPRETED

FOLDER = Path(__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("test_triton_*.py") if "on_device" in path.read_text())
FILES.remove(Path(__file__).name)


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="they run on the GPU, or run already")
@pytest.mark.parametrize("file", FILES)
def test_in_interpreter(file: str) -> None:
    """Every file with tests that are marked ``on_device`` has some that pass there, and none that fails."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs a NumPy before 2.4, which still made numbers of arrays")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        cwd=FOLDER.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]
