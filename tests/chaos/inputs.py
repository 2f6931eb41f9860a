"""Inputs that are generated from a few numbers, and their expected results."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

FORMATS = ("csv", "jsonl", "parquet")
_MOST_TURNS = 1500
_FAULTY_EVERY = 97


@dataclass(frozen=True)
class Findings:
    """The records of a result that are missing or wrong, and those that appear more than once."""

    lost: int = 0
    duplicated: int = 0


@dataclass(frozen=True)
class Input:
    """A table with the columns `number` and `work`; `graphs.busy` adds `doubled`. Equal fields give equal bytes."""

    seed: int
    records: int
    format: str
    faulty: bool
    """Whether every 97th record has no value that could be scored."""

    @cached_property
    def _work(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng(self.seed).integers(0, _MOST_TURNS, self.records)

    @property
    def faulty_records(self) -> set[int]:
        return set(range(0, self.records, _FAULTY_EVERY)) if self.faulty else set()

    def body(self) -> bytes:
        work: list[int | None] = self._work.tolist()
        for record in self.faulty_records:
            work[record] = None
        match self.format:
            case "csv":
                lines = (f"{number},{'none' if value is None else value}\n" for number, value in enumerate(work))
                return "".join(["number,work\n", *lines]).encode()
            case "jsonl":
                lines = (
                    f'{{"number":{number},"work":{"null" if value is None else value}}}\n'
                    for number, value in enumerate(work)
                )
                return "".join(lines).encode()
            case _:
                target = io.BytesIO()
                columns = {"number": range(self.records), "work": pl.Series(work, dtype=pl.Float32)}
                pl.DataFrame(columns).write_parquet(target, row_group_size=5_000)
                return target.getvalue()

    def compare(self, content: bytes) -> Findings:
        """The faults of a result, which must have each record once, in order, with its prediction."""
        read: dict[str, Callable[[io.BytesIO], pl.DataFrame]] = {
            "csv": pl.read_csv,
            "jsonl": lambda file: pl.read_ndjson(file, infer_schema_length=None),
            "parquet": pl.read_parquet,
        }
        rows = read[self.format](io.BytesIO(content)).select("number", "doubled")
        numbers = rows["number"].to_list()
        duplicated = len(numbers) - len(set(numbers))
        if numbers != list(range(self.records)):
            missing = len(set(range(self.records)) - set(numbers))
            return Findings(missing or int(not duplicated), duplicated)
        expected: list[float | None] = (2.0 * self._work).tolist()
        for record in self.faulty_records:
            expected[record] = None
        wrong = sum(got != right for got, right in zip(rows["doubled"].to_list(), expected, strict=True))
        return Findings(lost=wrong)
