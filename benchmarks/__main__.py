"""How fast the service is next to the limit of this machine, and to what people use instead.

Exits with 1 when a goal is missed. --full takes about an hour, needs 30 GB of disk, and writes docs/benchmarks.md.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import paths, report, small
from benchmarks.environments import Unavailable
from benchmarks.paths import MILLION, PATHS, SCRIPT_PEERS, SYSTEM_PEERS, Bench
from benchmarks.results import Measurement, as_table, write_json

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    asked = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    asked.add_argument("--full", action="store_true", help="all sizes and peers; writes docs/benchmarks.md")
    asked.add_argument("--rows", type=int, help="rows of the table paths instead of 1 million")
    asked.add_argument("--repeats", type=int, default=3)
    asked.add_argument("--seconds", type=float, default=3.0, help="of each load of small requests")
    asked.add_argument("--only", default="", help="only table paths whose title has this text; `small`: none of them")
    asked.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "batchserve-benchmarks")
    asked.add_argument("--json", type=Path, default=Path("bench.json"))
    given = asked.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    bench = Bench(
        folder=given.folder.resolve(),
        repeats=given.repeats,
        peer_repeats=given.repeats if given.full else 1,
        peers=SCRIPT_PEERS + (SYSTEM_PEERS if given.full else ()),
        say=lambda text: console.print(f"[dim]{text}[/dim]"),
    )
    sizes = [given.rows] if given.rows else [10_000, MILLION, 10 * MILLION] if given.full else [MILLION]
    load = os.getloadavg()[0]
    measurements, failed = _measure(bench, sizes, given.only, given.seconds)
    Console(width=None if console.is_terminal else 200).print(as_table(measurements))
    console.print(f"load average at the start: {load:.1f}; images are not measured yet")
    write_json(given.json, measurements)
    if given.full:
        report.write(
            DOCS, measurements, bench.unavailable, f"{given.repeats} repeats, load average {load:.1f} at the start"
        )
    missed = [measurement.name for measurement in measurements if measurement.missed]
    console.print(f"{len(missed)} goals missed, {len(failed)} paths not measured")
    raise SystemExit(1 if missed or failed else 0)


def _measure(bench: Bench, sizes: list[int], only: str, seconds: float) -> tuple[list[Measurement], list[str]]:
    """What was measured, and what of ours failed."""
    measured: list[Measurement] = []
    failed: list[str] = []

    def collect(title: str, measurements: Iterator[Measurement]) -> None:
        try:
            measured.extend(measurements)
        except Unavailable as error:
            failed.append(title)
            bench.without(title, error)

    for path in PATHS:
        for rows in sizes:
            if only in path.title:
                collect(f"{path.title}, {rows} rows", paths.measure(bench, path, rows))
    measured += paths.growth(measured)
    if only in ("", "small"):
        collect("small jobs and transfers", small.measure(bench, seconds=seconds, rows=min(sizes[-1], MILLION)))
    return measured, failed


if __name__ == "__main__":
    main()
