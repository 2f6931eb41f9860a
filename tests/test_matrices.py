"""The compiled reading of texts gives the numbers and errors of polars, bit by bit, and leaves to it what it cannot."""

import io
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remote import RemoteStorage
from selection import quick_first, quick_of

from batchserve.domain import Chunk, Dialect, DType
from batchserve.formats import get_format, lines, matrices
from batchserve.formats.kernels import fields
from batchserve.formats.protocol import Block, Format, MatrixReader, Reading

COUNT = 10_000
RANDOM = np.random.default_rng(5)
ODD = [
    *("+1.5", " 1", "1 ", "", " ", "nan", "NaN", "inf", "-inf", "Infinity", ".5", "-.5", "5.", "-5.", ".", "-", "+"),
    *("1e400", "-1e400", "1e-400", "1e39", "3.4028235e38", "3.4028236e38", "1e38", "1e-38", "1e-45", "1.2e-38", "0e99"),
    *("-0", "-0.0", "0", "00", "007", "-007", "0.0", "1e5", "1E5", "1e+5", "1e-05", "1e", "1e+", "e5", "1.e5", ".e5"),
    *("0x1", "1_0", "1.2.3", "--1", "1,5", "١٢", "1\u00a0", "½", "1a", "a", "true", "null", "None", "1e1.5"),
    *("True", "False", "TRUE", " false", "true ", "Tru", "truest", "T", "yes"),
    *("00000000000000000000001", "12345678", "123456789", "123456789012345", "1234567890123456", "9007199254740993"),
    *("0.1234567", "0.12345678", "0.123456789", "0.1234567812345678", "0.12345678123456789", "0." + "0" * 40 + "1"),
    *("18446744073709551616", "36893488147419103232.5", "9" * 40, "0." + "9" * 40, "1" + "0" * 30, "9" * 18, "9" * 19),
    *("16777217", "16777217.0", "16777219", "1.00000005960464477539", "1.000000059604644775390625", "7.038531e-26"),
    *("127", "128", "-128", "-129", "255", "256", "32768", "2147483648", "-2147483649", "4294967296", "3.0", "3.5"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "9007199254740992", "-9007199254740992"),
    *("1e309", "1.8e308", "1.7976931348623157e308", "5e-324", "2e-310", "2.2250738585072014e-308", "1e-342", "1e308"),
    *("1e22", "1e23", "1e-22", "1e-23", "123456789e22", "123456789e23", "1e0", "1e00000000000000000001", "9e1000000"),
]


def numbers() -> np.ndarray:
    return RANDOM.standard_normal(COUNT)


def spread(low: int, high: int) -> list[float]:
    values: list[float] = (numbers() * 10.0 ** RANDOM.integers(low, high, COUNT)).tolist()
    return values


def middles() -> Iterator[str]:
    """Exactly midway between two float32s, and a little beside that."""
    for value in np.abs(RANDOM.standard_normal(COUNT // 8).astype(np.float32)):
        middle = (float(value) + float(np.nextafter(value, np.float32(9)))) / 2
        whole = np.format_float_positional(middle, unique=False, precision=60, trim="-")
        yield from (repr(middle), repr(math.nextafter(middle, 9)), repr(math.nextafter(middle, -9)))
        yield from (whole, whole + "1", f"{middle:.17g}", f"{middle:.19e}", "-" + repr(middle))


NOTATIONS: dict[str, Callable[[], list[str]]] = {
    "repr of float64": lambda: [repr(value) for value in numbers().tolist()],
    "shortest float32": lambda: [str(value) for value in numbers().astype(np.float32)],
    "%.6f": lambda: [f"{value:.6f}" for value in numbers().tolist()],
    "%.6g": lambda: [f"{value:.6g}" for value in spread(-8, 8)],
    "%.17g": lambda: [f"{value:.17g}" for value in spread(-5, 5)],
    "%.3e": lambda: [f"{value:.3e}" for value in spread(-20, 20)],
    "any float32": lambda: [
        repr(float(value))
        for value in RANDOM.integers(0, 2**32, COUNT, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ],
    "any float64": lambda: [
        repr(value) for value in RANDOM.integers(0, 2**63, COUNT, dtype=np.uint64).view(np.float64).tolist()
    ],
    "middles of two float32s": lambda: list(middles()),
    "16 to 19 digits": lambda: [
        f"{number}"[:-point] + "." + f"{number}"[-point:]
        for number, point in zip(
            RANDOM.integers(10**15, 2**63, COUNT).tolist(), RANDOM.integers(1, 15, COUNT).tolist(), strict=True
        )
    ],
    "integers": lambda: [
        str(value) for value in (RANDOM.integers(-(2**62), 2**62, COUNT) >> RANDOM.integers(0, 62, COUNT))
    ],
    "odd ones": lambda: random.Random(1).choices(ODD, k=COUNT),
}


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags any number of records."""
    assert matrices.fast_reader() is not None
    monkeypatch.setattr(matrices, "_FLAGGED", 1)


def both(
    data: bytes, records: int, dtypes: dict[str, DType], *, name: str = "csv", dialect: Dialect | None = None,
    kept: tuple[str, ...] = ("b",), types: dict[str, DType] | None = None,
) -> tuple[Reading, Reading]:  # fmt: skip
    """The records behind the header of a CSV, read by polars, and as matrices of one column each."""
    format = get_format(name, dialect or Dialect())
    assert isinstance(format, MatrixReader)
    chunk = Chunk(0, records, data.index(b"\n") + 1 if name == "csv" else 0, len(data))
    wanted = [*dtypes, *(column for column in kept if column not in dtypes)]
    blocks = tuple(Block(f"of {column}", (column,), dtype) for column, dtype in dtypes.items())
    every = dtypes | (types or {})
    plain: Format = format
    slow = plain.read(io.BytesIO(data), chunk, every, wanted)
    return slow, format.read_matrices(io.BytesIO(data), chunk, every, wanted, blocks, kept)


def assert_same(slow: Reading, fast: Reading, dtypes: dict[str, DType]) -> None:
    assert fast.matrices, "left to polars"
    assert isinstance(slow.records, pl.DataFrame)
    assert isinstance(fast.records, pl.DataFrame)
    for name in dtypes:
        matrix = fast.matrices[f"of {name}"]
        column = slow.records[name]
        if matrix.absent is not None:
            assert matrix.absent[:, 0].tolist() == column.is_null().to_list()
            column = column.fill_null(0)
        expected, got = column.to_numpy(), matrix.values[:, 0]
        assert got.dtype == expected.dtype
        # NaN has many forms, which mean the same.
        same = (expected.view(f"V{expected.itemsize}") == got.view(f"V{got.itemsize}")) | (
            (expected != expected) & (got != got)
        )
        wrong = np.flatnonzero(~same)[:5].tolist()
        assert [(number, expected[number], got[number]) for number in wrong] == []
    for name in fast.records.columns:
        if name not in dtypes:
            assert fast.records[name].equals(slow.records[name])
            assert fast.records[name].dtype == slow.records[name].dtype
    assert fast.errors == slow.errors


def of_texts(texts: list[str]) -> bytes:
    return ("a,b\n" + "".join(f"{text},{number}\n" for number, text in enumerate(texts))).encode()


@pytest.mark.parametrize("dtype", quick_of(["float32", "float64", "int64", "int8", "uint16"], {"float32", "int64"}))
@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_number_is_that_of_polars_in_every_notation(notation: str, dtype: DType) -> None:
    texts = [text for text in NOTATIONS[notation]() if "," not in text]
    slow, fast = both(of_texts(texts), len(texts), {"a": dtype})
    assert_same(slow, fast, {"a": dtype})


@pytest.mark.parametrize("dtype", quick_of(["float32", "float64", "int32"], {"float32", "int32"}))
@given(st.lists(st.text("0123456789.-+eE _xnaif", max_size=26), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_the_number_or_the_fault_that_polars_sees(dtype: DType, texts: list[str]) -> None:
    slow, fast = both(of_texts(texts), len(texts), {"a": dtype})
    assert_same(slow, fast, {"a": dtype})


def test_a_long_number_is_the_nearest_float64() -> None:
    """Of numbers of any size; and of some midway between two float64s, or a little beside that."""
    chance = random.Random(7)
    cases = [(chance.getrandbits(chance.randint(1, 63)), chance.randint(-345, 310)) for _ in range(30_000)]
    cases += [(chance.randrange(10**15, 10**19), chance.randint(-30, 30)) for _ in range(30_000)]
    for _ in range(5000):
        odd = (chance.getrandbits(53) | 2**52) * 2 + 1
        cases += [(odd, 0), (odd * 5, -1), (odd * 25, -2), (odd << chance.randint(1, 8), 0), (odd * 125 + 1, -3)]
    unsigned: Any = np.uint64
    for number, exponent in cases:
        if number < 10**19:
            known, got = fields.nearest(unsigned(number), exponent)
            assert not known or got == float(f"{number}e{exponent}"), (number, exponent)
            assert known or not -290 <= exponent <= 285


def test_plain_numbers_are_not_left_to_polars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these notations no record is, of repr few: it would take longer than polars alone."""
    monkeypatch.setattr(
        "batchserve.formats.csv_matrices.with_flagged",
        lambda reading, fields, *_: (
            reading if not fields.flagged else pytest.fail(f"{len(fields.flagged)} records were flagged")
        ),
    )
    for texts in (
        [str(value) for value in numbers().astype(np.float32)],
        [f"{value:.6f}" for value in numbers().tolist()],
        [f"{value:.4g}" for value in spread(-8, 8)],
        [f"{value:.3e}" for value in spread(-20, -8)],
        [str(value) for value in RANDOM.integers(-(10**14), 10**14, COUNT)],
        ["", "-0.0", ".5", "5.", "007", "1e5", "123456789012345678"] * 100,
    ):
        _, fast = both(of_texts(texts), len(texts), {"a": "float32"})
        assert fast.matrices


@pytest.mark.parametrize("block", [128, 1000, 2**20])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("records", [1, 2, 3, 7, 500, 9000])
def test_every_byte_of_a_chunk_is_read_whatever_its_length(
    records: int, ended: bool, newline: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "_BLOCK", block)
    lines = [f"{number / 7!r},{'x' * (number % 70)},{number}" for number in range(records)]
    data = newline.join(["a,b,c", *lines]) + (newline if ended else "")
    slow, fast = both(data.encode(), records, {"a": "float32", "c": "int64"}, kept=("b",))
    assert_same(slow, fast, {"a": "float32", "c": "int64"})


def test_columns_that_are_kept_come_in_file_order_and_as_they_are_written() -> None:
    data = b"a,b,c,d\n1.50,x,2,\n2,,3.25,007\n"
    _, fast = both(data, 2, {"a": "float32", "c": "float64"}, kept=("d", "a"))
    assert isinstance(fast.records, pl.DataFrame)
    assert fast.records.rows() == [("1.50", None), ("2", "007")]
    assert fast.matrices["of c"].values.tolist() == [[2.0], [3.25]]


def test_columns_of_other_types_are_read_by_polars() -> None:
    rows = [(number % 2 == 0, f"text {number}", number / 3) for number in range(3000)]
    data = "a,b,c\n" + "".join(f"{number!r},{truth},{text}\n" for truth, text, number in rows)
    slow, fast = both(data.encode(), 3000, {"a": "float32"}, kept=("b", "c"), types={"b": "bool", "c": "string"})
    assert_same(slow, fast, {"a": "float32"})


def test_several_columns_fill_a_matrix_row_by_row() -> None:
    values = RANDOM.standard_normal((5000, 4)).astype(np.float32)
    data = ("a,b,c,d\n" + "".join(",".join(map(str, row)) + "\n" for row in values)).encode()
    format = get_format("csv", Dialect())
    assert isinstance(format, MatrixReader)
    blocks = (Block("x", ("d", "b"), "float32"), Block("y", ("a", "c"), "float32"))
    types: dict[str, DType] = dict.fromkeys("abcd", "float32")
    reading = format.read_matrices(io.BytesIO(data), Chunk(0, 5000, 8, len(data)), types, list("abcd"), blocks, ())
    for block, columns in zip(blocks, ([3, 1], [0, 2]), strict=True):
        matrix = reading.matrices[block.name].values
        assert matrix.flags.c_contiguous
        assert matrix.tolist() == values[:, columns].tolist()
    assert isinstance(reading.records, pl.DataFrame)
    assert reading.records.shape == (5000, 0)


@pytest.mark.parametrize(("delimiter", "decimal"), [(";", "."), ("\t", "."), ("|", "."), (";", ","), ("\t", ",")])
def test_other_delimiters_and_decimal_marks_are_read_so_too(delimiter: str, decimal: str) -> None:
    dialect = Dialect(delimiter, decimal=decimal)
    texts = [repr(value).replace(".", decimal) for value in numbers().tolist()]
    texts += [text for text in ODD if delimiter not in text] + ["1.5", "1.234,5"]
    data = f"a{delimiter}b\n" + "".join(f"{text}{delimiter}{text}\n" for text in texts)
    slow, fast = both(data.encode(), len(texts), {"a": "float32"}, dialect=dialect)
    assert_same(slow, fast, {"a": "float32"})


LEFT: dict[str, bytes] = {
    "a quotation mark": b'1,"x"\n2,y\n',
    "one in the middle of a text": b'1,x"y\n2,y\n',
    "a field too few": b"1,x\n2\n",
    "a field too many": b"1,x\n2,y,z\n",
    "a field too few and one too many": b"1,x\n2\n3,y,z\n",
    "a blank line": b"1,x\n\n2,y\n",
    "other line ends": b"1,x\r\n2,y\n",
    "a carriage return in a text": b"1,x\ry\n2,y\n",
    "a byte that is not UTF-8": b"1,x\n2,\xff\n",
    "half a character at the end": b"1,x\n2,\xc3\n",
}


@pytest.mark.parametrize("where", quick_first(["late", "early"], 1))
@pytest.mark.parametrize("text", LEFT)
def test_another_form_is_left_to_polars_with_all_its_errors(text: str, where: str) -> None:
    plain = b"".join(b"%d,z\n" % number for number in range(30_000))
    odd = LEFT[text]
    data = b"a,b\n" + (odd + plain if where == "early" else plain + odd)
    records = 30_000 + sum(1 for line in odd.split(b"\n") if line)
    slow, fast = both(data, records, {"a": "float32"})
    assert fast.matrices == {}
    assert fast.errors == slow.errors
    assert isinstance(fast.records, pl.DataFrame)
    assert isinstance(slow.records, pl.DataFrame)
    assert fast.records.equals(slow.records)


def test_texts_beyond_ascii_pass_through() -> None:
    data = "a,b\n" + "".join(f"{number},Zoë {number} 漢\n" for number in range(30_000))
    slow, fast = both(data.encode(), 30_000, {"a": "float32"})
    assert_same(slow, fast, {"a": "float32"})


def test_a_column_that_is_not_kept_must_be_utf8_as_well() -> None:
    data = b"a,b\n1,x\n2,\xff\n"
    slow, fast = both(data, 2, {"a": "float32"}, kept=())
    assert fast.matrices == {}
    assert [error.code for error in fast.errors] == [error.code for error in slow.errors] == ["invalid-utf8"]


def test_faults_are_those_of_their_records() -> None:
    texts = [str(number) for number in range(5000)]
    for place, text in ((7, "a"), (4000, "1e400"), (4999, "x")):
        texts[place] = text
    slow, fast = both(of_texts(texts), 5000, {"a": "float32"})
    assert_same(slow, fast, {"a": "float32"})
    assert [(error.record, error.column) for error in fast.errors] == [(7, "a"), (4000, "a"), (4999, "a")]


def test_more_or_fewer_records_than_planned_are_refused_as_ever() -> None:
    data = of_texts(["1", "2", "3"])
    format = get_format("csv", Dialect())
    assert isinstance(format, MatrixReader)
    for records in (2, 4):
        with pytest.raises(Exception, match="hold 3 records"):
            format.read_matrices(
                io.BytesIO(data), Chunk(0, records, 4, len(data)), {"a": "float32"}, ["a"],
                (Block("x", ("a",), "float32"),), (),
            )  # fmt: skip


def test_a_line_longer_than_a_block_is_left_to_polars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_BLOCK", 1000)
    data = of_texts(["1"] * 500 + ["2" + " " * 1200] + ["3"] * 5)
    slow, fast = both(data, 506, {"a": "float32"})
    assert fast.matrices == {}
    assert fast.errors == slow.errors


def test_objects_without_a_file_are_read_in_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of_texts([str(value) for value in numbers().tolist()] * 20)
    folder = RemoteStorage(str(tmp_path))
    with folder.create("inputs/1") as writer:
        writer.write(data)
        writer.commit()
    asked: list[int] = []
    honest = folder.read

    def read(key: str, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return honest(key, start, stop)

    monkeypatch.setattr(folder, "read", read)
    format = get_format("csv", Dialect())
    assert isinstance(format, MatrixReader)
    chunk = Chunk(0, 20 * COUNT, 4, len(data))
    assert len(data) > 3 * 2**20
    reading = format.read_matrices(
        folder.open("inputs/1"), chunk, {"a": "float32"}, ["a"], (Block("x", ("a",), "float32"),), ()
    )
    assert reading.matrices["x"].values.shape == (20 * COUNT, 1)
    assert len([size for size in asked if size > 2**18]) == 1


def test_many_odd_numbers_are_left_to_polars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    plain = [str(number) for number in range(50_000)]
    _, fast = both(of_texts([*plain[:40_000], *(["nan"] * 20_000)]), 60_000, {"a": "float32"})
    assert fast.matrices == {}
    _, fast = both(of_texts([*plain, *(["nan"] * 1000)]), 51_000, {"a": "float32"})
    assert fast.matrices


def test_a_truth_word_among_numbers_costs_no_record_and_leaves_none_of_the_others_to_polars() -> None:
    texts = [*map(str, range(5000)), "True", "false", "x", *map(str, range(5000))]
    for dtype in ("float32", "int64"):
        slow, fast = both(of_texts(texts), len(texts), {"a": dtype}, kept=("a", "b"))
        assert fast.matrices["of a"].values[5000:5002, 0].tolist() == [1, 0]
        assert [error.record for error in fast.errors] == [error.record for error in slow.errors] == [5002]
        assert isinstance(fast.records, pl.DataFrame)
        assert fast.records["a"][5000:5002].to_list() == ["True", "false"]


def test_a_host_without_numba_has_no_compiled_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrices.fast_reader() is not None
    assert lines.fast_counter() is not None
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("fields", "newlines", "words"):
        monkeypatch.delitem(sys.modules, f"batchserve.formats.kernels.{name}")
        monkeypatch.delattr(f"batchserve.formats.kernels.{name}")
    assert matrices.fast_reader.__wrapped__() is None
    assert lines.fast_counter.__wrapped__() is None


def test_without_the_extra_polars_reads_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "fast_reader", lambda: None)
    slow, fast = both(of_texts(["1", "2"]), 2, {"a": "float32"})
    assert fast.matrices == {}
    assert isinstance(fast.records, pl.DataFrame)
    assert isinstance(slow.records, pl.DataFrame)
    assert fast.records.equals(slow.records)


# --- NDJSON ----------------------------------------------------------------------------------------------------------


def in_json(texts: list[str]) -> bytes:
    return "".join(f'{{"a": {text},"b":{number}}}\n' for number, text in enumerate(texts)).encode()


@pytest.mark.parametrize("dtype", quick_of(["float32", "float64", "int64", "uint16"], {"float32", "int64"}))
@pytest.mark.parametrize(
    "notation", [name for name in NOTATIONS if name not in ("odd ones", "any float32", "any float64")]
)
def test_a_number_in_json_is_that_of_polars_in_every_notation(notation: str, dtype: DType) -> None:
    texts = [text.removesuffix(".") for text in NOTATIONS[notation]()]
    slow, fast = both(in_json(texts), len(texts), {"a": dtype}, name="jsonl")
    assert_same(slow, fast, {"a": dtype})


JSON_ODD = [
    *ODD,
    '"1.5"',
    '"a"',
    '"True"',
    '"false"',
    "false",
    "[1]",
    "{}",
    "1]",
    "1}",
    "tru",
    "nul",
    '"',
    "'1'",
    "-01",
    "-.5",
    "-",
    "--1",
    "1.e1",
    "01.5",
]


@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("place", ["taken", "kept", "left out"])
@pytest.mark.parametrize("text", sorted(set(JSON_ODD)))
def test_the_grammar_is_that_of_json(text: str, place: str, dtype: DType) -> None:
    """Wherever it is: a value that is not one costs its record."""
    odd = {
        "taken": f'{{"a":{text},"b":0,"c":0}}\n',
        "kept": f'{{"a":0,"b":{text},"c":0}}\n',
        "left out": f'{{"a":0,"b":0,"c":{text}}}\n',
    }
    plain = ['{"a":1,"b":2,"c":3}\n'] * 150
    data = "".join([*plain, odd[place], *plain]).encode()
    slow, fast = both(data, 301, {"a": dtype}, name="jsonl")
    if fast.matrices:
        assert_same(slow, fast, {"a": dtype})
    else:
        assert fast.errors == slow.errors
        assert isinstance(fast.records, pl.DataFrame)
        assert isinstance(slow.records, pl.DataFrame)
        assert fast.records.equals(slow.records)


def rows_of(**columns: list[Any]) -> tuple[bytes, int]:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), len(rows)


def test_columns_of_json_are_kept_in_their_types() -> None:
    values = numbers()[:3000].tolist()
    data, count = rows_of(
        a=values,
        text=[
            None if n % 7 == 1 else ["", "x, y", "Zoë", "{", "null", "1.5", " ", "é漢", "'"][n % 9] for n in range(3000)
        ],
        whole=[None if n % 5 == 1 else n * (-1) ** n for n in range(3000)],
        part=[None if n % 11 == 1 else n / 7 for n in range(3000)],
        truth=[None if n % 3 == 1 else n % 2 == 0 for n in range(3000)],
        left=[None if n % 3 == 1 else "out, and out" for n in range(3000)],
    )
    kept = ("text", "whole", "part", "truth")
    slow, fast = both(data, count, {"a": "float32"}, name="jsonl", kept=kept)
    assert_same(slow, fast, {"a": "float32"})
    assert isinstance(fast.records, pl.DataFrame)
    assert set(fast.records.columns) == set(kept)


def test_missing_numbers_of_json_are_absent() -> None:
    data, count = rows_of(a=[1.5, None, 2] * 500, n=[None, 5, 7] * 500, b=list(range(1500)))
    slow, fast = both(data, count, {"a": "float32", "n": "int32"}, name="jsonl")
    assert_same(slow, fast, {"a": "float32", "n": "int32"})


@pytest.mark.parametrize(
    ("ending", "ended"), [("\n", True), ("\n", False), ("\r\n", True), ("\r\n", False), (" \n", True)]
)
@pytest.mark.parametrize("block", [200, 2**20])
@pytest.mark.parametrize("records", [101, 400, 5000])
def test_json_of_any_spacing_is_read_to_its_last_byte(
    records: int, block: int, ended: bool, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "_BLOCK", block)
    rows = [f'{{ "a" :  {number / 7!r},\t"b": "{"x" * (number % 70)}" , "c":{number} }}' for number in range(records)]
    rows = [row.replace('" ,', '",') for row in rows]
    data = ending.join(rows) + (ending if ended else "")
    slow, fast = both(data.encode(), records, {"a": "float32", "c": "int64"}, name="jsonl")
    assert_same(slow, fast, {"a": "float32", "c": "int64"})


JSON_LEFT = {
    "another order": b'{"b":"x","a":1}\n',
    "a key too few": b'{"a":1}\n',
    "a key too many": b'{"a":1,"b":"x","c":1}\n',
    "a key twice": b'{"a":1,"a":"x"}\n',
    "another space": b'{"a":1, "b":"x"}\n',
    "a blank line": b"\n",
    "a backslash": b'{"a":1,"b":"\\n"}\n',
    "a quotation mark that is escaped": b'{"a":1,"b":"\\","}\n',
    "an array": b'{"a":1,"b":[1,2]}\n',
    "an object": b'{"a":1,"b":{"c":2}}\n',
    "a number in place of a text": b'{"a":1,"b":5}\n',
    "a byte that is not UTF-8": b'{"a":1,"b":"\xff"}\n',
    "a control character": b'{"a":1,"b":"\x01"}\n',
    "a text that is never closed": b'{"a":1,"b":"x}\n',
    "two records in a line": b'{"a":1,"b":"x"}{"a":1,"b":"x"}\n',
    "something behind the record": b'{"a":1,"b":"x"} 1\n',
    "no record": b"5\n",
}


@pytest.mark.parametrize("where", quick_first(["late", "first"], 1))
@pytest.mark.parametrize("text", JSON_LEFT)
def test_json_of_another_form_is_left_to_polars_with_all_its_errors(text: str, where: str) -> None:
    plain = b"".join(b'{"a":%d,"b":"z"}\n' % number for number in range(20_000))
    odd = JSON_LEFT[text]
    data = odd + plain if where == "first" else plain + odd
    slow, fast = both(data, 20_000 + (text != "a blank line"), {"a": "float32"}, name="jsonl")
    assert fast.matrices == {}
    assert fast.errors == slow.errors
    assert isinstance(fast.records, pl.DataFrame)
    assert isinstance(slow.records, pl.DataFrame)
    assert fast.records.equals(slow.records)


def test_an_odd_value_of_json_costs_its_record_alone() -> None:
    values: list[Any] = list(range(5000))
    values[7], values[4000] = "x", True
    data, count = rows_of(a=values, b=["x"] * 5000)
    slow, fast = both(data, count, {"a": "float32"}, name="jsonl")
    assert_same(slow, fast, {"a": "float32"})
    assert [(error.record, error.column) for error in fast.errors] == [(7, "a")]
