"""Runs what is missing of the named studies and writes their pages: `python -m benchmarks.studies NAME ...`

A study that was stopped goes on where it was: every finished run is a line of `docs/results/studies/NAME.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies import (
    equal_memory,
    equal_time,
    learning_rate,
    longer,
    moments,
    quality,
    sensitivity,
    sizes,
    spikes,
    topology,
)
from benchmarks.studies.case import Case
from benchmarks.studies.estimate import forecast
from benchmarks.studies.race import run_race
from benchmarks.studies.records import Records
from benchmarks.studies.replica_runner import run_replicas
from benchmarks.studies.reports import differences
from benchmarks.studies.reports import equal_memory as equal_memory_page
from benchmarks.studies.reports import equal_time as equal_time_page
from benchmarks.studies.reports import learning_rate as learning_rate_page
from benchmarks.studies.reports import longer as longer_page
from benchmarks.studies.reports import quality as quality_page
from benchmarks.studies.reports import sizes as sizes_page
from benchmarks.studies.reports import spikes as spikes_page
from benchmarks.studies.reports import topology as topology_page
from benchmarks.studies.reports.page import PAGES
from benchmarks.studies.runner import run
from benchmarks.studies.scale import SCALES, Scale


@dataclass(frozen=True)
class Study:
    """Its cases, in order of importance, and its page.

    Args:
        prepare: measures what the cases depend on. measure: measures what only the page needs, after the runs.
        run: trains what is missing. workers, seeds: how many processes and seeds, unless the command line says.
    """

    cases: Callable[[Scale, Path], list[Any]]
    write: Callable[[Records, Scale, Path], None]
    prepare: Callable[[Scale, Path], None] = lambda scale, folder: None
    measure: Callable[[Scale, Path], None] = lambda scale, folder: None
    run: Callable[[Callable[[], Sequence[Any]], Records, int, float, bool], None] = run
    workers: int = 2
    seeds: int = 3


def _plain(cases: Callable[[Scale], list[Case]], write: Callable[[Records, Scale, Path], None]) -> Study:
    return Study(lambda scale, folder: cases(scale), write)


STUDIES = {
    learning_rate.NAME: _plain(learning_rate.cases, learning_rate_page.write),
    spikes.NAME: Study(lambda scale, folder: spikes.cases(scale), spikes_page.write, seeds=5),
    sizes.NAME: Study(sizes.cases, sizes_page.write),
    longer.NAME: Study(longer.cases, longer_page.write, run=run_race, workers=1),
    quality.NAME: _plain(quality.cases, quality_page.write),
    equal_memory.NAME: Study(
        equal_memory.cases, equal_memory_page.write, equal_memory.prepare, equal_memory.measure, seeds=5
    ),
    equal_time.NAME: Study(equal_time.cases, equal_time_page.write, equal_time.prepare, seeds=5),
    sensitivity.NAME: _plain(sensitivity.cases, differences.write_sensitivity),
    moments.NAME: _plain(moments.cases, differences.write_moments),
    topology.NAME: Study(
        lambda scale, folder: topology.cases(scale),
        topology_page.write,
        run=run_replicas,
        workers=1,
        seeds=topology.NUM_SEEDS,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--workers", type=int, help="processes at once, one thread each (2; topology, longer: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no new run after so long")
    parser.add_argument("--seeds", type=int, help="only the first so many (3; topology, spikes, equal_*: 5)")
    parser.add_argument("--folder", type=Path, default=PAGES, help="of the pages; records are in its folder studies/")
    options = parser.parse_args()
    folder = options.folder / "studies"
    for name in options.names:
        study, scale = STUDIES[name], SCALES[options.scale]
        records = Records(folder / f"{name}.jsonl")
        study.prepare(scale, folder)
        end, workers = time.monotonic() + 60 * options.minutes, options.workers or study.workers
        chosen = functools.partial(_chosen, study, scale, folder, options.seeds)
        print(f"{name}: {forecast(chosen(), records, workers)}", flush=True)
        study.run(chosen, records, workers, options.minutes, scale.eager)
        if time.monotonic() < end:
            study.measure(scale, folder)
        study.write(records, scale, options.folder)


def _chosen(study: Study, scale: Scale, folder: Path, seeds: int | None) -> list[Any]:
    return [case for case in study.cases(scale, folder) if case.seed < (seeds or study.seeds)]


if __name__ == "__main__":
    main()
