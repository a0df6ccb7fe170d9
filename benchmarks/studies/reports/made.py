"""Describes how a study's records were made: model, text, machine, missing runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from benchmarks.studies.byte_pairs import BYTES
from benchmarks.studies.case import Case
from benchmarks.studies.corpus import ENVIRONMENT, STDLIB
from benchmarks.studies.records import Records


@cache
def parameters(case: Case) -> int:
    """Counts the parameters of the dense model."""
    from benchmarks.studies.trainer import build_model

    return sum(p.numel() for p in build_model(case, "meta").parameters())


_NAMES = {STDLIB: "the Python standard library's source", ENVIRONMENT: "all Python source of the environment"}

UNNAMED = "AMD EPYC"
"""The processor of all records that were made before they named it."""


def how_made(name: str, cases: Sequence[Case], records: Records, windows: int | None = None) -> str:
    """Writes the paragraph for the page. ``windows``: the number held out for a loss, by default that of `train`."""
    done = [records[case.key] for case in dict.fromkeys(cases) if case.key in records]
    hours = sum(record["seconds"] for record in done) / 3600
    by_shape = {case.shape: case for case in cases}
    missing = len(dict.fromkeys(cases)) - len(done)
    processors = " and ".join(sorted({record.get("processor", UNNAMED) for record in done})) or "?"
    what = f"{len(done)} runs, {hours:.1f} hours of one thread in all"
    return (
        f"Made by `python -m benchmarks.studies {name}`: {what}{f' ({missing} runs are missing)' if missing else ''}. "
        f"{processors}, torch {done[0]['torch'] if done else '?'}. {_models(list(by_shape.values()))} over "
        f"{_tokens(cases)}, {_range([case.steps for case in cases])} steps. Losses are in nats per byte over "
        f"{_held_out(cases, windows)} held-out tokens, the same for every run of a text. "
        f"{texts_read(done)} Records: `docs/results/studies/{name}.jsonl`."
    )


def texts_read(records: Sequence[dict]) -> str:
    """Names each text by hash and size, with the number of runs that read it."""
    runs: dict[str, int] = {}
    for record in records:
        text, case = record.get("text"), record["case"]
        if text:
            read = f"{_name(text['name'])}, {text['num_bytes']:,} bytes with SHA-256 {text['sha256']}…"
        else:
            read = f"{_name(case.get('text', STDLIB))}, of which these older records keep no hash"
        runs[read] = runs.get(read, 0) + 1
    if not runs:
        return "No text was read yet."
    return f"Text: {'; '.join(f'{read} (runs: {num})' for read, num in runs.items())}."


def _held_out(cases: Sequence[Case], windows: int | None) -> str:
    from benchmarks.studies.trainer import FINAL_WINDOWS

    return _range([(windows or FINAL_WINDOWS) * case.shape.sequence for case in cases])


def _name(text: str) -> str:
    return _NAMES.get(text, f"the files in `{text}`")


def _tokens(cases: Sequence[Case]) -> str:
    """Describes what a step reads: "bytes, 512 a step" or "1024 byte pairs, 512 a step"."""
    vocabularies = sorted({case.vocabulary for case in cases})
    kinds = ["bytes" if each == BYTES else f"{each} byte pairs and bytes" for each in vocabularies]
    return f"{' and '.join(kinds)}, {_range([case.shape.batch * case.shape.sequence for case in cases])} a step"


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
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
