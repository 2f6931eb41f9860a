"""Values that are not in the sample, to be tried column by column, and what the estimator itself says to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from batchserve.conversion.estimator import Task, answers_of, equidistant
from batchserve.conversion.sample import Array, Table, sentence

if TYPE_CHECKING:
    import pandas

__all__ = ["Case", "Group", "Said", "ask_groups", "ask_one", "cases_of", "frame_of"]

Sort = Literal["missing", "infinite", "empty", "unseen", "fraction", "number"]

_SINGLES = 64
"""So many cases are asked one by one where several raise together; of more, as many that lie apart."""
_CELLS = 4_000_000
"""Of the table of one call, at most."""
MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Case:
    """A value in a column, on top of records of the sample."""

    column: str
    sort: Sort
    value: Any

    def __str__(self) -> str:
        what = "a missing value" if self.sort == "missing" else f"the value {self.value!r}"
        return f"column {self.column!r}, {what}"


@dataclass(frozen=True, slots=True)
class Said:
    """What the estimator says to the records of one case, or why it raises."""

    labels: Array | None = None
    numbers: tuple[Array, ...] = ()
    raised: str | None = None
    tied: Array | None = None
    """bool [records]: where rounding decides for the estimator too."""


@dataclass(frozen=True, slots=True)
class Group:
    """Cases whose values fit into the same types of columns, and what the estimator says to each."""

    cases: tuple[Case, ...]
    said: tuple[Said, ...]
    frame: "pandas.DataFrame"
    """The records: those of the sample once for each case, with its value in its column."""


def cases_of(table: Table, columns: Sequence[str]) -> list[Case]:
    """The values to try in each of these columns: of a sort that the sample does not show, or beyond its range."""
    return [case for column in columns for case in _of_column(table, column)]


def _of_column(table: Table, column: str) -> Iterator[Case]:
    series = table.frame[column].dropna()
    yield Case(column, "missing", None)
    if table.kind(column) == "string":
        there = set(series.astype(str))
        some = str(series.iloc[0]) if len(series) else ""
        yield Case(column, "empty", "")
        for text in ("zq unseen", some.swapcase(), f"{some} ", "nan", "None", "\u2603 7"):
            if text and text not in there:
                yield Case(column, "unseen", text)
        return
    for infinite in (np.inf, -np.inf):
        yield Case(column, "infinite", infinite)
    whole = table.kind(column) != "float" or bool((series == series.round()).all())
    values = np.unique(np.asarray(series, dtype=np.float64))
    values = values[np.isfinite(values)] if len(values) else np.zeros(1)
    values = values if len(values) else np.zeros(1)
    if whole:
        yield Case(column, "fraction", float(values[len(values) // 2]) + 0.5)
    yield from (Case(column, "number", number) for number in _numbers(values, whole=table.kind(column) != "float"))


def _numbers(values: Array, *, whole: bool) -> list[float]:
    """Numbers between and beyond the sorted ones of the sample, in their order."""
    low, high = float(values[0]), float(values[-1])
    span = max(high - low, 1.0)
    chosen = {high + factor * span for factor in (1, 10, 1000)} | {low - factor * span for factor in (1, 10, 1000)}
    chosen |= {0.0, -1.0, *(sign * (2.0**power) for sign in (1, -1) for power in (24, 53))}
    if len(values) > 1 and not whole:
        left, right = values[len(values) // 2 - 1 : len(values) // 2 + 1].tolist()
        chosen.add(left + 0.37 * (right - left))  # not the middle: trees cut there, in double precision
    if not whole:
        large = {sign * size for sign in (1, -1) for size in (1e10, 1e20, MAX_FLOAT32 / 2, 1e39, 1e300)}
        return sorted((chosen | large) - set(values.tolist()))
    exact = {int(number) for number in chosen if abs(number) < 2**62}
    exact |= {int(high) + 1, int(low) - 1, *(sign * (2**power + 1) for sign in (1, -1) for power in (24, 53, 62))}
    return sorted(exact - {int(value) for value in values})


# --- tables of them --------------------------------------------------------------------------------------------------


def ask_groups(model: Any, task: Task, table: Table, cases: Sequence[Case]) -> list[Group]:
    """Each case asked of the estimator, on top of all records of the table."""
    most = max(1, _CELLS // max(1, table.frame.size))
    groups = []
    for alike in _alike(table, cases):
        for start in range(0, len(alike), most):
            part = alike[start : start + most]
            said = dict(_ask(model, task, table, part))
            groups.append(Group(tuple(part), tuple(said[case] for case in part), frame_of(table, part)))
    return groups


def ask_one(model: Any, task: Task, table: Table, case: Case) -> Said:
    """The same for one case."""
    return next(iter(_ask(model, task, table, [case])))[1]


def _alike(table: Table, cases: Sequence[Case]) -> list[list[Case]]:
    alike: dict[Any, list[Case]] = {}
    for case in cases:
        key = None if _fits(table.frame[case.column].dtype, case.value) else (case.column, type(case.value))
        alike.setdefault(key, []).append(case)
    return list(alike.values())


def _fits(dtype: Any, value: Any) -> bool:
    """Whether a column holds the value as it is."""
    match getattr(dtype, "kind", "O"):
        case "f" if getattr(dtype, "numpy_dtype", dtype) == dtype:
            number = np.nan if value is None else float(value)
            return dtype.itemsize == 8 or not np.isfinite(number) or abs(number) <= MAX_FLOAT32
        case "i" if dtype == np.int64:
            return isinstance(value, int)
        case "O":
            return str(dtype) in ("object", "str") and (value is None or isinstance(value, str))
    return False


def frame_of(table: Table, cases: Sequence[Case]) -> "pandas.DataFrame":
    """The records of the table once for each case, with its value in its column; other columns keep their types."""
    import pandas

    records = len(table.frame)
    frame = table.frame.iloc[np.tile(np.arange(records), len(cases))].reset_index(drop=True)
    for column in dict.fromkeys(case.column for case in cases):
        series = table.frame[column]
        own = [(place, case.value) for place, case in enumerate(cases) if case.column == column]
        dtype = (
            series.dtype
            if all(_fits(series.dtype, value) for _, value in own)
            else _wider(series, [value for _, value in own])
        )
        values = frame[column].astype(object).tolist()
        absent = _absent(series)
        for place, value in own:
            value = absent if value is None else value
            values[place * records : (place + 1) * records] = [value] * records
        frame[column] = pandas.Series(values, dtype=dtype, index=frame.index)
    return frame


def _absent(series: "pandas.Series[Any]") -> Any:
    """A missing value as the sample has it: some imputers look for None, most for NaN."""
    absent = series[series.isna()]
    return absent.iloc[0] if len(absent) and series.dtype.kind == "O" else np.nan


def _wider(series: "pandas.Series[Any]", values: Sequence[Any]) -> Any:
    """A type for all these values, which are of one type, and those of the series."""
    import pandas

    if isinstance(series.dtype, pandas.CategoricalDtype):
        known = list(series.dtype.categories)
        more = dict.fromkeys(value for value in values if value is not None and value not in known)
        return pandas.CategoricalDtype([*known, *more])
    if isinstance(values[0], int) and series.dtype.kind in "iub":
        return np.int64
    return object if isinstance(values[0], str) else np.float64


# --- the estimator's answers -----------------------------------------------------------------------------------------


def _ask(model: Any, task: Task, table: Table, cases: Sequence[Case]) -> Iterator[tuple[Case, Said]]:
    """All at once where the estimator answers; what raises is found by asking for less at a time."""
    try:
        asked = replace(table, frame=frame_of(table, cases))
        labels, _, numbers = answers_of(model, task, asked)
        tied = equidistant(model, asked)
    except Exception as error:  # noqa: BLE001 - estimators refuse in many ways
        yield from _ask_again(model, task, table, cases, Said(raised=sentence(error)))
        return
    records = len(table.frame)
    for place, case in enumerate(cases):
        rows = slice(place * records, (place + 1) * records)
        said = tuple(array[rows] for array in numbers)
        yield case, Said(None if labels is None else labels[rows], said, tied=None if tied is None else tied[rows])


def _ask_again(
    model: Any, task: Task, table: Table, cases: Sequence[Case], raised: Said
) -> Iterator[tuple[Case, Said]]:
    if len(cases) == 1:
        yield cases[0], raised
        return
    sorts: dict[Any, list[Case]] = {}
    for case in cases:
        common = case.value if case.sort in ("infinite", "number") and abs(case.value) >= 2**24 else None
        sorts.setdefault((case.sort, common), []).append(case)
    if len(sorts) > 1:
        for alike in sorts.values():
            yield from _ask(model, task, table, alike)
        return
    if len(cases) > _SINGLES:
        apart = [cases[index] for index in np.linspace(0, len(cases) - 1, _SINGLES).astype(int)]
        said = [answer for case in apart for _, answer in _ask(model, task, table, [case])]
        if all(answer.raised is not None for answer in said):
            yield from ((case, said[0]) for case in cases)
            return
    for case in cases:
        yield from _ask(model, task, table, [case])
