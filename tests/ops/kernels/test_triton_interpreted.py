"""Without a GPU, the tests of Triton's kernels run in its interpreter, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ops.kernels.device import HAS_GPU, INTERPRETED

FOLDER = Path(__file__).parent
FILES = {path.name for path in FOLDER.glob("test_triton_*.py") if "on_device" in path.read_text()} - {
    Path(__file__).name
}
OF_UPDATES = {name for name in FILES if name.startswith("test_triton_adamw")}
GROUPS = [sorted(OF_UPDATES), sorted(FILES - OF_UPDATES)]


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="they run on the GPU, or run already")
@pytest.mark.parametrize("files", GROUPS, ids=["updates", "products"])
def test_in_interpreter(files: list[str]) -> None:
    """Every file with tests that are marked ``on_device`` has some that pass there, and none that fails."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs a NumPy before 2.4, which still made numbers of arrays")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rp",
            "-p",
            "no:cacheprovider",
            *(str(FOLDER / file) for file in files),
        ],
        cwd=FOLDER.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = {Path(name).name for name in re.findall(r"^PASSED ([^:]+)::", result.stdout, re.MULTILINE)}
    assert passed == set(files)
