"""A database of others, from which jobs read and to which they write."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psycopg

from batchserve.postgres import Place, place_of
from batchserve.postgres.load import staged_jobs

COLUMNS = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]


def flowers(rows: int, seed: int = 0) -> pl.DataFrame:
    values = np.random.default_rng(seed).uniform(0.1, 7.0, (rows, 4)).round(2)
    return pl.DataFrame(values, schema=COLUMNS).with_columns(plant=pl.Series([f"{seed}-{n}" for n in range(rows)]))


class Warehouse:
    """Such a database, and what its administrator does in it."""

    def __init__(self, address: str) -> None:
        self.address = address.replace("+psycopg", "")
        self._connection = psycopg.connect(self.address, autocommit=True)

    def __call__(self, statement: str, *, binary: bool = False) -> list[tuple[Any, ...]]:
        cursor = self._connection.execute(statement.encode(), binary=binary)
        return cursor.fetchall() if cursor.description else []

    def copy(self, table: str, frame: pl.DataFrame) -> None:
        with self._connection.cursor().copy(f"COPY {table} FROM STDIN (FORMAT csv)".encode()) as copy:
            copy.write(frame.write_csv(include_header=False))

    def place(self, user: str = "postgres") -> Place:
        return place_of("warehouse", {"warehouse": self.address.replace("postgres@", f"{user}@", 1)})

    def staging(self) -> list[str]:
        """The jobs that have staging tables."""
        return staged_jobs(self.place())

    def close(self) -> None:
        self._connection.close()


def allowed(folder: Path, warehouse: Warehouse) -> dict[str, Any]:
    """Settings of a service that may use it, and reads files of a folder."""
    return {
        "tables": {"default": {"warehouse": warehouse.address}},
        "input_prefixes": {"default": [f"file://{folder}/lake/"]},
        "chunk_records": 25,
    }
