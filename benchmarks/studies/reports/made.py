"""Describes how a study's records were made: model, text, machine, missing runs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.studies.case import Case
from benchmarks.studies.records import Records
from benchmarks.studies.trainer import FINAL_WINDOWS


def parameters(case: Case) -> int:
    """Counts the parameters of the dense model."""
    from benchmarks.studies.trainer import build_model

    return sum(p.numel() for p in build_model(case, "meta").parameters())


UNNAMED = "AMD EPYC"
"""The processor of all records that were made before they named it."""


def how_made(name: str, cases: Sequence[Case], records: Records) -> str:
    """Writes the paragraph for the page."""
    done = [records[case.key] for case in dict.fromkeys(cases) if case.key in records]
    hours = sum(record["seconds"] for record in done) / 3600
    by_shape = {case.shape: case for case in cases}
    missing = len(dict.fromkeys(cases)) - len(done)
    processors = " and ".join(sorted({record.get("processor", UNNAMED) for record in done})) or "?"
    what = f"{len(done)} runs, {hours:.1f} hours of one thread in all"
    return (
        f"Made by `python -m benchmarks.studies {name}`: {what}{f' ({missing} runs are missing)' if missing else ''}. "
        f"{processors}, torch {done[0]['torch'] if done else '?'}. {_models(list(by_shape.values()))} over bytes of "
        f"the Python standard library's source, {cases[0].shape.batch * cases[0].shape.sequence} bytes a step, "
        f"{_range([case.steps for case in cases])} steps; losses are in nats per byte on "
        f"{FINAL_WINDOWS * cases[0].shape.sequence // 1000},000 held-out bytes, the same for every run. Records: "
        f"`docs/results/studies/{name}.jsonl`."
    )


def _models(cases: list[Case]) -> str:
    """Describes one model of each shape."""
    if len(cases) > 2:
        sizes = [parameters(case) for case in cases]
        return f"LLaMAs of {min(sizes) / 1e6:.1f}M to {max(sizes) / 1e6:.1f}M parameters"
    each = [
        f"{parameters(case) / 1e6:.1f}M parameters (hidden {case.shape.hidden}, intermediate "
        f"{case.shape.intermediate}, {case.shape.layers} layers)" for case in cases
    ]  # fmt: skip
    return f"LLaMA of {' and of '.join(each)}"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
