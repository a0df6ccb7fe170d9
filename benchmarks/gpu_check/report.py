"""Writes the GPU's part of the kernels' record from the lines of one or more runs.

    python -m benchmarks.gpu_check.report runs/gpu/*.jsonl [--into docs/results/kernels.md]

The file keeps what stands before that part, which ``python -m benchmarks.kernels`` writes. Without lines all rows say
that they await a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import parts
from benchmarks.gpu_check.report_checks import checks
from benchmarks.gpu_check.report_tables import tables
from benchmarks.gpu_check.results import Results

INTO = Path("docs/results/kernels.md")


def text(results: Results) -> str:
    """Returns the GPU's part as markdown."""
    head = [parts.HEADING, "", _place(results), ""]
    return "\n".join([*head, checks(results), *(table.markdown() for table in tables(results))])


def _place(results: Results) -> str:
    command = "Written by `python -m benchmarks.gpu_check.report` from the lines of `python -m benchmarks.gpu_check`"
    card, software = results.last("environment", "card"), results.last("environment", "software")
    plan = results.last("plan", "limits")
    if card is None or software is None or plan is None:
        return f"{command}: **no run on a GPU yet**."
    versions = ", ".join(f"{name} {software['packages'][name]}" for name in ("torch", "triton"))
    dry = " **Not for the record**: tiny sizes, without a GPU." if plan["dry"] else ""
    return (
        f"{command} of {plan['date']}. {card['name']}; {card['processor']}, {card['cores']} cores. "
        f"Python {software['python']}, {versions}.{dry}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.report", description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="*", help="files of JSON lines, the earliest first")
    parser.add_argument("--into", type=Path, default=INTO, help=f"the file whose part is replaced ({INTO})")
    args = parser.parse_args()
    parts.replace_gpu_part(args.into, text(Results.of(args.lines)))
    print(args.into)


if __name__ == "__main__":
    main()
