"""No record is lost: the number equals that of an independent reader, or the input is refused by record and byte."""

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from service import Api, problem

from batchserve.domain import ChunkLimits, DType, RowError
from batchserve.errors import InvalidInput
from batchserve.formats import get_format

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROW = "5.1,3.5,1.4,0.2\n"


def counted(
    name: str, data: bytes, limits: ChunkLimits | None = None, types: Mapping[str, DType] | None = None
) -> tuple[int, list[RowError]]:
    """The numbers of planned and read records, and the faulty ones."""
    format, source = get_format(name), io.BytesIO(data)
    records, errors = 0, []
    for chunk in format.plan(source, None, limits or ChunkLimits()):
        reading = format.read(source, chunk, types or {})
        assert isinstance(reading.records, pl.DataFrame)
        assert reading.records.height == chunk.records
        records += chunk.records
        errors += [replace(error, record=chunk.first_record + error.record) for error in reading.errors]
    return records, errors


def counted_or_refusal(name: str, data: bytes, limits: ChunkLimits) -> tuple[int, list[RowError]] | InvalidInput:
    try:
        return counted(name, data, limits)
    except InvalidInput as refusal:
        return refusal


# --- CSV against Python's csv module ---------------------------------------------------------------------------------

PIECES = st.sampled_from([
    '"', '"', '""', ",", ",", "\n", "\n", "\r\n", "\r", "x", "1", " ", '"a"', '"a\nb"', '"a\r\nb"', '"a\rb"', '5" pipe',
    "\x0b", "\x0c", "\x1a", "\u2028", "\x85", "\ufeff", "\x1c", "é", '"\n', ',"', '",', "\n\n", '"",',
])  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30), size=st.sampled_from([1, 10, 2**62]))
@example(pieces=['"', "1", "\n", "x", '"', "\n"], size=1)
@example(pieces=["1,2\n", "1\n", "1,,"], size=2**62)
def test_csv_records_are_those_of_pythons_csv_module_or_the_input_is_refused(pieces: list[str], size: int) -> None:
    body = "".join(pieces)
    found = counted_or_refusal("csv", b"a,b\n" + body.encode(), ChunkLimits(bytes=size))
    if isinstance(found, InvalidInput):
        assert found.errors, "the record is named"
        assert " byte " in found.detail
        return
    records, errors = found
    lenient = [record for record in csv.reader(io.StringIO(body, newline="")) if record]
    assert records == len(lenient)
    try:
        strict = [record for record in csv.reader(io.StringIO(body, newline=""), strict=True) if record]
    except csv.Error:
        assert any(error.code == "malformed-quote" for error in errors)
        return
    faulty = {error.record for error in errors}
    assert faulty == {number for number, record in enumerate(strict) if len(record) != 2}


def test_a_malformed_field_of_one_line_costs_its_record_though_another_field_has_several() -> None:
    body = b'a,b,c\n1,"4.1"x,"two\nlines"\n2,5,"two\nlines"\n3,"4.1"x,"two\nlines, and\nmore"\n'
    for end in (b"\n", b"\r\n"):
        found = counted_or_refusal("csv", body.replace(b"\n", end), ChunkLimits(records=2))
        assert not isinstance(found, InvalidInput), found.detail
        records, errors = found
        assert records == 3
        assert [(error.record, error.code) for error in errors] == [(0, "malformed-quote"), (2, "malformed-quote")]


LINES = [f"{number},{number * 2},t{number}" for number in range(5000)]


def spoiled(places: Mapping[int, str]) -> bytes:
    """A table of 5000 records in which these lines replace others."""
    lines = [places.get(number, line) for number, line in enumerate(LINES)]
    return ("a,b,c\n" + "\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({500: '500,"1000,t'}, "record 500, .* line 502 .* quotation mark at byte 6235 that is never closed"),
        ({500: '"500,1000,t', 4000: '4000,5" pipe,t'}, "record 500, .* at byte 6231 .* is in the middle of a text"),
        ({500: '500,"1000,t', 4000: '4000,"8000",t'}, "record 500, .* at byte 6235 .* is in the middle of a text"),
        ({500: '500,"1000,t', 4000: '4000,8000,t"'}, "record 500, .* at byte 6235 that opens a field of 3501 lines"),
        ({500: '500,"1000,t', 560: '560,8000,t"', 7: '7,5" pipe,t'}, "record 500, .* opens a field of 61 lines"),
        ({7: '7,5" pipe,t', 500: '500,"1000,t'}, "record 500, .* that is never closed"),
        ({500: "500,1000,t\r501,3,t"}, "record 500, .* has a carriage return at byte 6241, with no line feed"),
        ({7: '7,5" pipe,t', 500: '500,"\r",t\r501,3,t'}, "record 500, .* has a carriage return at byte"),
    ],
)
def test_a_value_that_swallows_records_is_refused_by_record_and_byte(places: dict[int, str], said: str) -> None:
    data = spoiled(places)
    for limits in (ChunkLimits(), ChunkLimits(records=100)):
        with pytest.raises(InvalidInput, match=said) as caught:
            counted("csv", data, limits)
        assert caught.value.errors[0]["row"] == 500


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_text_in_quotation_marks_is_one_record(newline: str) -> None:
    prose = newline.join(["It was, as they say, a dark night; then, of course, rain."] * 3 + ["The end"] * 2)
    text = newline.join([prose] * 100)
    data = newline.join(["a,b,c", f'1,"{text}",2', '3,"x ""y""",4', '5,"a\rb",6', ""]).encode()
    assert counted("csv", data) == (3, [])
    data = newline.join(["a,b,c", f'1,"{text}",2', '3,5" pipe,4', ""]).encode()
    assert counted("csv", data) == (2, [])


@pytest.mark.parametrize("end", ["\r", "\r\r\n"])
@pytest.mark.parametrize("records", [0, 1, 200_000])
def test_lines_that_end_with_carriage_returns_alone_are_refused(end: str, records: int) -> None:
    data = end.join(["a,b", *["1,2"] * records, ""]).encode()
    if end == "\r" and not records:
        assert counted("csv", data) == (0, [])  # the last line may end in any way
        return
    with pytest.raises(InvalidInput, match="the header line has a carriage return at byte 3, with no line feed"):
        get_format("csv").header(io.BytesIO(data))


def test_a_last_line_may_end_with_a_carriage_return() -> None:
    format, source = get_format("csv"), io.BytesIO(b"a,b\r\n1,2\r")
    (chunk,) = format.plan(source, None, ChunkLimits())
    reading = format.read(source, chunk, {"b": "int64"})
    assert isinstance(reading.records, pl.DataFrame)
    assert (reading.records.rows(), reading.errors) == ([("1", 2)], [])


def test_a_header_says_where_its_quotation_mark_opens() -> None:
    for data, said in (
        (b'a,"b\n1,2\n3,4\n', "a quotation mark at byte 2 that is never closed"),
        (b'\xef\xbb\xbfa,"b"c\n', "a malformed quotation mark at byte 5"),
    ):
        with pytest.raises(InvalidInput, match=said):
            get_format("csv").header(io.BytesIO(data))


def test_a_job_whose_quotation_mark_never_closes_fails_with_record_and_byte(api: Api) -> None:
    job = api.run(HEADER + ROW * 8000 + '"' + ROW * 1000, "iris")
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid-input")
    place = len(HEADER) + 8000 * len(ROW)
    assert f"record 8000, which begins in line 8002 at byte {place}" in job["error"]["message"]
    assert f"a quotation mark at byte {place} that is never closed" in job["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (HEADER + ROW + '"' + ROW * 3, "quotation mark at byte 86 that is never closed"),
        ((HEADER + ROW * 3).replace("\n", "\r"), "the header line has a carriage return at byte"),
        (HEADER + (ROW * 3).replace("\n", "\r"), "record 0, .* has a carriage return at byte"),
    ],
)
def test_predict_refuses_an_input_whose_beginning_shows_the_fault(api: Api, body: str, said: str) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/predict?model=iris", content=body)
        detail = problem(answer, 422, "invalid-input")["detail"]
    assert re.search(said, detail), detail


# --- NDJSON and JSON -------------------------------------------------------------------------------------------------

JSON_LINES = st.sampled_from([
    '{"a":1}', '{"a":2,"b":"x\\n"}', ' {"a":3} ', "", " ", "\t", " \r", "\r", "  \t ", "{", '{"a":"', "5",
    "\x0b", "\x0c", "\u2028", "\xa0", '{"a":"\u2028"}', '{"a":"\x85"}', '{"a":1}\r{"a":2}',
    '{"a":1} \r\r {"a":2}', '{"a":\r1}', "\ufeff",
])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    lines=st.lists(JSON_LINES, max_size=12),
    newline=st.sampled_from(["\n", "\r\n"]),
    size=st.sampled_from([1, 20, 2**62]),
    last=st.booleans(),
)
def test_each_line_of_ndjson_that_is_not_blank_is_a_record(
    lines: list[str], newline: str, size: int, last: bool
) -> None:
    data = ('{"a":0}\n' + newline.join(lines) + newline * last).encode()
    found = counted_or_refusal("jsonl", data, ChunkLimits(bytes=size))
    if isinstance(found, InvalidInput):
        assert "}\r{" in data.decode().replace(" ", "").replace("\r\r", "\r")
        assert "a carriage return ends an object" in found.detail
        return
    records, errors = found
    expected = [line for line in data.split(b"\n") if line.strip(b" \t\r")]
    assert records == len(expected)
    assert {error.record for error in errors} == {number for number, line in enumerate(expected) if not is_json(line)}


def is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode(), parse_constant=float), dict)
    except ValueError:
        return False


def test_a_line_of_blanks_is_not_a_record_among_many_either() -> None:
    lines = [f'{{"a":{number}}}' for number in range(10_000)]
    lines[5000:5000] = ["   ", "\t", " \r"]
    records, errors = counted("jsonl", "\n".join(lines).encode(), ChunkLimits(records=6000), {"a": "float32"})
    assert (records, errors) == (10_000, [])


def test_ndjson_whose_lines_end_with_carriage_returns_alone_is_refused() -> None:
    data = b'{"a":1}\n' + b"\r".join(b'{"a":%d}' % number for number in range(2000))
    with pytest.raises(
        InvalidInput, match="record 1, in line 2 at byte 15: a carriage return ends an object"
    ) as caught:
        counted("jsonl", data)
    assert caught.value.errors[0]["row"] == 1
    with pytest.raises(InvalidInput, match="record 0, in line 1"):
        get_format("jsonl").header(io.BytesIO(data.replace(b"\n", b"\r")))


@pytest.mark.parametrize(
    ("records", "swallowed"),
    [
        (['{"a":1,"t":"x}', '{"a":2,"t":"y"}', '{"a":3,"t":z"}'], True),
        (['{"a":1,"t":[1}', '{"a":2,"t":[1]}', '{"a":3,"t":1]}'], True),
        (['[1,"x]', '["y",4]', '[5,z"]'], True),
        (['{"a":1,"t":[{"k":NaN},{"k":1}]}'], False),
        (['{"a":1,"t":[{"k":"\n"},{"k":1}]}'], False),
        (['{"a":1,"t":x}'], False),
        (['{"a":1,"t":' + "[" * 2000 + "{},{}" + "]" * 2000 + "}"], False),
    ],
)
def test_a_json_record_that_holds_others_is_refused_and_one_that_is_alone_fails(
    records: list[str], swallowed: bool
) -> None:
    good = "[0,0]" if records[0].startswith("[") else '{"a":0,"t":"x"}'
    data = f"[{','.join([good] * 150 + records + [good] * 150)}]".encode()
    if not swallowed:
        total, errors = counted("json", data)
        assert (total, [(error.record, error.code) for error in errors]) == (301, [(150, "invalid-json")])
        return
    with pytest.raises(
        InvalidInput, match=r"record 150, which begins at byte .* is malformed and seems to hold others"
    ):
        counted("json", data)


# --- names -----------------------------------------------------------------------------------------------------------


def typed(format: str, fifth: str) -> bytes:
    """A record of the four columns of a flower, and of a fifth one."""
    table = pa.table([[5.1], [3.5], [1.4], [0.2], [1]], names=[*HEADER.strip().split(","), fifth])
    file = io.BytesIO()
    if format == "parquet":
        pq.write_table(table, file)
    else:
        with (pa.ipc.new_file if format == "arrow" else pa.ipc.new_stream)(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


FLOWER = dict.fromkeys(HEADER.strip().split(","), 1.0)
NAMELESS = {
    "csv": ("id,," + HEADER.strip() + "\n1,1," + ROW.strip() + "\n").encode(),
    "jsonl": json.dumps(FLOWER | {"": 1}).encode() + b"\n",
    "jsonl of blanks": json.dumps(FLOWER | {" ": 1}).encode() + b"\n",
    "json": json.dumps([FLOWER | {"": 1}]).encode(),
    "one object": json.dumps(FLOWER | {"": 1}, indent=1).encode(),
    **{format: typed(format, "") for format in ("parquet", "arrow", "arrows")},
}


@pytest.mark.parametrize("name", NAMELESS)
def test_a_column_without_a_name_is_refused_in_every_format(api: Api, name: str) -> None:
    for path in ("/v1/predict?model=iris", "/v1/models/iris/predict"):
        answer = api.http.post(path, content=NAMELESS[name])
        detail = problem(answer, 422, "invalid-input")["detail"]
        assert re.search("every column( between others)? needs a name", detail)


@pytest.mark.parametrize("format", ["parquet", "arrow", "arrows"])
def test_a_duplicate_column_is_refused_in_typed_files(api: Api, format: str) -> None:
    for path in ("/v1/predict?model=iris", "/v1/models/iris/predict"):
        answer = api.http.post(path, content=typed(format, "sepal length (cm)"))
        assert answer.status_code == 422, answer.text


def test_a_late_key_without_a_name_is_dropped_as_other_late_keys_are(api: Api) -> None:
    lines = [json.dumps(FLOWER)] * 150 + [json.dumps(FLOWER | {"": 1})]
    job = api.run("\n".join(lines), "iris")
    assert (job["state"], job["rows"]) == ("completed", {"total": 151, "ok": 151, "failed": 0})


@pytest.mark.parametrize("records", [2, 150])
@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (["1", "18446744073709551615"], [1, 2**64 - 1]),
        (["7", "123456789012345678901"], ["7", "123456789012345678901"]),
        (["-1", "18446744073709551615"], ["-1", "18446744073709551615"]),
        (["1.5", "9007199254740993"], ["1.5", "9007199254740993"]),
        (['{"n": [123456789012345678901, 0.5]}', "[12345678901234567890]"],
         ['{"n":[123456789012345678901,0.5]}', "[12345678901234567890]"]),
        (["1.5", "9007199254740992"], [1.5, 2.0**53]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["json", "jsonl"])
def test_an_integer_that_the_model_does_not_take_keeps_all_its_digits(
    name: str, values: list[str], kept: list[object], records: int
) -> None:
    lines = [f'{{"x": 1.0, "id": {value}}}' for value in values * (records // 2)]
    data = "\n".join(lines) if name == "jsonl" else f"[{', '.join(lines)}]"
    format, source = get_format(name), io.BytesIO(data.encode())
    (chunk,) = format.plan(source, None, ChunkLimits())
    reading = format.read(source, chunk, {"x": "float32"})
    assert isinstance(reading.records, pl.DataFrame)
    assert reading.records["id"].to_list() == kept * (records // 2)
    assert not reading.errors
