"""Parity of a converted graph and its original on the sample."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from batchserve.inference.distances import distances

MAX_FLIPS = 0.001
"""Tolerated share of records with a different label."""
WORST_ROWS = 5


@dataclass(frozen=True, slots=True)
class Answers:
    """Outputs of one side for n records: `labels` [n] or [n, targets], `numbers` by name, each [n, k]."""

    labels: np.ndarray[Any, Any] | None
    numbers: dict[str, np.ndarray[Any, Any]]

    def take(self, rows: np.ndarray[Any, Any]) -> "Answers":
        labels = None if self.labels is None else self.labels[rows]
        return Answers(labels, {name: values[rows] for name, values in self.numbers.items()})


@dataclass(frozen=True, slots=True)
class Difference:
    """One numeric output against the original's `method`; a record counts with the largest difference in it.

    Relative differences are measured against max(1, |expected|): small numbers are compared absolutely.
    """

    output: str
    method: str
    max_absolute: float
    mean_absolute: float
    p99_absolute: float
    max_relative: float
    mean_relative: float
    p99_relative: float


@dataclass(frozen=True, slots=True)
class WorstRow:
    """A record of the sample on which the two disagree. `row` counts from 0 in the sample."""

    row: int
    output: str
    expected: Any
    got: Any


@dataclass(frozen=True, slots=True)
class Parity:
    """The report: the compared outputs, their differences, and whether they are tolerable."""

    rows: int
    label_flips: int
    differences: tuple[Difference, ...]
    worst: tuple[WorstRow, ...]
    tolerance: float
    passed: bool
    notes: tuple[str, ...] = ()
    values_tried: int = 0
    """So many values that the sample does not have were tried as well, column by column."""

    @property
    def is_exact(self) -> bool:
        """Whether all records agree, not only as many as `passed` wants."""
        return self.label_flips == 0 and all(item.max_relative <= self.tolerance for item in self.differences)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; a difference that is not finite becomes null."""
        return {name: _json(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`; null differences come back as infinity."""
        differences: list[dict[str, Any]] = [
            {key: math.inf if value is None else value for key, value in item.items()} for item in data["differences"]
        ]
        return cls(
            rows=data["rows"],
            label_flips=data["label_flips"],
            differences=tuple(Difference(**item) for item in differences),
            worst=tuple(WorstRow(**item) for item in data["worst"]),
            tolerance=data["tolerance"],
            passed=data["passed"],
            notes=tuple(data["notes"]),
            values_tried=data.get("values_tried", 0),
        )

    def __str__(self) -> str:
        verdict = "agrees" if self.passed else "DISAGREES"
        lines = [f"The graph {verdict} with the original: {self.label_flips} label flips in {self.rows} records."]
        lines += [
            f"{d.output} against {d.method}: relative difference max {d.max_relative:.2g}, mean {d.mean_relative:.2g}, "
            f"99 % below {d.p99_relative:.2g} (allowed {self.tolerance:.2g})"
            for d in self.differences
        ]
        lines += [f"record {w.row}, {w.output}: expected {w.expected}, got {w.got}" for w in self.worst]
        return "\n".join([*lines, *self.notes])


def compare(
    expected: Answers,
    got: Answers,
    *,
    rows: np.ndarray[Any, Any],
    methods: dict[str, str],
    tolerance: float,
    notes: Sequence[str] = (),
) -> Parity:
    """Compare two answers to the same records; `rows` [n] are their positions in the sample, for the report.

    Passed means: at most 0.1 % of the labels differ, and in each output 99 % of the records are within `tolerance`.
    """
    worst: list[WorstRow] = []
    flipped = flips(expected, got)
    for i in np.flatnonzero(flipped)[:WORST_ROWS]:
        assert expected.labels is not None
        assert got.labels is not None
        worst.append(WorstRow(int(rows[i]), "label", _json(expected.labels[i]), _json(got.labels[i])))

    differences = []
    for name, reference in expected.numbers.items():
        absolute, relative = distances(reference, got.numbers[name])
        differences.append(
            Difference(name, methods[name], *_max_mean_p99(absolute.max(axis=1)), *_max_mean_p99(relative.max(axis=1)))
        )
        by_record = relative.max(axis=1)
        worst += [
            WorstRow(int(rows[i]), name, _json(reference[i]), _json(got.numbers[name][i]))
            for i in np.argsort(-by_record, kind="stable")[:WORST_ROWS]
            if by_record[i] > tolerance
        ]

    return Parity(
        rows=len(rows),
        label_flips=int(flipped.sum()),
        differences=tuple(differences),
        worst=tuple(worst),
        tolerance=tolerance,
        passed=bool(
            flipped.sum() <= MAX_FLIPS * len(rows)
            and all(difference.p99_relative <= tolerance for difference in differences)
        ),
        notes=tuple(notes),
    )


def flips(expected: Answers, got: Answers) -> np.ndarray[Any, Any]:
    """bool [n]: whether a label of the record differs."""
    if expected.labels is None or got.labels is None:
        return np.zeros(len(next(iter(expected.numbers.values()))), dtype=bool)
    left, right = expected.labels, got.labels
    if left.dtype.kind in "OUS" or right.dtype.kind in "OUS":
        left, right = left.astype(str), right.astype(str)
    return np.asarray((left != right).reshape(len(left), -1).any(axis=1))


def _max_mean_p99(values: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    # "higher" never interpolates, which would give NaN between two infinities.
    return float(values.max()), float(values.mean()), float(np.quantile(values, 0.99, method="higher"))


def _json(value: Any) -> Any:
    match value:
        case np.ndarray() | np.generic():
            return _json(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _json(item) for key, item in value.items()}
        case list() | tuple():
            return [_json(item) for item in value]
        case _:
            return value
