"""Counts the records of an input independently of batchserve, to compare the counts of its jobs with them."""

import io
import json
from typing import Any, NoReturn

import numpy as np

UNREADABLE = -1
"""The input ends within a quoted field, so no count is correct."""


def count(format: str, data: bytes, delimiter: str = ",") -> int | None:
    """The number of records; None where it is ambiguous."""
    if format == "csv":
        return csv_records(data, delimiter)
    if format == "jsonl":
        return sum(bool(line.strip(b" \t\r")) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    if format == "json":
        return json_records(data)
    if format == "npy":
        return npy_records(data)
    return 1 if format in ("jpeg", "png", "webp", "gif") else None


def csv_records(data: bytes, delimiter: str = ",") -> int | None:
    """RFC 4180 with a header. None where a quotation mark, or a carriage return, is where it should not be."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data[:1] in (b"", b"\n", b"\r"):
        return None
    if b'"' not in data:
        return None if _has_lone_return(data) else _lines(data) - 1
    between = b"\t" if delimiter == "tab" else delimiter.encode()
    records = at = 0
    while at < len(data):
        end = _record_end(data, at, between)
        if end is None or end == UNREADABLE:
            return end
        records += data[at:end].rstrip(b"\n") not in (b"", b"\r")
        at = end
    return records - 1


def _record_end(data: bytes, at: int, between: bytes) -> int | None:
    """Where the next record begins."""
    while True:
        if data[at : at + 1] == b'"':
            at += 1
            while (quote := data.find(b'"', at)) >= 0 and data[quote + 1 : quote + 2] == b'"':
                at = quote + 2
            if quote < 0:
                return UNREADABLE
            at = quote + 1
            if data[at : at + 1] not in (b"", b"\n", between) and data[at : at + 2] != b"\r\n":
                return None
        line = data.find(b"\n", at)
        line = len(data) if line < 0 else line
        field = data.find(between, at, line)
        if _has_lone_return(data[at : (field if field >= 0 else line + 1)]):
            return None
        if field < 0:
            return line + 1
        at = field + 1


def _lines(data: bytes) -> int:
    return sum(line not in (b"", b"\r") for line in data.split(b"\n"))


def _has_lone_return(data: bytes) -> bool:
    return data.count(b"\r") != data.count(b"\r\n")


def json_records(data: bytes) -> int | None:
    try:
        read = json.loads(data.removeprefix(b"\xef\xbb\xbf").decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if isinstance(read, dict) and isinstance(read.get("data"), list):
        read = read["data"]
    if isinstance(read, list):
        return len(read)
    return 1 if isinstance(read, dict) else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def npy_records(data: bytes) -> int | None:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = read(file)[0]
    except Exception:  # noqa: BLE001 - numpy may raise anything for damaged bytes: no count
        return None
    return shape[0] if shape else None


def rows_of(format: str, data: bytes, delimiter: str = ",") -> list[dict[str, Any]] | int:
    """The rows of a result, or their number if it has no column names. Raises ValueError if it is damaged."""
    if format == "csv":
        return _csv_rows(data, delimiter)
    if format == "jsonl":
        return [json.loads(line) for line in data.splitlines() if line]
    if format == "json":
        rows: list[dict[str, Any]] = json.loads(data)
        return rows
    if format in ("npy", "npz"):
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = list(loaded.values()) if format == "npz" else [loaded]
        lengths = {len(array) for array in arrays if array.ndim}
        if len(lengths) > 1:
            raise ValueError(f"arrays of {lengths} rows")
        return lengths.pop() if lengths else 0
    return _table_rows(format, data)


def _csv_rows(data: bytes, delimiter: str) -> list[dict[str, Any]]:
    import csv

    csv.field_size_limit(2**30)
    text = io.StringIO(data.decode(), newline="")
    read = csv.reader(text, delimiter="\t" if delimiter == "tab" else delimiter, strict=True)
    try:
        header, *rows = read
    except csv.Error as error:
        raise ValueError(f"csv: {error}") from error
    return [dict(zip(header, row, strict=False)) for row in rows]  # an empty line is a row of one empty field


def _table_rows(format: str, data: bytes) -> list[dict[str, Any]]:
    import polars as pl

    file = io.BytesIO(data)
    if format == "parquet":
        return pl.read_parquet(file).to_dicts()
    return (pl.read_ipc(file) if format == "arrow" else pl.read_ipc_stream(file)).to_dicts()
