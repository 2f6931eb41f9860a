"""What many small files as one job take, next to one file with the same rows.

  python -m benchmarks.folders

Prints a table. All files are read in place, alternately, by one server: 1,000 files of Parquet and of CSV with 10,000
rows each, and one file with 10 million rows.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from rich.console import Console

from benchmarks import data, processes, service
from benchmarks.http import send
from benchmarks.load import MODEL
from benchmarks.results import Measurement, Results, Runs

ROUNDS = 3
SUFFIXES = (".parquet", ".csv")


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m benchmarks.folders", description=__doc__)
    asked.add_argument("--files", type=int, default=1000, help="default: 1,000")
    asked.add_argument("--rows", type=int, default=10_000, help="of each file (default: 10,000)")
    given = asked.parse_args()
    results = Results()
    with TemporaryDirectory(prefix="batchserve-benchmarks-") as name:
        results.add(measure(Path(name), given.files, given.rows))
    Console(width=None if sys.stdout.isatty() else 200).print(results.as_table())


def measure(folder: Path, files: int, rows: int) -> Iterator[Measurement]:
    allowed = json.dumps({"*": [f"file://{folder}/"]})
    with processes.batchserve(folder, BATCHSERVE_INPUT_PREFIXES=allowed) as server:
        service.register(server.url, MODEL, data.model(folder, MODEL).graph)
        for suffix in SUFFIXES:
            whole = data.table(folder, "numbers", suffix, files * rows)
            parts = _cut(whole, folder / f"parts{suffix}", rows)
            one, many = [], []
            for _ in range(ROUNDS):
                one.append(_seconds(server.url, folder, str(whole)))
                many.append(_seconds(server.url, folder, f"{parts}/*{suffix}"))
            title = f"{files:,} files of {suffix} with {rows:,} rows as one job: speed"
            ours, whole_speed = (Runs([files * rows / seconds for seconds in taken]) for taken in (many, one))
            yield Measurement.of(f"{title} / one file", ours, whole_speed, "rows/s")


def _cut(whole: Path, folder: Path, rows: int) -> Path:
    """The same rows in files of so many each, written as the whole is."""
    folder.mkdir()
    read = pl.read_parquet if whole.suffix == ".parquet" else pl.read_csv
    for number, part in enumerate(read(whole).iter_slices(rows)):
        data.WRITERS[whole.suffix](folder / f"{number:06}{whole.suffix}", iter([part]))
    return folder


def _seconds(url: str, folder: Path, path: str) -> float:
    """From the request to the end of the job, which is deleted then."""
    body = folder / "request.json"
    body.write_text(json.dumps({"input": {"urls": [f"file://{path}"]}, "model": MODEL, "reuse": False}))
    started = time.perf_counter()
    job = json.loads(send(f"{url}/v1/jobs", "POST", body, service.WAIT))
    while job["state"] in ("queued", "running"):
        job = json.loads(send(f"{url}/v1/jobs/{job['id']}?wait=60", "GET"))
    taken = time.perf_counter() - started
    if job["state"] != "completed":
        raise SystemExit(f"the job over {path} is {job['state']}: {job['error']}")
    service.delete(url, job["id"])
    return taken


if __name__ == "__main__":
    main()
