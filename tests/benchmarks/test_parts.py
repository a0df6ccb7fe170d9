"""The record's two parts are written by two commands, and neither touches the other's."""

from pathlib import Path

from benchmarks.parts import HEADING, replace_cpu_part, replace_gpu_part, split
from tests.support.fresh_process import ROOT

CPU, GPU = "# Kernels\n\n### Step\n\n| a |\n", f"{HEADING}\n\n### Products\n\n| b |\n"


def test_split() -> None:
    assert split(CPU) == (CPU, "")
    assert split(GPU) == ("", GPU)
    assert split(f"{CPU}\n{GPU}") == (f"{CPU}\n", GPU)
    assert split(f"{CPU} {HEADING}\n") == (f"{CPU} {HEADING}\n", "")


def test_each_part_stays(tmp_path: Path) -> None:
    path = tmp_path / "results" / "kernels.md"
    replace_gpu_part(path, GPU)
    assert path.read_text() == GPU
    replace_cpu_part(path, CPU)
    assert path.read_text() == f"{CPU}\n{GPU}"
    replace_gpu_part(path, f"{HEADING}\n\nnew\n")
    replace_cpu_part(path, "# Other\n")
    assert path.read_text() == f"# Other\n\n{HEADING}\n\nnew\n"


def test_the_record_has_both() -> None:
    cpu, gpu = split((ROOT / "docs" / "results" / "kernels.md").read_text())
    assert cpu.startswith("# Kernels\n") and "on a GPU" not in cpu
    assert gpu.startswith(f"{HEADING}\n")
