"""CSV, NDJSON and JSON: records, faults and written results; and the detection of formats from bytes."""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchserve.client.data import format_of
from batchserve.domain import Chunk, ChunkLimits, Dialect, DType, ReadOptions, RowError
from batchserve.errors import InvalidInput, InvalidOptions, SchemaMismatch, UnsupportedMedia
from batchserve.formats import FORMATS, RESULT_FORMATS, Part, by_media_type, encoding_of, get_format, sniff
from batchserve.formats.encodings import Transcoder, decode
from batchserve.formats.schema import cast_column
from batchserve.storage import Piece

COMMA = Dialect()
Types = Mapping[str, DType]


def read(
    name: str, data: bytes, types: Types | None = None, limits: ChunkLimits | None = None, dialect: Dialect = COMMA
) -> tuple[list[tuple[Any, ...]], list[RowError]]:
    """All records of an input, chunk by chunk, and their faults."""
    format, source = get_format(name, dialect), io.BytesIO(data)
    rows: list[tuple[Any, ...]] = []
    errors: list[RowError] = []
    for chunk in format.plan(source, None, limits or ChunkLimits()):
        reading = format.read(source, chunk, types or {})
        assert isinstance(reading.records, pl.DataFrame)
        assert reading.records.height == chunk.records
        rows += reading.records.rows()
        errors += [replace(error, record=chunk.first_record + error.record) for error in reading.errors]
    return rows, errors


def places(errors: list[RowError]) -> list[tuple[int, str, str | None]]:
    return [(error.record, error.code, error.column) for error in errors]


def assemble(name: str, frames: list[pl.DataFrame], dialect: Dialect = COMMA) -> bytes:
    format = get_format(name, dialect)
    objects = {str(number): format.write(frame) for number, frame in enumerate(frames)}
    parts = [Part(str(n), len(objects[str(n)]), frame.height) for n, frame in enumerate(frames)]
    pieces: list[Piece] = list(
        format.assemble(parts, lambda key: io.BytesIO(objects[key]), sum(part.records for part in parts))
    )
    return b"".join(p if isinstance(p, bytes) else objects[p.key][p.start : p.stop] for p in pieces)


# Types


@pytest.mark.parametrize(
    ("values", "dtype", "expected", "faulty"),
    [
        (["3.0", " 4 ", "5.5", "x", None], "int64", [3, 4, None, None, None], [2, 3]),
        (["255", "256", "-1", "1e2"], "uint8", [255, None, None, 100], [1, 2]),
        ([1.0, 2.5, float("nan"), 1e300], "int32", [1, None, None, None], [1, 2, 3]),
        ([2**31, 7], "int32", [None, 7], [0]),
        ([True, False], "float32", [1.0, 0.0], []),
        (
            ["True", "false", " TRUE ", None, "yes", "t", "2.5", "1e39"],
            "float32",
            [1, 0, 1, None, None, None, 2.5, None],
            [4, 5, 7],
        ),
        (["True", "FALSE", "true", "3.0", "1.5", "y"], "int8", [1, 0, 1, 3, None, None], [4, 5]),
        (["True", "x"], "string", ["True", "x"], []),
        (["True", "0", "no"], "bool", [True, False, None], [2]),
        ([1, 0, 2], "bool", [True, False, None], [2]),
        ([0.5, 0.0], "bool", [None, False], [0]),
        ([1, None], "string", ["1", None], []),
        ([True], "string", ["true"], []),
        ([[1], None], "float32", [None, None], [0]),
        ([b"1"], "string", [None], [0]),
        (["9007199254740993.0", "9007199254740993"], "int64", [None, 9007199254740993], [0]),
    ],
)
def test_a_value_fits_a_type_or_is_named(
    values: list[Any], dtype: DType, expected: list[Any], faulty: list[int]
) -> None:
    cast, errors = cast_column(pl.Series("c", values), dtype, 100)
    assert cast.to_list() == expected
    assert places(errors) == [(100 + index, "wrong-type", "c") for index in faulty]


def test_a_long_value_is_shortened_in_its_message() -> None:
    _, errors = cast_column(pl.Series("c", ["x" * 1000]), "int8")
    assert errors[0].message == f"expected int8, got '{'x' * 76}..."


# Records of CSV


def test_a_quoted_newline_does_not_end_a_record() -> None:
    rows, errors = read("csv", b'a,b\n"1\n,2",3\n4,"x""y"\n', limits=ChunkLimits(records=1))
    assert rows == [("1\n,2", "3"), ("4", 'x"y')]
    assert errors == []


def test_lines_end_with_lf_or_crlf_and_the_last_one_with_nothing() -> None:
    assert read("csv", b"a,b\r\n1,2\n3,4\r\n5,6")[0] == [("1", "2"), ("3", "4"), ("5", "6")]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blank_lines_are_not_records(size: int) -> None:
    data = b'\xef\xbb\xbf\na,b\n\n\n1,"x\n\ny"\r\n\r\n3,4\n\n'
    assert read("csv", data, limits=ChunkLimits(bytes=size))[0] == [("1", "x\n\ny"), ("3", "4")]


def test_an_empty_field_is_missing_and_a_quoted_empty_text_is_empty() -> None:
    assert read("csv", b'a,b\n,""\n', {"b": "string"}) == ([(None, "")], [])
    assert read("csv", b'a,b\n,""\n', {"a": "float32", "b": "float32"}) == ([(None, None)], [])


def test_a_quote_inside_an_unquoted_field_is_a_character() -> None:
    data = b'size,n\n5" pipe,1\n6",2\n"7"" x",3\n'
    assert read("csv", data, {"n": "int64"}) == ([('5" pipe', 1), ('6"', 2), ('7" x', 3)], [])


def test_tabs_and_semicolons_delimit_when_the_dialect_says_so() -> None:
    assert read("csv", b"a\tb\n1,5\t2\n", dialect=Dialect("\t"))[0] == [("1,5", "2")]
    assert read("csv", b"a;b\n1,5;2\n", dialect=Dialect(";"))[0] == [("1,5", "2")]


def test_an_input_with_only_a_header_is_one_chunk_without_records() -> None:
    format = get_format("csv")
    for data in (b"a,b", b"a,b\n", b"a,b\n\n\n"):
        source = io.BytesIO(data)
        (chunk,) = format.plan(source, None, ChunkLimits())
        assert (chunk.records, chunk.stop) == (0, len(data))
        records = format.read(source, chunk, {"b": "int8"}).records
        assert isinstance(records, pl.DataFrame)
        assert records.schema == {"a": pl.String(), "b": pl.Int8()}


def test_only_the_columns_asked_for_are_given_in_file_order() -> None:
    source = io.BytesIO(b"a,b,c\n1,x,3\n")
    reading = get_format("csv").read(source, Chunk(0, 1, 6, 12), {"b": "int8", "c": "int8"}, ["c", "a"])
    assert isinstance(reading.records, pl.DataFrame)
    assert reading.records.to_dict(as_series=False) == {"a": ["1"], "c": [3]}
    assert reading.errors == []


def test_an_input_that_changed_after_planning_is_refused() -> None:
    with pytest.raises(InvalidInput, match="hold 2 records, planning counted 1"):
        get_format("csv").read(io.BytesIO(b"a\n1\n2\n"), Chunk(0, 1, 2, 6), {})
    with pytest.raises(InvalidInput, match="ends at byte 6, planning saw at least 8"):
        get_format("csv").read(io.BytesIO(b"a\n1\n2\n"), Chunk(0, 3, 2, 8), {})


@pytest.mark.slow
def test_a_record_without_end_is_refused_by_number_and_line() -> None:
    data = b'a,b\n1,2\n3,"' + b"x\n" * (33 * 2**20)
    said = (
        "record 1, which begins in line 3 at byte 8, is longer than 64 MiB: it has a quotation mark at byte 10 that is "
    )
    with pytest.raises(InvalidInput, match=said + "never closed"):
        list(get_format("csv").plan(io.BytesIO(data), None, ChunkLimits()))


# Faults in CSV


def test_a_faulty_record_fails_alone() -> None:
    data = b'a,b\n1,2\n3\n4,5,6\n"x"y,2\n\xff,3\n7,8\n'
    rows, errors = read("csv", data, {"b": "int64"})
    assert rows == [("1", 2), (None, None), (None, None), (None, None), (None, None), ("7", 8)]
    assert places(errors) == [
        (1, "wrong-field-count", None),
        (2, "wrong-field-count", None),
        (3, "malformed-quote", None),
        (4, "invalid-utf8", None),
    ]
    assert errors[0].message == "expected 2 fields, got 1"
    assert errors[3].message.startswith("byte 0 of the record (0xff) is not UTF-8; if the text is Windows-1252")


def test_a_short_record_is_found_among_quoted_ones() -> None:
    rows, errors = read("csv", b'a,b\n"x,y",\n"z"\n"v","w"\n')
    assert rows == [("x,y", None), (None, None), ("v", "w")]
    assert places(errors) == [(1, "wrong-field-count", None)]


def test_numbers_are_read_as_people_write_them() -> None:
    data = b"a,n\n 1.5 ,3.0\n+2e3, 4\nnan,5\ninf,6.5\n,\n1 000,x\n"
    rows, errors = read("csv", data, {"a": "float64", "n": "int64"})
    assert rows[:2] == [(1.5, 3), (2000.0, 4)]
    assert np.isnan(rows[2][0])
    assert rows[3:] == [(float("inf"), None), (None, None), (None, None)]
    assert places(errors) == [(3, "wrong-type", "n"), (5, "wrong-type", "a"), (5, "wrong-type", "n")]
    assert errors[1].message == "expected float64, got '1 000'"


def test_faults_are_numbered_in_the_whole_input() -> None:
    lines = [b"%d" % number for number in range(10_000)]
    lines[5000], lines[9999] = b"x", b"1,2"
    rows, errors = read("csv", b"n\n" + b"\n".join(lines), {"n": "int32"}, ChunkLimits(records=4000))
    assert places(errors) == [(5000, "wrong-type", "n"), (9999, "wrong-field-count", None)]
    assert [row[0] for row in rows] == [None if n in (5000, 9999) else n for n in range(10_000)]


FIELDS = st.sampled_from([
    "1", " 3", "5.0", "6.5", "+7", "nan", "x", "", '""', '" 9"', '"a,b"', '"a\nb"', '"a""b"', 'a"b', '"a"b', '"', "1d",
    "True", "false", "1" * 25, "300", "1_0", "\xa01", "-0", "1e400", "#", "\t2", "2\r", "NULL", "Infinity", "٣",
    "1e39", "-1e39", "3.4028235677973366e38", "3.4028235e38", "65520", " 1e400 ",
])  # fmt: skip
LINE = st.tuples(st.lists(FIELDS, min_size=1, max_size=3), st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\r\n"]))
DTYPES = st.sampled_from(["float16", "float32", "float64", "int64", "uint8", "bool", "string"])


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(LINE, max_size=6), a=DTYPES, b=DTYPES)
def test_a_csv_record_reads_the_same_whatever_its_neighbours(
    lines: list[tuple[list[str], str]], a: DType, b: DType
) -> None:
    data = ("a,b\n" + "".join(",".join(fields) + end for fields, end in lines)).encode()
    try:
        alone, faults_alone = read("csv", data, {"a": a, "b": b}, ChunkLimits(records=1))
    except InvalidInput as refusal:
        with pytest.raises(InvalidInput, match=re.escape(refusal.detail)):
            read("csv", data, {"a": a, "b": b})
        return
    together, faults = read("csv", data, {"a": a, "b": b})
    assert repr(together) == repr(alone)
    assert faults == faults_alone


# The header of CSV


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the input is empty"),
        (b"\n\r\n", "the input is empty"),
        (b"a,b,a\n", "'a' in columns 1, 3"),
        (b",,\n", "no name for column 1, 2, 3; every column between others needs a name"),
        (b"a,,b,\n", "no name for column 2; every column between others needs a name"),
        (b",a,Unnamed: 0\n", "'Unnamed: 0' in columns 1, 3"),
        (b"sep=;\n", "the input is empty"),
        ("ä,b\n".encode("latin-1"), r"byte 0 \(0xe4\) is not UTF-8; if the text is Windows-1252 or Latin-1"),
        ("a,b\n".encode("utf-16"), "the text is UTF-16, as its first"),
        ("a,b\n".encode("utf-16-be"), "byte 0 is NUL"),
        (b'"a"x,b\n', "malformed quotation mark"),
        (b"x" * 2**20 + b"yy\n", "longer than 1048576 bytes"),
        (b",".join(b"c%d" % n for n in range(16_385)) + b"\n", "has 16385 columns; at most 16384"),
    ],
)
def test_a_header_that_cannot_name_columns_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        get_format("csv").header(io.BytesIO(data))


def test_columns_without_a_name_at_either_end_are_named_as_by_pandas() -> None:
    data = b",a,b,\n0,1,2,\n"
    header = get_format("csv").header(io.BytesIO(data))
    assert list(header.columns) == list(pd.read_csv(io.BytesIO(data)).columns) == ["Unnamed: 0", "a", "b", "Unnamed: 3"]


@pytest.mark.parametrize("begin", [b"sep=;\n", b"\xef\xbb\xbfSEP=;\r\n", b"\n\nsep=;\n\n"])
def test_a_first_line_that_tells_excel_the_delimiter_is_not_the_header(begin: bytes) -> None:
    data = begin + b"a;b\n1;2\n3;4\n"
    format, dialect = sniff(data, "text/csv", None)
    reader = get_format(format.name, dialect)
    assert list(reader.header(io.BytesIO(data)).columns) == ["a", "b"]
    (chunk,) = reader.plan(io.BytesIO(data), None, ChunkLimits())
    records = reader.read(io.BytesIO(data), chunk, {"a": "int64"}).records
    assert isinstance(records, pl.DataFrame)
    assert records["a"].to_list() == [1, 3]


def test_a_column_of_another_name_that_begins_like_it_is_a_header() -> None:
    header = get_format("csv").header(io.BytesIO(b"sep=;x\n1\n"))
    assert list(header.columns) == ["sep=;x"]


def test_the_header_names_columns_and_shows_the_first_records() -> None:
    data = b'\xef\xbb\xbfa,"b\n""x"""\n' + b"".join(b"%d,\n" % n for n in range(150))
    header = get_format("csv").header(io.BytesIO(data))
    assert header.columns == {"a": None, 'b\n"x"': None}
    assert isinstance(header.sample, pl.DataFrame)
    assert header.sample["a"].to_list() == [str(n) for n in range(100)]


# CSV that we write


def test_nan_and_infinity_are_empty_fields_in_csv() -> None:
    frame = pl.DataFrame({"a": [1.5, float("nan"), float("inf")], "t": ["x,y", "", None], "b": [True, None, False]})
    assert get_format("csv").write(frame) == b'a,t,b\n1.5,"x,y",true\n,"",\n,,false\n'


def test_floats_are_written_with_the_digits_of_their_own_precision() -> None:
    frame = pl.DataFrame({"a": np.array([0.1, 1 / 3], np.float32), "b": [0.1, 1 / 3]})
    assert get_format("csv").write(frame) == b"a,b\n0.1,0.1\n0.33333334,0.3333333333333333\n"
    lists = pl.DataFrame({"a": [[0.1, float("nan")], None]}, schema={"a": pl.List(pl.Float32())})
    assert get_format("csv", Dialect(";")).write(lists) == b'a\n[0.1,null]\n""\n'


def test_a_missing_value_in_a_lone_column_stays_a_record() -> None:
    data = get_format("csv").write(pl.DataFrame({"p": [None, 1.5, float("nan")]}))
    assert read("csv", data, {"p": "float64"}) == ([(None,), (1.5,), (None,)], [])


def test_a_header_with_newlines_appears_once_in_an_assembled_csv() -> None:
    frames = [
        pl.DataFrame({"a\nb": numbers, "c": "x"}, schema_overrides={"c": pl.String}) for numbers in ([1], [], [2])
    ]
    assert assemble("csv", frames) == b'"a\nb",c\n1,x\n2,x\n'


# NDJSON


def test_lines_are_records_and_blank_lines_are_not() -> None:
    data = b'\xef\xbb\xbf{"a":1,"b":"x"}\r\n\r\n{"a":2,"b":null}\n\n{"b":"y"}'
    assert read("jsonl", data, {"a": "float32"}) == ([(1.0, "x"), (2.0, None), (None, "y")], [])


def test_a_faulty_json_record_fails_alone() -> None:
    data = (
        b'{"a":1}\n{"a":2,"a":3}\nxx\n[1]\n{"a":NaN}\n  \n{"a":"\xff"}\n{"a":true}\n{"a":"7"}\n{"a":[1]}\n{"a":1.5}\n'
        b'{"a":300}\n{"a":5.0}\n{"a":6}{"a":7}\n'
    )
    rows, errors = read("jsonl", data, {"a": "uint8"})
    assert [row[0] for row in rows] == [1, None, None, None, None, None, 1, 7, None, None, None, 5, None]
    assert places(errors) == [
        (1, "duplicate-key", None),
        (2, "invalid-json", None),
        (3, "not-an-object", None),
        (4, "invalid-json", None),
        (5, "invalid-json", None),
        (8, "wrong-type", "a"),
        (9, "wrong-type", "a"),
        (10, "wrong-type", "a"),
        (12, "invalid-json", None),
    ]
    assert errors[0].message == "the key 'a' appears more than once"
    assert errors[3].message.startswith("malformed JSON at character 5 of the record")


def test_a_duplicate_key_is_found_in_clean_data() -> None:
    lines = [b'{"a":1,"b":2}'] * 5000
    lines[4500] = b'{"a":1,"a":2,"b":2}'
    lines[4600] = b'{"a":1,"a":2}'
    assert places(read("jsonl", b"\n".join(lines), {"a": "int64"})[1]) == [
        (4500, "duplicate-key", None),
        (4600, "duplicate-key", None),
    ]


@pytest.mark.parametrize("colon", [":", ": ", " :"])
def test_nulls_do_not_hide_a_duplicate_key(colon: str) -> None:
    """The records grow in length, so that a null or a key crosses every border of the blocks that are read together."""
    lines = [f'{{"a"{colon}{record},"b"{colon}{"null" if record % 3 else "7"}}}' for record in range(30_000)]
    types: Types = {"a": "int64", "b": "int64"}
    rows, errors = read("jsonl", "\n".join(lines).encode(), types)
    assert rows == [(record, None if record % 3 else 7) for record in range(30_000)]
    assert not errors
    lines[29_000] = f'{{"a"{colon}1,"b"{colon}null,"a"{colon}2}}'
    assert places(read("jsonl", "\n".join(lines).encode(), types)[1]) == [(29_000, "duplicate-key", None)]


def test_clean_data_is_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nulls, escapes and unused columns are no reason to read each record separately."""
    lines = [f'{{"a":{record},"b":{"null" if record % 3 else "7"},"t":"x\\n{record}"}}' for record in range(30_000)]
    data = "\n".join(lines).encode()
    source, format = io.BytesIO(data), get_format("jsonl")
    chunk = Chunk(0, 30_000, 0, len(data))
    loads, parsed = orjson.loads, []

    def listed(line: bytes) -> Any:
        parsed.append(line)
        return loads(line)

    monkeypatch.setattr(orjson, "loads", listed)
    records = format.read(source, chunk, {"a": "int64"}).records
    assert isinstance(records, pl.DataFrame)
    assert records["b"].null_count() == 20_000
    assert records["t"][29_999] == "x\n29999"
    assert len(parsed) == 100  # those from which the types are inferred


def test_a_lone_surrogate_is_not_text() -> None:
    rows, errors = read("jsonl", b'{"a":"\\ud83d\\ude00"}\n{"a":"\\ud83d"}\n{"a":"\\ude00"}\n')
    assert rows == [("😀",), (None,), (None,)]
    assert places(errors) == [(1, "invalid-json", None), (2, "invalid-json", None)]


def test_deep_nesting_is_a_fault_of_its_record() -> None:
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    rows, errors = read("jsonl", b'{"a":1}\n' + deep, {"a": "float32"})
    assert rows == [(1.0,), (None,)]
    assert places(errors) == [(1, "invalid-json", None)]


def test_every_chunk_has_the_columns_and_types_of_the_first_records() -> None:
    first = [{"n": 1, "x": 1, "t": "a", "mixed": 1, "list": [1]}, {"x": 0.5, "flag": True, "mixed": "b"}]
    rest = [{"n": 2, "late": 1}, {"x": 3, "mixed": {"k": 1.5}, "list": "z"}]
    lines = [*first, *[{}] * 98, *rest]
    data = "\n".join(map(json.dumps, lines)).encode()
    format, source = get_format("jsonl"), io.BytesIO(data)
    chunks = list(format.plan(source, None, ChunkLimits(records=51)))
    readings = [format.read(source, chunk, {"wanted": "bool"}) for chunk in chunks]
    schema = {
        "n": pl.Int64(),
        "x": pl.Float64(),
        "t": pl.String(),
        "mixed": pl.String(),
        "list": pl.String(),
        "flag": pl.Boolean(),
        "wanted": pl.Boolean(),
    }
    for reading in readings:
        assert isinstance(reading.records, pl.DataFrame)
        assert reading.records.schema == schema
        assert reading.errors == []
    both = pl.concat([reading.records for reading in readings if isinstance(reading.records, pl.DataFrame)])
    assert both[0].row(0) == (1, 1.0, "a", "1", "[1]", None, None)
    assert both[-1].row(0) == (None, 3.0, None, '{"k":1.5}', "z", None, None)


def test_a_late_value_of_another_type_is_a_fault_and_never_lost_silently() -> None:
    data = b'{"n":1}\n' * 100 + b'{"n":1.5}\n'
    rows, errors = read("jsonl", data)
    assert rows[-1] == (None,)
    assert errors == [RowError(100, "wrong-type", "expected int64, got 1.5", "n")]


def test_integers_keep_all_their_digits() -> None:
    data = b'{"i":9007199254740993,"u":18446744073709551615}\n'
    assert read("jsonl", data, {"i": "int64", "u": "uint64"})[0] == [(2**53 + 1, 2**64 - 1)]


@pytest.mark.parametrize("name", ["jsonl", "json"])
def test_an_input_without_an_object_is_refused(name: str) -> None:
    data = b"5\n6\n" if name == "jsonl" else b"[5,6]"
    with pytest.raises(
        InvalidInput,
        match="none of the first 2 records is a JSON object with keys, or in JSON an array of values: expected",
    ):
        get_format(name).header(io.BytesIO(data))
    with pytest.raises(InvalidInput, match="the input is empty"):
        get_format(name).header(io.BytesIO(b""))


def test_the_json_header_has_typed_samples() -> None:
    header = get_format("jsonl").header(io.BytesIO(b'{"a":1,"b":"x"}\n{"a":2.5}\n'))
    assert header.columns == {"a": None, "b": None}
    assert isinstance(header.sample, pl.DataFrame)
    assert header.sample.rows() == [(1.0, "x"), (2.5, None)]


VALUES = st.sampled_from([
    "1e39", "-1e39", "3.4028235677973366e38", "65520", "1e18", "9007199254740993.0", "-9223372036854775809",
    "1180591620717411303424", "1" + "0" * 50, "1" + "0" * 400, "[1e400]", "[1180591620717411303425]",
    "1", "1.0", "1.5", "1E5", "true", "false", '"x"', '"1"', '"[1"', '"a\\":b"', "[1]", '{"k":1}', '{"k":1,"k":2}',
    "NaN", "1e400", "9223372036854775808", "18446744073709551615", "-0.0", "1e-7", "1e22", '""', '" 1"', '"true"', "01",
    "300", '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', "123456789.123456789",
])  # fmt: skip
PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([":", ": ", " :"]), VALUES), max_size=3)
OBJECTS = PAIRS.map(lambda pairs: "{" + ",".join(f'"{key}"{colon}{value}' for key, colon, value in pairs) + "}")
OTHERS = st.sampled_from(["5", "[]", "{", "null", '{"a":null}', '{"a":1}{"b":2}', "{'a':1}", " ", '{"a":1} '])


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(OBJECTS | OTHERS, max_size=6), a=DTYPES | st.none(), b=DTYPES)
def test_a_json_record_reads_the_same_whatever_its_neighbours(lines: list[str], a: DType | None, b: DType) -> None:
    data = "\n".join(lines).encode()
    types: Types = {"b": b, "a": a} if a else {"b": b}
    alone, faults_alone = read("jsonl", data, types, ChunkLimits(records=1))
    together, faults = read("jsonl", data, types)
    assert repr(together) == repr(alone)
    assert faults == faults_alone


# JSON


def test_an_array_is_cut_between_its_records_and_nowhere_else() -> None:
    data = b' [ {"a":1,"t":"x,]}\\"[\\\\"},\n\n {"a":2,\n"t":"{"} , {"a":3,"t":"y"},5\n] \n'
    rows, errors = read("json", data, {"a": "float64"}, ChunkLimits(records=1))
    assert rows == [(1.0, 'x,]}"[\\'), (2.0, "{"), (3.0, "y"), (None, None)]
    assert places(errors) == [(3, "not-an-object", None)]


def test_a_newline_inside_a_text_is_a_fault_of_its_record() -> None:
    rows, errors = read("json", b'[{"a":"x"},\n{"a":"y\nz"},{"a":"\\n"}]')
    assert rows == [("x",), (None,), ("\n",)]
    assert places(errors) == [(1, "invalid-json", None)]


def test_the_array_may_be_the_data_of_an_object_with_scalars() -> None:
    data = b'\xef\xbb\xbf{"model":"m, [1]","n":1.5,\n"data" : [{"a":1},{"a":2}],"last":null}'
    assert read("json", data, {"a": "int8"}) == ([(1,), (2,)], [])


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf \n"])
@pytest.mark.parametrize("data", [b'{"a":1,"b":[2]}', b'{\n"a": 1,\r\n"b": [ 2 ]\n}\n', b'{"a":1,"b":[2],"data":5}'])
def test_an_object_alone_is_one_record(before: bytes, data: bytes) -> None:
    rows, errors = read("json", before + data, {"a": "int8"})
    assert ([row[:2] for row in rows], errors) == ([(1, "[2]")], [])
    assert rows == read("json", before + b"[" + data + b"]", {"a": "int8"})[0]


NAMED = Dialect(columns=("a", "b"))
ARRAYS = b'[[1, "x"], [2.5, null],\n[3], {"b": "y", "a": 4}, [5, "z", 6], "w"]'


@pytest.mark.parametrize("records", [1, 2, 100])
def test_records_that_are_arrays_take_the_names_of_the_dialect(records: int) -> None:
    rows, errors = read("json", ARRAYS, {"a": "float32"}, ChunkLimits(records=records), NAMED)
    assert rows == [(1.0, "x"), (2.5, None), (None, None), (4.0, "y"), (None, None), (None, None)]
    assert places(errors) == [(2, "wrong-length", None), (4, "wrong-length", None), (5, "not-an-object", None)]
    assert errors[0].message == "expected 2 values, got 1: there is none for 'b'"


def test_many_arrays_are_read_as_objects_are() -> None:
    values = [[number / 8, f"t{number}"] for number in range(5000)]
    arrays, objects = orjson.dumps(values), orjson.dumps([{"a": a, "b": b} for a, b in values])
    types: Types = {"a": "float32"}
    assert read("json", arrays, types, ChunkLimits(records=3000), NAMED) == read("json", objects, types)


def test_arrays_without_column_names_get_numbered_ones() -> None:
    header = get_format("json").header(io.BytesIO(b"[[1,2],[3,4]]"))
    assert list(header.columns) == ["column_1", "column_2"]
    assert read("json", b'{"data":[[1,"x"],[2]]}', {}) == (
        [(1, "x"), (None, None)],
        [RowError(1, "wrong-length", "expected 2 values, got 1: there is none for 'column_2'")],
    )


def test_arrays_of_another_length_than_named_are_refused_with_both_counts() -> None:
    with pytest.raises(SchemaMismatch, match="record 0: expected 2 values, got 3") as caught:
        get_format("json", NAMED).header(io.BytesIO(b"[[1,2,3],{},[4]]"))
    assert [(error["row"], error["expected"], error["got"]) for error in caught.value.errors] == [(0, 2, 3), (2, 2, 1)]


@pytest.mark.parametrize("data", [b"[]", b" [ \n ] ", b'{"data":[]}'])
def test_an_empty_array_is_one_chunk_without_records(data: bytes) -> None:
    source = io.BytesIO(data)
    (chunk,) = get_format("json").plan(source, None, ChunkLimits())
    assert chunk.records == 0
    assert get_format("json").header(source).columns == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a":1},]', "byte 9, in record 1: expected a record after the comma, got ]"),
        (b'[,{"a":1}]', "byte 1, in record 0: expected a record, got a comma"),
        (b'[{"a":1}, ,{"a":2}]', "byte 10, in record 1: expected a record, got a comma"),
        (b'[{"a":1},{"a":2}', "byte 16, in record 1: the input ends before the array does"),
        (b'[{"a":"1},{"a":2}]', "the input ends before the array does"),
        (b'[{"a":1}] x', "malformed JSON after the array, which ends at byte 8"),
        (b'{"data":[{"a":1}]', "malformed JSON after the array, which ends at byte 16"),
        (b'{"data":[{"a":1}],"x":[1]}', "only numbers and texts may follow"),
        (b'{"data":[{"a":1}],"data":[{"a":2}]}', "only numbers and texts may follow"),
        (rb'{"data":[{"a":1}],"d\u0061ta":[{"a":2}]}', "only numbers and texts may follow"),
        (b'{"data":[{"a":1}],"data":null}', "only numbers and texts may follow"),
        (b'{"x":{},"data":[{"a":1}]}', 'byte 5: expected an array of objects, alone or under the key "data"'),
        (b'{"a":1} {"a":2}', "or one object"),
        (b'{"a" 1}', "malformed JSON at byte 5"),
        (b"5", "malformed JSON at byte 0"),
    ],
)
def test_a_malformed_document_is_refused_by_byte_and_record(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        list(get_format("json").plan(io.BytesIO(data), None, ChunkLimits()))
    assert message in caught.value.detail


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(width=32) | st.none(), min_size=1, max_size=4),
    wide=st.floats(), whole=st.integers(-(2**63), 2**63 - 1), text=st.text(), name=st.text(),
)  # fmt: skip
def test_a_few_records_are_written_in_the_same_way_as_many(
    numbers: list[float | None], wide: float, whole: int, text: str, name: str
) -> None:
    """orjson writes a few records, polars writes many."""
    few = pl.DataFrame({
        f"a{name}": pl.Series(numbers, dtype=pl.Float32()), "f": [wide] * len(numbers), "i": [whole] * len(numbers),
        "t": [text] * len(numbers), "b": [True, None, False, None][: len(numbers)],
    })  # fmt: skip
    many = pl.concat([few] * 120)
    assert get_format("jsonl").write(few) * 120 == get_format("jsonl").write(many)


@pytest.mark.parametrize("name", ["jsonl", "json"])
def test_nan_and_infinity_are_null_in_json(name: str) -> None:
    frame = pl.DataFrame({"a": np.array([0.1, np.nan, np.inf], np.float32), "t": ['"\n', None, "é"]})
    lines = ['{"a":0.1,"t":"\\"\\n"}', '{"a":null,"t":null}', '{"a":null,"t":"é"}']
    expected = "\n".join(lines) + "\n" if name == "jsonl" else "[" + ",\n".join(lines) + "]\n"
    assert get_format(name).write(frame) == expected.encode()


def test_assembled_json_is_one_document() -> None:
    frames = [pl.DataFrame({"a": numbers}, schema={"a": pl.Int64}) for numbers in ([], [1, 2], [], [3])]
    assert assemble("json", frames) == b'[{"a":1},\n{"a":2},\n{"a":3}]\n'
    assert assemble("json", frames[:1]) == b"[]\n"
    assert assemble("jsonl", frames) == b'{"a":1}\n{"a":2}\n{"a":3}\n'


def test_a_text_format_holds_no_tensors() -> None:
    with pytest.raises(InvalidOptions, match="csv holds a table, these records are tensors"):
        get_format("csv").write({"": np.zeros((2, 3, 4))})


# Which format


def zip_bytes(member: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, b"x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("prefix", "content_type", "filename", "name"),
    [
        (b"PAR1\x15\x04", None, None, "parquet"),
        (b"PAR1\x15\x04", "application/x-www-form-urlencoded", "a.csv", "parquet"),
        (b"PAR1\x15\x04", "application/x-parquet", None, "parquet"),
        (b"ARROW1\x00\x00", "application/octet-stream", None, "arrow"),
        (b"\xff\xff\xff\xff\x10\x00", "*/*", None, "arrows"),
        (b"\x93NUMPY\x01\x00", None, None, "npy"),
        (zip_bytes("x.npy"), None, None, "npz"),
        (zip_bytes("x.npy"), "application/zip", "a.zip", "npz"),
        (zip_bytes("x.jpg"), None, None, "zip"),
        (zip_bytes("photos/"), "application/x-zip-compressed", None, "zip"),
        (zip_bytes("notes.txt"), "application/zip", "a.npz", "zip"),
        (b"PK\x05\x06" + bytes(18), None, None, "zip"),
        (b"PK\x05\x06" + bytes(18), "application/x-npz", None, "npz"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", None, None, "jpeg"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "image/jpg", "a.png", "jpeg"),
        (b"\x89PNG\r\n\x1a\n\x00", "image/png", None, "png"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image/webp", None, "webp"),
        (b"GIF89a\x01\x00", "image/gif", None, "gif"),
        (b"a,b,ftype\n1,2,3\n", None, None, "csv"),
        (b"", None, None, "csv"),
        (b"", None, "a.ndjson", "jsonl"),
        (b"", "application/json; charset=utf-8", None, "json"),
        (b"a,b\n1,2\n", "text/plain", None, "csv"),
        (b"BZh,b\n1,2\n", "text/csv", None, "csv"),
        (b'{"a":1}\n{"a":2}\n', None, None, "jsonl"),
        (b'{"a":1}\n{"a":2}\n', None, "a.csv", "jsonl"),
        (b'{"a":1,"t":"cut off he', None, None, "jsonl"),
        (b'{"data":[1,2]}\n', None, None, "jsonl"),
        (b'{"data":[[1,2]]}\n{"data":[[3,4]]}\n', None, None, "jsonl"),
        (b'{"data":[[1,2],[3,4]]}\n', None, None, "json"),
        (b'{"data":[{"a":1}]}', None, None, "json"),
        (b'{"model": "m", "data": [{"a": 1}, {"a', "text/plain", None, "json"),
        (b'\xef\xbb\xbf{\n  "data": [\n', None, None, "json"),
        (b'\n [{"a":1}]', None, None, "json"),
        (b"[[1,2],", None, None, "json"),
    ],
)
def test_the_bytes_determine_the_format(
    prefix: bytes, content_type: str | None, filename: str | None, name: str
) -> None:
    assert sniff(prefix, content_type, filename)[0] is FORMATS[name]


@pytest.mark.parametrize(
    ("prefix", "content_type", "message"),
    [
        (b"a,b\n1,2\n", "application/x-parquet", "look like csv, but they were declared as application/x-parquet"),
        (b"PAR1\x15\x04", "text/csv", "look like parquet, but they were declared as text/csv"),
        (b"PAR1\x15\x04", "application/x-npy", "look like parquet, but they were declared as application/x-npy"),
        (b'[{"a":1}]', "application/x-ndjson", "look like json, but they were declared as application/x-ndjson"),
        (b'{"a":1}\n', "text/csv", "look like jsonl, but they were declared as text/csv"),
        (b"a,b\n", "application/json", "look like csv, but they were declared as application/json"),
        (b"\x80\x04\x95\x10", "application/octet-stream", "look like a Python pickle"),
        (b"\x89PNG\r\n\x1a\n", "image/jpeg", "look like png, but they were declared as image/jpeg"),
        (b"\xff\xd8\xff\xe0", "text/csv", "look like jpeg, but they were declared as text/csv"),
        (b"a,b\n1,2\n", "image/png", "look like csv, but they were declared as image/png"),
        (b"BM\x8a\x00\x00\x00", None, "look like a BMP image"),
        (b"II*\x00\x08\x00", "image/tiff", "the media type image/tiff is not supported"),
        (b"II*\x00\x08\x00", None, "look like a TIFF image"),
        (b"RIFF\x10\x00\x00\x00WAVEfmt ", None, "look like a RIFF file that is not a WebP image"),
        (b"\x00\x00\x00\x1cftypavif", None, "look like a HEIC or AVIF image"),
        (zip_bytes("x.jpg"), "application/x-npz", "look like zip, but they were declared as application/x-npz"),
        (zip_bytes("x.jpg"), "image/jpeg", "look like zip, but they were declared as image/jpeg"),
        (b"\x1f\x8b\x08", "text/csv", "look like gzip data (send it with the header Content-Encoding: gzip), but"),
        ("a,b\n".encode("utf-16"), "text/csv", "look like UTF-16 text (send the option encoding=utf-16)"),
        (b"a,\x00b", "text/csv", "binary data with NUL bytes"),
        (b"<x/>", "application/xml", "the media type application/xml is not supported"),
    ],
)
def test_bytes_that_contradict_the_declared_type_are_refused_by_name(
    prefix: bytes, content_type: str | None, message: str
) -> None:
    with pytest.raises(UnsupportedMedia) as caught:
        sniff(prefix, content_type, None)
    assert message in caught.value.detail
    assert all(format.media_type in caught.value.detail for format in FORMATS.values())


@pytest.mark.parametrize("content_type", ["application/json", None])
def test_records_in_lines_are_ndjson_also_where_the_file_is_called_json(content_type: str | None) -> None:
    assert sniff(b'{"a":1}\n{"a":2}\n', content_type, "export.json")[0].name == "jsonl"
    assert sniff(b'\xef\xbb\xbf{"data":[1]}\n{"data":[2]}\n', content_type, "export.json")[0].name == "jsonl"
    assert sniff(b'{"a":1}\n', content_type, "export.json")[0].name == "json"
    assert sniff(b'{"a":\n{"b":1}}\n', content_type, "export.json")[0].name == "json"


@pytest.mark.parametrize("data", ['{"a": {"0": 1}, "b": {"0": 2}}', '{"columns": ["a"], "index": [0], "data": [[1]]}'])
def test_json_of_pandas_in_another_orientation_is_refused_with_the_one_that_is_read(data: str) -> None:
    with pytest.raises(InvalidInput, match=r"to_json\(orient='records'\)"):
        get_format("json").header(io.BytesIO(data.encode()))


def test_a_number_that_json_does_not_have_is_named_with_what_to_send() -> None:
    with pytest.raises(InvalidInput, match="send null for NaN"):
        get_format("json").header(io.BytesIO(b'[{"a": NaN}]'))


def test_the_delimiter_is_set_by_the_type_the_name_or_the_option() -> None:
    assert sniff(b"a\tb\n", "text/tab-separated-values; charset=utf-8", None)[1] == Dialect("\t")
    assert sniff(b"a\tb\n", None, "a.TSV")[1] == Dialect("\t")
    assert sniff(b"a|b\n", "text/csv", "a.tsv", ReadOptions("|"))[1] == Dialect("|")
    assert sniff(b"a,b\n", None, None, ReadOptions("tab"))[1] == Dialect("\t")
    assert sniff(b"a,b\n", "text/csv", None)[1] == Dialect(",")
    with pytest.raises(InvalidOptions, match=r"the delimiter ':' is not supported; expected one of , ; \| tab"):
        sniff(b"a:b\n", "text/csv", None, ReadOptions(":"))
    with pytest.raises(InvalidOptions, match=r"the decimal 'x' is not supported; expected one of \. ,"):
        sniff(b"a:b\n", "text/csv", None, ReadOptions(decimal="x"))


@pytest.mark.parametrize(
    ("data", "columns", "delimiter"),
    [
        (b"a;b\n1,5;2\n", (), ";"),
        (b"\xef\xbb\xbfa\tb\r\n1\t2\r\n", (), "\t"),
        (b"a|b\n1|2\n3|4\n", (), "|"),
        (b"a;b\n1;2", (), ";"),  # a last record without a newline
        (b"a;b\n", (), ","),  # a header alone may be one odd name
        (b"a;b\n", ("a", "b"), ";"),
        (b"a,b\n1,2\n", (), ","),
        (b"a,b;c\n1,2\n", (), ","),
        (b"length, cm;width\n1,5;2\n3,5;4,5\n", (), ";"),
        (b"length, cm;width, cm\n1,5;2,5\n", (), ","),  # both fit
        (b"length, cm;width, cm\n1,5;2,5\n", ("width, cm",), ";"),
        (b'"a;b"\nx\n', (), ","),
        (b'"a;b",c\n"1;2",3\n', (), ","),
        (b'"a, b";"c;d"\n"1, 2";"3;4"\n', (), ";"),
        (b'"a\n;b";c\n1;2\n', (), ";"),
        (b"text\nto be; or not\nto be; that\n", (), ","),  # one column
        (b"text; all of it\nto be; or; not\nto be\n", (), ","),
        (b"text; all\nto be; or not\n", ("text; all",), ","),
        (b"a;b\n1;2\n3\n", (), ","),  # a record is too short
        (b"a;b\n1;2\n3\n", ("b",), ";"),
        (b"a;b|c\n1;2|3\n", ("c",), "|"),
        (b"", (), ","),
        (b"\n\na;b\n\n1;2\n", (), ";"),
        (b"a;b\n" + b"1;2\n" * 50_000, (), ";"),
    ],
)
def test_the_delimiter_is_recognised_by_the_first_records_and_the_columns_of_the_model(
    data: bytes, columns: tuple[str, ...], delimiter: str
) -> None:
    assert sniff(data, "text/csv", None, columns=columns)[1].delimiter == delimiter


COMMAS = Dialect(";", decimal=",")


@pytest.mark.parametrize("data", [
    b"a,\xe9\n1,2\n",
    b"a,b\n\xe9,2\n",
    b"a,b\n\xe9,2\n\xe9t\xe9,2\n5,6\n",
    b"a,b\n" + b"1,2\n" * 8 + b"M\xfcnchen,2\nK\xf6ln,3\n",
    b"a,b\n" + b"\x83\x65\x83\x58\x83\x67,2\n" * 8,  # Shift JIS
    "größe,b\nä,1\n".encode("latin-1"),
    b'{"a": "\xe9"}\n{"a": "\xe9"}\n',
    b'[{"a": "\xe9"}, {"a": "\xe9"}]',
])  # fmt: skip
def test_a_text_in_another_encoding_is_refused_with_the_option(data: bytes) -> None:
    with pytest.raises(
        InvalidInput, match=r"byte \d+ \(0x..\) is not UTF-8; if the text is Windows-1252 or Latin-1, send"
    ):
        sniff(data, None, None)


@pytest.mark.parametrize("data", [
    b"a,b\n\xe9,2\n3,4\n",  # one damaged record
    "a,b\né,2\n3,4\n".encode() + b"\xe9,1\n\xe9,1\n",  # UTF-8, two records damaged
    "a,b\né,2\n3,é".encode()[:-1],  # cut off within a character
    b"a,b\n" + b"1,2\n" * 8 + b"\xff\xfe,2\n" * 3,  # no words in any encoding
    b'[{"a": "\xe9"}, {"a": "e"}]',
])  # fmt: skip
def test_damaged_records_of_a_text_in_utf8_are_left_to_fail_alone(data: bytes) -> None:
    assert sniff(data, None, None)[0].is_text


@pytest.mark.parametrize("name", ["latin-1", "Windows-1252", "utf-16", "utf-16-be", "ISO-8859-15", "koi8-r", "gb18030"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_text_is_made_utf8_block_by_block(name: str, size: int) -> None:
    text = (
        "name,тест\n1,2\n"
        if name in ("koi8-r", "gb18030")
        else "größe,€\n1,2\n"
        if "52" in name or "15" in name
        else "é\n"
    )
    sent = text.encode(name)
    encoding = encoding_of(sent, ReadOptions(encoding=name))
    assert encoding is not None
    blocks = (sent[start : start + size] for start in range(0, len(sent), size))
    assert b"".join(Transcoder(encoding).blocks(blocks)) == text.encode()


def test_a_byte_order_mark_says_the_encoding_whatever_the_option() -> None:
    for name in ("utf-16", "utf-32"):
        sent = "é\n".encode(name)
        for options in (ReadOptions(), ReadOptions(encoding="latin-1")):
            assert decode(sent, encoding_of(sent, options)) == "é\n".encode()
    assert encoding_of(b"\xef\xbb\xbfa\n", ReadOptions(encoding="latin-1")) is None
    assert encoding_of(b"PAR1", ReadOptions(encoding="latin-1")) is None
    assert encoding_of(b"a\n", ReadOptions(encoding="UTF8")) is None


@pytest.mark.parametrize(
    ("sent", "encoding", "message"),
    [
        (b"ab\x81", "cp1252", r"the text is not windows-1252: byte 2 \(0x81\) is none of its characters"),
        (b"a\0\0\xd8a\0", "utf-16-le", r"not utf-16-le: byte 2"),
        (b"a\0b", "utf-16-le", r"byte 2 \(0x62\) ends within a character"),
    ],
)
def test_bytes_that_are_not_of_the_encoding_are_named(sent: bytes, encoding: str, message: str) -> None:
    for size in (1, 10):
        with pytest.raises(InvalidInput, match=message):
            list(Transcoder(encoding).blocks(sent[start : start + size] for start in range(0, len(sent), size)))


def test_an_encoding_that_is_unknown_or_no_encoding_of_texts_is_refused() -> None:
    for name in ("no-such", "hex", "idna", "unicode_escape", "a\0b", "../x", "utf-7", ""):
        with pytest.raises(InvalidOptions, match="is not supported; expected one of utf-8, utf-16"):
            encoding_of(b"a", ReadOptions(encoding=name))


@pytest.mark.parametrize("regular", [True, False])
def test_a_decimal_comma_is_read_and_written_and_a_point_is_none(regular: bool) -> None:
    data = b"a;n;t;y\n1,5;3,0;1,5;1\n-,5e1; 7 ;x;true\n;;;\n" + (b"" if regular else b"1.500;1.000;1.5;0\nx;1,5;y;2\n")
    types: Types = {"a": "float32", "n": "int64", "t": "string", "y": "bool"}
    rows, errors = read("csv", data, types, dialect=COMMAS)
    assert rows[:3] == [(1.5, 3, "1,5", True), (-5.0, 7, "x", True), (None, None, None, None)]
    assert rows[3:] == ([] if regular else [(None, None, "1.5", False), (None, None, "y", None)])
    assert (
        [(e.record, e.column, e.message) for e in errors] == []
        if regular
        else [
            (3, "a", "expected float32, got '1.500'"),
            (3, "n", "expected int64, got '1.000'"),
            (4, "a", "expected float32, got 'x'"),
            (4, "n", "expected int64, got '1,5'"),
            (4, "y", "expected bool, got '2'"),
        ]
    )


def test_decimal_commas_between_commas_are_quoted() -> None:
    dialect = Dialect(",", decimal=",")
    frame = pl.DataFrame({"a": [1.5, -2.0], "b": [1, 2]})
    written = get_format("csv", dialect).write(frame)
    assert written == b'a,b\n"1,5",1\n"-2,0",2\n'
    assert read("csv", written, {"a": "float64", "b": "float64"}, dialect=dialect) == ([(1.5, 1.0), (-2.0, 2.0)], [])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.data())
def test_numbers_with_decimal_commas_are_those_with_points(values: list[float], data: st.DataObject) -> None:
    frame = pl.DataFrame({"a": values, "b": data.draw(st.lists(st.sampled_from(["x", "1.5"]), min_size=len(values),
                                                               max_size=len(values)))})  # fmt: skip
    comma = get_format("csv", COMMAS).write(frame)
    assert read("csv", comma, {"a": "float64"}, dialect=COMMAS) == (frame.rows(), [])


def test_formats_are_found_by_name_and_media_type() -> None:
    assert [get_format(name).name for name in FORMATS] == list(FORMATS)
    assert {by_media_type(format.media_type) for format in FORMATS.values()} == set(FORMATS.values())
    assert by_media_type("Text/CSV; charset=utf-8") is FORMATS["csv"]
    assert by_media_type("application/jsonl") is FORMATS["jsonl"]
    assert by_media_type("image/jpg") is FORMATS["jpeg"]
    assert by_media_type("image/tiff") is None
    with pytest.raises(InvalidOptions, match="there is no format 'xlsx'; expected one of csv, jsonl, json, parquet"):
        get_format("xlsx")


def test_a_format_is_bound_to_its_dialect() -> None:
    semicolons = get_format("csv", Dialect(";"))
    assert semicolons.write(pl.DataFrame({"a": [1], "b": [2]})) == b"a;b\n1;2\n"
    assert list(semicolons.header(io.BytesIO(b"a,b;c\n1;2\n")).columns) == ["a,b", "c"]
    assert get_format("parquet", Dialect(";")) is get_format("parquet")


def test_formats_that_hold_the_same_values_are_of_one_family() -> None:
    families: dict[str, list[str]] = {}
    for name, format in RESULT_FORMATS.items():
        families.setdefault(format.family, []).append(name)
    assert [names for names in families.values() if len(names) > 1] == [["jsonl", "json"], ["arrow", "arrows"]]


def test_each_format_declares_whether_it_holds_text_types_or_arrays() -> None:
    assert [name for name, format in FORMATS.items() if format.is_text] == ["csv", "jsonl", "json"]
    assert [name for name, format in FORMATS.items() if not format.has_types] == ["csv"]
    assert {name: format.holds for name, format in FORMATS.items() if format.holds != "table"} == {
        "npy": "array",
        "npz": "arrays",
    }


def test_client_and_server_derive_the_same_format_from_a_file_name() -> None:
    assert {name: format_of(Path(f"result{format.suffix}")) for name, format in RESULT_FORMATS.items()} == {
        name: name for name in RESULT_FORMATS
    }
