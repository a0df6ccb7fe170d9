"""How a study's records were made: model, text, machine, what is still missing."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring import processor
from benchmarks.studies.case import Case
from benchmarks.studies.records import Records


def parameters(case: Case) -> int:
    """Of the model, dense."""
    from benchmarks.studies.trainer import build_model

    return sum(p.numel() for p in build_model(case, "meta").parameters())


def how_made(name: str, cases: Sequence[Case], records: Records) -> str:
    """A paragraph for the page."""
    done = [records[case.key] for case in dict.fromkeys(cases) if case.key in records]
    hours = sum(record["seconds"] for record in done) / 3600
    first = cases[0]
    shape = first.shape
    missing = len(dict.fromkeys(cases)) - len(done)
    return (
        f"Made by `python -m benchmarks.studies {name}`: {len(done)} runs, {hours:.1f} hours of one thread in all"
        f"{f' ({missing} runs are missing)' if missing else ''}. "
        f"{processor()}, torch {done[0]['torch'] if done else '?'}. LLaMA of {parameters(first) / 1e6:.1f}M parameters "
        f"(hidden {shape.hidden}, intermediate {shape.intermediate}, {shape.layers} layers) over bytes of the Python "
        f"standard library's source, {shape.batch * shape.sequence} bytes a step, {first.steps} steps; losses are in "
        f"nats per byte on 65,000 held-out bytes, the same for every run. Records: `docs/results/studies/{name}.jsonl`."
    )
