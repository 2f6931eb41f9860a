"""What a chunk costs in each layer, what saturates first, and a simulated run of many rows on many hosts.

Prints Markdown; with --docs it replaces the figures of docs/scaling.md. It takes some minutes, starts PostgreSQL, an S3
server and, as root and where Ray is installed, a Ray cluster of two hosts. Nothing else should run meanwhile.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

from batchserve import logs
from benchmarks.scaling import report, sites

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "scaling.md"
FOLDER = Path(tempfile.gettempdir()) / "batchserve-benchmarks"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main() -> None:
    given = _arguments()
    logs.configure("console", "error")
    given.folder.mkdir(parents=True, exist_ok=True)
    sizes = sites.Sizes(given.rows, given.chunks, given.calls, given.repeats, given.processes)
    found = sites.measure(given.folder.resolve(), sizes, lambda text: print(text, file=sys.stderr, flush=True))
    page = report.page(found, given.simulated_rows, given.hosts)
    print(page)
    if given.docs:
        figures = f"{BEGIN}\n\n{page}\n\n{END}"
        DOCS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: figures, DOCS.read_text(), flags=re.DOTALL))


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = asked.add_argument
    option("--rows", type=int, default=2_000_000, help="of the measured jobs (default: 2 million)")
    option("--chunks", type=int, default=500, help="of each measurement of a database (default: 500)")
    option("--calls", type=int, default=5000, help="of an engine (default: 5000)")
    option("--repeats", type=int, default=5, help="of the measured jobs (default: 5)")
    option("--processes", type=int, default=os.cpu_count() or 2, help="that score (default: one for each core)")
    option("--simulated-rows", type=int, default=10**9, help="default: a billion")
    option("--hosts", type=int, default=100, help="of the simulated run (default: 100)")
    option("--folder", type=Path, default=FOLDER, help="inputs and models, kept between runs")
    option("--docs", action="store_true", help="write the figures into docs/scaling.md")
    return asked.parse_args()


if __name__ == "__main__":
    main()
