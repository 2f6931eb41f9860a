"""Inputs that are generated from a few numbers, and their expected results."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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
        return self._body(range(self.records))

    def parts(self, count: int) -> list[bytes]:
        """The same records in several files, in their order."""
        bounds = [self.records * number // count for number in range(count + 1)]
        return [self._body(range(first, end)) for first, end in pairwise(bounds)]

    def _body(self, numbers: range) -> bytes:
        faulty = self.faulty_records
        values = self._work[numbers.start : numbers.stop].tolist()
        pairs = [(number, None if number in faulty else value) for number, value in zip(numbers, values, strict=True)]
        match self.format:
            case "csv":
                lines = (f"{number},{'none' if value is None else value}\n" for number, value in pairs)
                return "".join(["number,work\n", *lines]).encode()
            case "jsonl":
                lines = (
                    f'{{"number":{number},"work":{"null" if value is None else value}}}\n' for number, value in pairs
                )
                return "".join(lines).encode()
            case _:
                target = io.BytesIO()
                columns = {"number": numbers, "work": pl.Series([value for _, value in pairs], dtype=pl.Float32)}
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
