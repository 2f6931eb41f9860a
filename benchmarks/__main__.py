"""The speed of the service compared with the limit of this machine and with alternatives.

Prints a table, writes bench.json (after every path, so that an aborted run keeps its figures), and exits with 1 when a
goal is missed or the service fails on a path. --full takes about 45 minutes and 25 GB of disk in --folder, and writes
docs/benchmarks.md at its end. It may run in pieces, which --report combines:

  python -m benchmarks --full --only 'CSV -> LR' --json lr.json
  python -m benchmarks --full --only Parquet --only small --json rest.json
  python -m benchmarks --report lr.json rest.json
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import (
    buckets,
    clusters,
    databases,
    history,
    images,
    keys,
    online,
    paths,
    report,
    small,
    syncs,
)
from benchmarks.environments import Unavailable
from benchmarks.paths import MILLION, PATHS, PLATEAU, SCRIPT_PEERS, SYSTEM_PEERS, Bench
from benchmarks.results import Gap, Measurement, Results

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = Path(tempfile.gettempdir()) / "batchserve-benchmarks"
SMALL = "small jobs, polls, transfers"
PARTS = (images, online, syncs, keys, databases, buckets, clusters)
TITLES = "; ".join([*(path.title for path in PATHS), *(part.TITLE for part in PARTS), SMALL])
console = Console(stderr=True, highlight=False)


def main() -> None:
    given = _arguments()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.report:
        report.write(given.docs, Results.read(given.report), given.folder, given.history or history.FILE)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # stops servers and removes files
    bench = Bench(
        folder=given.folder.resolve(),
        peers=SCRIPT_PEERS + (SYSTEM_PEERS if given.full else ()),
        say=lambda text: console.print(f"[dim]{text}[/dim]"),
        repeats=given.repeats,
        thorough=given.full,
    )
    sizes = given.rows or ([10_000, MILLION, PLATEAU, 10 * MILLION] if given.full else [MILLION])
    console.print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    results = _measure(bench, sizes, given)
    Console(width=None if console.is_terminal else 200).print(results.as_table())
    if given.history:
        history.append(results, given.history)
    if given.full and not given.only and not given.rows:
        report.write(given.docs, results, given.folder, given.history or history.FILE)
    for gap in results.gaps:
        console.print(f"not measured: {gap.name}: {gap.error}")
    console.print(f"{len(results.missed)} goals missed")
    raise SystemExit(1 if results.missed else 0)


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = asked.add_argument
    option("--full", action="store_true", help="all sizes and peers; without --only and --rows it writes the docs")
    option(
        "--only", action="append", default=[], metavar="TEXT", help=f"paths with this text in their title, of {TITLES}"
    )
    option(
        "--rows",
        type=int,
        nargs="+",
        help="sizes of the paths (default: 1 million; with --full 10 thousand, 1, 3 and 10 million)",
    )
    option("--repeats", type=int, help="of every program (default: 3, at 10 million rows 2 and of peers 1)")
    option("--seconds", type=float, default=3.0, help="of each load of small requests (default: 3)")
    option("--folder", type=Path, default=FOLDER, help="inputs, models and environments of peers, kept between runs")
    option("--json", type=Path, default=Path("bench.json"), help="file of the figures (default: bench.json)")
    option("--report", type=Path, nargs="+", metavar="JSON", help="measure nothing, write the docs; later files win")
    option(
        "--history",
        type=Path,
        metavar="JSONL",
        help="file to which the figures are added, with the machine's name, and of the report's table",
    )
    option("--docs", type=Path, default=DOCS, help="folder of benchmarks.md and benchmarks.svg")
    return asked.parse_args()


def _measure(bench: Bench, sizes: list[int], given: argparse.Namespace) -> Results:
    results = Results()
    for name, entries in _parts(bench, sizes, given):
        try:
            results.add(entries)
        except Exception as error:  # noqa: BLE001 a failed path must not stop the others
            if not isinstance(error, Unavailable):
                console.print_exception()
            results.add([Gap(name, f"{type(error).__name__}: {error}", ours=True)])
        results.add(paths.growth(results.measured))
        results.write(given.json)
    return results


def _parts(
    bench: Bench, sizes: list[int], given: argparse.Namespace
) -> Iterator[tuple[str, Iterable[Measurement | Gap]]]:
    """The parts to be measured, each with the name under which its failure is reported."""

    def wanted(title: str) -> bool:
        return not given.only or any(text in title for text in given.only)

    for path in filter(lambda path: wanted(path.title), PATHS):
        for rows in sizes:
            name = f"{path.title}, {paths.size(rows)}: queued -> completed / limit"
            yield name, paths.measure(bench, path, rows)
    if wanted(images.TITLE):
        for count in images.SIZES if given.full else [1000]:
            yield images.TITLE, images.measure(bench, count)
    seconds, most = given.seconds, sizes[-1]
    parts: dict[str, Callable[[], Iterable[Measurement | Gap]]] = {
        online.TITLE: partial(online.measure, bench, seconds=seconds),
        SMALL: partial(small.measure, bench, seconds=seconds, rows=min(most, MILLION)),
        **{part.TITLE: partial(part.measure, bench, seconds=seconds) for part in (syncs, keys, databases)},
        buckets.TITLE: partial(buckets.measure, bench),
        clusters.TITLE: partial(clusters.measure, bench, rows=most),
    }
    for title in filter(wanted, parts):
        yield title, parts[title]()


if __name__ == "__main__":
    main()
