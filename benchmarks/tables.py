"""What a result takes on its way into a table of PostgreSQL, and the rows of a query on theirs into an input.

  python -m benchmarks.tables

Prints a table. The server is that of the tests, with durable commits. A million rows of seven columns, in chunks of
131,072, go through staging into a table that exists, next to one plain `COPY` of the same rows into an equal table.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import psycopg
from rich.console import Console
from uuid_utils import uuid7

from batchserve.domain import TableTarget
from batchserve.postgres import Place, place_of
from batchserve.postgres.load import Piece, load
from batchserve.scoring.tables import QueryTask, read_query
from benchmarks import servers
from benchmarks.results import Measurement, Results, Runs

ROUNDS = 3
CHUNK = 131_072
TARGET = TableTarget("warehouse", "public", "scores")


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    asked.add_argument("--rows", type=int, default=1_000_000, help="default: 1,000,000")
    results = Results()
    rows: int = asked.parse_args().rows
    with servers.database() as address, TemporaryDirectory(prefix="batchserve-benchmarks-") as name:
        results.add(measure(place_of("warehouse", {"warehouse": address}), Path(name), table(rows)))
    Console(width=None if sys.stdout.isatty() else 200).print(results.as_table())


def table(rows: int) -> pl.DataFrame:
    """A result: a key, a label, and five numbers."""
    random = np.random.default_rng(7)
    numbers = {f"probability_{name}": random.random(rows, dtype=np.float32) for name in "abcde"}
    labels = pl.Series("prediction", random.integers(0, 5, rows)).cast(pl.String)
    return pl.DataFrame({"id": np.arange(rows), "prediction": labels, **numbers})


def measure(place: Place, folder: Path, frame: pl.DataFrame) -> Iterator[Measurement]:
    with closing(psycopg.connect(place.address, autocommit=True)) as connection:
        columns = ", ".join(f"{name} real" for name in frame.columns[2:])
        ours, plain, read, copied = [], [], [], []
        for _ in range(ROUNDS):
            connection.execute("DROP TABLE IF EXISTS scores")
            connection.execute(f"CREATE TABLE scores (id bigint, prediction text, {columns})".encode())
            plain.append(frame.height / _seconds(lambda: _copy(connection, frame)))
            connection.execute("TRUNCATE scores")
            ours.append(frame.height / _seconds(lambda: _load(place, frame)))
            assert connection.execute("SELECT count(*) FROM scores").fetchone() == (frame.height,)
            copied.append(frame.height / _seconds(lambda: _copy_out(connection)))
            read.append(frame.height / _seconds(lambda: _read(place, folder)))
    rows = f"{frame.height:,} rows"
    yield Measurement.of(f"{rows} through staging into a table: speed / one COPY", Runs(ours), Runs(plain), "rows/s")
    yield Measurement.of(f"{rows} of a query as an input: speed / one COPY to CSV", Runs(read), Runs(copied), "rows/s")


def _seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _copy(connection: psycopg.Connection, frame: pl.DataFrame) -> None:
    content = io.BytesIO()
    frame.write_csv(content, include_header=False)
    with connection.cursor().copy("COPY scores FROM STDIN (FORMAT csv)") as copy:
        copy.write(content.getbuffer())


def _load(place: Place, frame: pl.DataFrame) -> None:
    pieces = [Piece(first, min(CHUNK, frame.height - first)) for first in range(0, frame.height, CHUNK)]
    load(place, TARGET, str(uuid7()), frame.schema, pieces, lambda piece: frame.slice(piece.first, piece.records))


def _copy_out(connection: psycopg.Connection) -> None:
    with connection.cursor().copy("COPY scores TO STDOUT (FORMAT csv)") as copy:
        for _ in copy:
            pass


def _read(place: Place, folder: Path) -> None:
    read_query(QueryTask(str(folder), "inputs/x", place, "TABLE scores", 600.0, 2**40))


if __name__ == "__main__":
    main()
