"""Workbooks of Excel as tables. The only door to fastexcel, which the extra `excel` installs."""

from collections import Counter
from importlib.util import find_spec

import polars as pl

from batchserve.errors import InvalidInput, UnsupportedMedia
from batchserve.formats.frames import decoding
from batchserve.formats.records import name_outer

__all__ = ["read_workbook"]


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
            names = fastexcel.read_excel(content).sheet_names
        except fastexcel.FastExcelError as error:
            raise InvalidInput(f"the Excel workbook cannot be read: {str(error).splitlines()[0]}") from None
        if not names:
            raise InvalidInput("the Excel workbook has no sheets")
        if sheet is not None and sheet not in names:
            raise InvalidInput(f"the Excel workbook has no sheet {sheet!r}; it has {', '.join(map(repr, names[:50]))}")
        chosen = sheet or names[0]
        try:
            header = _first_row(content, chosen)
            # All rows decide the type of a column: by the first ones alone, later cells of another type would be lost.
            frame = pl.read_excel(content, sheet_name=chosen, engine="calamine", infer_schema_length=None)
        except (fastexcel.FastExcelError, pl.exceptions.NoDataError) as error:
            raise InvalidInput(f"sheet {chosen!r} cannot be read: {str(error).splitlines()[0]}") from None
    # A column without a name and without any cell is left out of the frame.
    names = name_outer([name or "" for name in header])
    frame = frame.rename({f"__UNNAMED__{place}": name for place, name in enumerate(names) if name}, strict=False)
    _check_header(header, frame, chosen)
    return frame


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
