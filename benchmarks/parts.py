"""Keeps the two parts of the kernels' record apart: the CPU's, and below it the GPU's, from its heading on."""

from __future__ import annotations

from pathlib import Path

HEADING = "## On a GPU"


def split(text: str) -> tuple[str, str]:
    """Returns the CPU's part and the GPU's, which is empty where its heading is missing."""
    before, heading, after = f"\n{text}".partition(f"\n{HEADING}\n")
    cpu = before[1:]
    return (f"{cpu}\n" if heading and cpu else cpu), heading[1:] + after


def replace_cpu_part(path: Path, text: str) -> None:
    """Writes the CPU's part; the GPU's stays."""
    _write(path, text, split(_read(path))[1])


def replace_gpu_part(path: Path, text: str) -> None:
    """Writes the GPU's part; the CPU's stays."""
    _write(path, split(_read(path))[0], text)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _write(path: Path, cpu: str, gpu: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part.strip("\n") for part in (cpu, gpu) if part.strip()) + "\n")
