"""Workbooks of Excel as tables. The only door to fastexcel, which the extra `excel` installs."""

import re
from collections import Counter
from datetime import time
from importlib.util import find_spec
from typing import Any

import polars as pl

from batchserve.errors import InvalidInput, UnsupportedMedia
from batchserve.formats.frames import decoding
from batchserve.formats.records import name_outer
from batchserve.formats.schema import EXACT

__all__ = ["read_workbook"]

_LONG = r"^-?\d{16,}$"
_UNNAMED = re.compile(r"__UNNAMED__\d+")
"""The names that columns have where the first row gives none."""


def read_workbook(content: bytes, sheet: str | None) -> pl.DataFrame:
    """A sheet as a table, the first by default: its first row names the columns, and each has the type of its cells.
    One with cells of several types is text.

    Raises UnsupportedMedia where the extra is missing, InvalidInput for a sheet that is not there or whose header does
    not name each column once.
    """
    if find_spec("fastexcel") is None:
        raise UnsupportedMedia(
            "the bytes look like an Excel workbook, which this server cannot read: save it as CSV, or install "
            "batchserve[excel] on the server"
        )
    import fastexcel

    with decoding("the Excel workbook"):
        try:
            book = fastexcel.read_excel(content)
        except fastexcel.FastExcelError as error:
            raise InvalidInput(f"the Excel workbook cannot be read: {str(error).splitlines()[0]}") from None
        names = book.sheet_names
        if not names:
            raise InvalidInput("the Excel workbook has no sheets")
        if sheet is not None and sheet not in names:
            raise InvalidInput(f"the Excel workbook has no sheet {sheet!r}; it has {', '.join(map(repr, names[:50]))}")
        chosen = sheet or names[0]
        try:
            header = _first_row(content, chosen)
            # All rows decide the type of a column: by the first ones alone, later cells of another type would be lost.
            frame = _with_floats(book, chosen, book.load_sheet(chosen, schema_sample_rows=None).to_polars())
        except (fastexcel.FastExcelError, pl.exceptions.NoDataError) as error:
            raise InvalidInput(f"sheet {chosen!r} cannot be read: {str(error).splitlines()[0]}") from None
        frame = _typed(_without_blanks(frame))
    # A column without a name and without any cell is left out of the frame.
    names = name_outer([name or "" for name in header])
    frame = frame.rename({f"__UNNAMED__{place}": name for place, name in enumerate(names) if name}, strict=False)
    _check_header(header, frame, chosen)
    return frame


def _with_floats(book: Any, sheet: str, frame: pl.DataFrame) -> pl.DataFrame:
    """The sheet with numbers beyond those that a float tells apart written as floats, where they are beside texts: as
    digits they would be taken for exact. Cells that are texts keep all their digits."""
    for name in frame.columns:
        text = frame[name]
        if text.dtype != pl.String() or not text.str.contains(_LONG).any():
            continue
        # As a truth value a text is nothing, unlike a number.
        is_number = book.load_sheet(sheet, schema_sample_rows=None, dtypes={name: "boolean"}).to_polars()[name]
        number = text.set(is_number.is_null(), None).cast(pl.Float64, strict=False)
        beyond = (number.abs() > EXACT).fill_null(value=False)
        frame = frame.with_columns(number.cast(pl.String).zip_with(beyond, text).alias(name))
    return frame


def _without_blanks(frame: pl.DataFrame) -> pl.DataFrame:
    """Without rows that are empty, and columns that have neither a name nor a cell."""
    empty = [name for name in frame.columns if _UNNAMED.fullmatch(name) and frame[name].null_count() == frame.height]
    frame = frame.drop(empty)
    return frame.filter(~pl.all_horizontal(pl.all().is_null())) if frame.width else frame


def _typed(frame: pl.DataFrame) -> pl.DataFrame:
    """A workbook has no integers and no dates: whole numbers are such where none may have lost digits as a float, times
    that are all midnight are dates."""
    return frame.with_columns([_refined(column) for column in frame])


def _refined(column: pl.Series) -> pl.Series:
    if column.dtype.is_float():
        # Without a number beyond them: as integers these would be taken for exact.
        is_whole = (column.floor() == column).all() and (column.abs() <= EXACT).all()
        return column.cast(pl.Int64) if is_whole else column
    if isinstance(column.dtype, pl.Datetime):
        return column.cast(pl.Date) if (column.dt.time() == time(0)).all() else column
    return column.cast(pl.String) if column.dtype == pl.Null() else column


def _first_row(content: bytes, sheet: str) -> list[str | None]:
    options = {"header_row": None, "n_rows": 1, "dtypes": "string"}
    first = pl.read_excel(
        content, sheet_name=sheet, engine="calamine", has_header=False, read_options=options, drop_empty_cols=False
    )
    return list(first.row(0))


def _check_header(header: list[str | None], frame: pl.DataFrame, sheet: str) -> None:
    twice = [name for name, times in Counter(header).items() if name is not None and times > 1]
    if twice:
        raise InvalidInput(f"sheet {sheet!r} names columns more than once: {', '.join(map(repr, twice[:10]))}")
    unnamed = [number for number, name in enumerate(header, 1) if not (name or "").strip()]
    if empty := [number for number in unnamed if f"__UNNAMED__{number - 1}" in frame.columns]:
        raise InvalidInput(
            f"the first row of sheet {sheet!r} has no name for column {', '.join(map(str, empty[:10]))}: the first "
            "row names the columns, and the table begins in the first cell"
        )
