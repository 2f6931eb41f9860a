"""Tables of every library go in and come out as they were: values, types and order, through a real server."""

import datetime as dt
import decimal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from sklearn.linear_model import LinearRegression

from batchserve import Client
from batchserve.client.data import content_of
from batchserve.conversion import convert
from batchserve.errors import InvalidInput
from benchmarks import frames

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=300)
NAIVE = st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))  # noqa: DTZ001 - as many frames hold them
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"])
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
DECIMALS = st.decimals(-(10**12), 10**12, places=3)


@pytest.fixture(scope="module")
def client(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0]})
    path = tmp_path_factory.mktemp("frames") / "double.onnx"
    convert(LinearRegression().fit(frame, 2 * frame["x"]), frame, path)
    with Client(server) as client:
        client.models.add(path, name="double")
        yield client


def through(client: Client, data: Any, **options: Any) -> Any:
    """What comes out where all columns pass through, also where no row can be scored."""
    return client.predict(data, model="double", passthrough="all", max_errors=1e6, **options)


# polars

INNER: list[Any] = [
    pl.Boolean(), pl.Int8(), pl.Int64(), pl.UInt64(), pl.Float32(), pl.Float64(), pl.String(), pl.Binary(), pl.Date(),
    pl.Time(), pl.Datetime("ms"), pl.Datetime("us", "Europe/Berlin"), pl.Datetime("ns", "UTC"), pl.Duration("us"),
    pl.Decimal(20, 3), pl.Categorical(), pl.Enum(["b", "a", ""]),
]  # fmt: skip
SIGNED: dict[Any, int] = {pl.Int8: 8, pl.Int16: 16, pl.Int64: 64, pl.Int128: 128}
UNSIGNED: dict[Any, int] = {pl.UInt8: 8, pl.UInt64: 64}
OUTER = [pl.Null(), pl.Int128(), pl.Float16(), pl.Int16(), pl.UInt8(), pl.Duration("ns")]


VALUES: dict[Any, st.SearchStrategy[Any]] = {
    pl.Boolean: st.booleans(),
    pl.Null: st.none(),
    pl.Float16: st.floats(width=16),
    pl.Float32: st.floats(width=32),
    pl.Float64: st.floats(),
    pl.String: TEXT,
    pl.Categorical: TEXT,
    pl.Enum: st.sampled_from(["b", "a", ""]),
    pl.Binary: st.binary(max_size=6),
    pl.Date: st.dates(),
    pl.Time: st.times(),
    pl.Datetime: NAIVE,
    pl.Duration: st.timedeltas(dt.timedelta(days=-90_000), dt.timedelta(days=90_000)),
    pl.Decimal: DECIMALS,
    **{kind: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for kind, bits in SIGNED.items()},
    **{kind: st.integers(0, 2**bits - 1) for kind, bits in UNSIGNED.items()},
}


def polars_values(kind: Any) -> st.SearchStrategy[Any]:
    match kind:
        case pl.List():
            return st.lists(st.none() | polars_values(kind.inner), max_size=3)
        case pl.Array():
            return st.lists(st.none() | polars_values(kind.inner), min_size=2, max_size=2)
        case pl.Struct():
            return st.fixed_dictionaries({field.name: st.none() | polars_values(field.dtype) for field in kind.fields})
    return VALUES[type(kind)]


def polars_kinds() -> st.SearchStrategy[Any]:
    inner = st.sampled_from(INNER)
    nested = st.one_of(
        inner.map(pl.List), inner.map(lambda kind: pl.Array(kind, 2)), inner.map(lambda kind: pl.Struct({"f": kind}))
    )
    return st.one_of(inner, st.sampled_from(OUTER), nested)


def polars_series(name: str, kind: Any, values: list[Any]) -> pl.Series:
    if isinstance(kind, pl.Datetime) and kind.time_zone:
        return (
            pl.Series(name, values, pl.Datetime(kind.time_unit))
            .dt.replace_time_zone("UTC")
            .dt.convert_time_zone(kind.time_zone)
        )
    plain = [float(value) if isinstance(kind, pl.Float16) and value is not None else value for value in values]
    return pl.Series(name, plain, kind)


@st.composite
def polars_frames(draw: st.DrawFn) -> pl.DataFrame:
    rows = draw(st.integers(1, 6))
    columns = [
        pl.Series("x", draw(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=rows, max_size=rows)), pl.Float64)
    ]
    for number, kind in enumerate(draw(st.lists(polars_kinds(), min_size=1, max_size=20))):
        values = draw(st.lists(st.none() | polars_values(kind), min_size=rows, max_size=rows))
        columns.append(polars_series(f"c{number}", kind, values))
    return pl.DataFrame(columns)


def passes_polars(client: Client, frame: pl.DataFrame) -> None:
    with pytest.warns() if frame["x"].null_count() else nullcontext():
        out = through(client, frame)
    assert out.columns[: frame.width] == frame.columns
    assert out.width == frame.width + 1
    assert_frame_equal(out.select(frame.columns), frame, check_exact=True)


@pytest.mark.slow
@FEW
@given(frame=polars_frames())
def test_any_frame_of_polars_comes_back_equal_in_values_and_types(client: Client, frame: pl.DataFrame) -> None:
    passes_polars(client, frame)


# pandas


def pandas_columns(rows: int) -> st.SearchStrategy[Any]:
    def of(values: st.SearchStrategy[Any], *dtypes: Any, gaps: Any = None) -> st.SearchStrategy[Any]:
        each = values if gaps is None else values | st.just(gaps)
        return st.builds(
            lambda given, dtype: pd.Series(given, dtype=dtype),
            st.lists(each, min_size=rows, max_size=rows),
            st.sampled_from(dtypes),
        )

    wide, small = st.integers(-(2**63), 2**63 - 1), st.integers(0, 127)
    words, moments = st.sampled_from(["u", "v", ""]), NAIVE.map(pd.Timestamp)
    zoned = st.builds(
        lambda given, zone, unit: pd.Series(pd.DatetimeIndex(given).tz_localize("UTC").tz_convert(zone).as_unit(unit)),
        st.lists(NAIVE | st.just(pd.NaT), min_size=rows, max_size=rows),
        ZONES | st.just(dt.timezone(dt.timedelta(hours=5, minutes=30))),
        st.sampled_from(["s", "ms", "us", "ns"]),
    )
    return st.one_of(
        of(wide, "Int64", "int64[pyarrow]", gaps=pd.NA),
        of(wide, "int64"),
        of(small, "int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"),
        of(small, "Int8", "UInt8", "UInt16", "Int32", "UInt64", gaps=pd.NA),
        of(st.floats(), "float64"),
        of(st.floats(width=32), "float32"),
        of(st.floats(allow_nan=False), "Float64", "double[pyarrow]", gaps=pd.NA),
        of(st.booleans(), "bool"),
        of(st.booleans(), "boolean", "bool[pyarrow]", gaps=pd.NA),
        of(TEXT, "str", "string", "string[python]", "string[pyarrow]", gaps=None),
        of(words, pd.CategoricalDtype(["v", "u", ""], ordered=True), "category", gaps=None),
        of(small, "category", gaps=None),
        of(moments, "datetime64[s]", "datetime64[ms]", "datetime64[us]", "datetime64[ns]", gaps=pd.NaT),
        zoned,
        of(st.integers(-(10**12), 10**12), "timedelta64[s]", "timedelta64[us]", "timedelta64[ns]"),
        of(st.dates(), object, pd.ArrowDtype(pa.date32()), gaps=None),
        of(DECIMALS, object, pd.ArrowDtype(pa.decimal128(20, 3)), gaps=None),
        of(st.binary(max_size=4), object, gaps=None),
        of(st.one_of(small, TEXT, st.floats(), st.booleans(), st.dates()), object, gaps=None),
        of(st.lists(small, max_size=3), object, gaps=None),
        of(st.floats(allow_nan=False), pd.SparseDtype("float64", np.nan)),
    )


@st.composite
def pandas_frames(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.integers(1, 6))
    given = draw(st.lists(pandas_columns(rows), min_size=1, max_size=20))
    x = draw(st.lists(st.floats(-1e6, 1e6), min_size=rows, max_size=rows))
    frame = pd.DataFrame({"x": x} | dict(enumerate(given)))
    index: Any = draw(
        st.sampled_from(
            [
                pd.RangeIndex(5, 5 + rows, name="n"),
                pd.date_range("2026-10-24", periods=rows, freq="D", tz="Europe/Berlin"),
                pd.MultiIndex.from_tuples([("a", n) for n in range(rows)], names=["k", None]),
                pd.CategoricalIndex(["b"] * rows),
            ]
        )
    )
    return frame.set_index(index)


def passes_pandas(client: Client, frame: pd.DataFrame) -> None:
    out = through(client, frame)
    assert len(out.columns) == len(frame.columns) + 1
    pd.testing.assert_frame_equal(out[list(frame.columns)], frame, check_exact=True, check_column_type=False)


@FEW
@given(frame=pandas_frames())
def test_any_frame_of_pandas_comes_back_equal_in_values_types_and_index(client: Client, frame: pd.DataFrame) -> None:
    passes_pandas(client, frame)


# pyarrow


def items(given: dict[str, int]) -> list[tuple[str, int]]:
    return list(given.items())


ARROW: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    *((kind, st.integers(0, 127)) for kind in (pa.int8(), pa.uint8(), pa.int16(), pa.uint32())),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float16(), st.floats(width=16, allow_nan=False).map(np.float16)),
    (pa.float32(), st.floats(width=32, allow_nan=False)),
    (pa.float64(), st.floats(allow_nan=False)),
    *((kind, TEXT) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, st.binary(max_size=4)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(2), st.binary(min_size=2, max_size=2)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    (pa.time32("s"), st.times().map(lambda time: time.replace(microsecond=0))),
    (pa.time64("us"), st.times()),
    *((pa.timestamp(unit), NAIVE.map(lambda time: time.replace(microsecond=0))) for unit in ("s", "ms", "us", "ns")),
    *((pa.timestamp("us", zone), NAIVE) for zone in ("UTC", "Europe/Berlin", "+05:30")),
    *((pa.duration(unit), st.integers(-(10**9), 10**9)) for unit in ("s", "ms", "us", "ns")),
    (pa.decimal128(20, 3), DECIMALS),
    (pa.decimal256(50, 3), DECIMALS),
    (pa.null(), st.none()),
    (pa.dictionary(pa.int8(), pa.string()), TEXT),
    (pa.dictionary(pa.int32(), pa.int64(), ordered=True), st.integers(0, 9)),
    (pa.list_(pa.int8()), st.lists(st.none() | st.integers(0, 9), max_size=3)),
    (pa.large_list(pa.string()), st.lists(TEXT, max_size=3)),
    (pa.list_(pa.float32(), 2), st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2)),
    (pa.list_view(pa.int16()), st.lists(st.integers(0, 9), max_size=3)),
    (pa.map_(pa.string(), pa.int8()), st.dictionaries(TEXT, st.integers(0, 9), max_size=2).map(items)),
    (pa.struct([("a", pa.int8()), ("b", pa.null())]), st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.none()})),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), st.lists(TEXT, max_size=3)),
    (pa.struct([("c", pa.dictionary(pa.int16(), pa.string()))]), st.fixed_dictionaries({"c": st.none() | TEXT})),
]  # fmt: skip


@st.composite
def arrow_tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(1, 6))
    columns = {"x": pa.array(draw(st.lists(st.floats(-1e6, 1e6), min_size=rows, max_size=rows)))}
    for number, (kind, values) in enumerate(draw(st.lists(st.sampled_from(ARROW), min_size=1, max_size=20))):
        columns[f"c{number}"] = pa.array(draw(st.lists(st.none() | values, min_size=rows, max_size=rows)), kind)
    if draw(st.booleans()):
        columns["uuid"] = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * rows, pa.binary(16)))
    return pa.table(columns, metadata={"made": "by hand"})


def passes_arrow(client: Client, table: pa.Table) -> None:
    out = through(client, table)
    assert out.num_columns == table.num_columns + 1
    passed = out.select(table.column_names)
    assert passed.schema.equals(table.schema, check_metadata=True)
    assert passed.to_pylist() == table.to_pylist()


@FEW
@given(table=arrow_tables())
def test_any_table_of_pyarrow_comes_back_equal_in_values_and_types(client: Client, table: pa.Table) -> None:
    passes_arrow(client, table)


# numpy

FIELDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("?", st.booleans()),
    ("i1", st.integers(-128, 127)),
    (">i4", st.integers(0, 9)),
    ("u8", st.integers(0, 2**64 - 1)),
    ("f2", st.floats(width=16)),
    ("f4", st.floats(width=32)),
    ("f8", st.floats()),
    ("S4", st.binary(max_size=4)),
    ("U4", TEXT.map(lambda text: text[:4])),
    *((f"M8[{unit}]", st.integers(-9999, 9999)) for unit in ("D", "h", "s", "ms", "us", "ns", "M")),
    *((f"m8[{unit}]", st.integers(-9999, 9999)) for unit in ("h", "s", "ms", "ns")),
    (("i2", (2,)), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    ("O", st.one_of(st.none(), st.integers(0, 9), TEXT)),
]


@st.composite
def structured_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    rows = draw(st.integers(1, 6))
    fields = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=12))
    array = np.zeros(rows, [("x", "f4"), *((f"c{place}", kind) for place, (kind, _) in enumerate(fields))])
    for place, (_, values) in enumerate(fields):
        array[f"c{place}"] = draw(st.lists(values, min_size=rows, max_size=rows))
    return array


@FEW
@given(array=structured_arrays())
def test_any_structured_array_comes_back_with_its_fields(client: Client, array: np.ndarray[Any, Any]) -> None:
    out = through(client, array)
    assert out.dtype.names == (*array.dtype.names, "prediction")
    for name in array.dtype.names:
        assert out.dtype[name] == array.dtype[name]
        assert repr(out[name].tolist()) == repr(array[name].tolist())


# tables of other kinds


def test_a_lazy_frame_a_series_a_batch_and_a_reader_come_back_as_tables_of_their_library(client: Client) -> None:
    frame = pl.DataFrame({"x": [1.0, 2.0], "day": [dt.date(2026, 1, 1), None]})
    lazy = through(client, frame.lazy())
    assert isinstance(lazy, pl.LazyFrame)
    assert lazy.collect().select("x", "day").equals(frame)
    batch = frame.to_arrow().to_batches()[0]
    out = through(client, batch)
    assert isinstance(out, pa.RecordBatch)
    assert out.select(["x", "day"]).equals(batch)
    reader = through(client, frame.to_arrow().to_reader())
    assert isinstance(reader, pa.RecordBatchReader)
    assert reader.read_all().select(["x", "day"]).equals(frame.to_arrow())
    assert through(client, frame["x"]).columns == ["x", "prediction"]
    series = pd.Series([1.0, 2.0], index=["a", "b"], name="x")
    assert list(through(client, series).index) == ["a", "b"]


class Stream:
    """A table of a library that we do not know; it is read once."""

    def __init__(self, table: pa.Table) -> None:
        self._reader = table.to_reader()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._reader.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize("installed", [True, False])
def test_whatever_gives_an_arrow_stream_is_a_table(
    client: Client, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"x": [1.0, 2.0, None], "n": [2**60 + 1, None, 3]})
    stream = Stream(table)
    if not installed:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.warns(match="could not be scored"):
        out = through(client, stream)
    assert isinstance(out, pa.Table if installed else pl.DataFrame)
    assert pl.DataFrame(out)["n"].to_list() == [2**60 + 1, None, 3]


def test_a_nullable_integer_keeps_all_its_digits(client: Client) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0], "id": pd.array([2**60 + 1, None], dtype="Int64")})
    out = through(client, frame)
    assert out["id"].dtype == "Int64"
    assert out["id"][0] == 2**60 + 1
    assert out["id"][1] is pd.NA


def test_both_hours_of_the_night_when_clocks_go_back_stay_apart(client: Client) -> None:
    times = pd.to_datetime(["2026-10-25 00:30", "2026-10-25 01:30"]).tz_localize("UTC").tz_convert("Europe/Berlin")
    out = through(client, pd.DataFrame({"x": [1.0, 2.0], "at": times}))
    assert list(out["at"]) == list(times)


def test_what_does_not_fit_in_a_column_of_mixed_values_costs_its_records(client: Client) -> None:
    values = [1.5, "2.5", "dirty", None, 3, True, [1], dt.date(2026, 1, 1)]
    frame = pd.DataFrame({"x": pd.Series(values, dtype=object), "n": range(8)})
    with pytest.warns(match="4 of 8 rows"):
        out = through(client, frame)
    assert out["prediction"].notna().tolist() == [True, True, False, False, True, True, False, False]
    assert out["x"].tolist() == values
    job = next(client.jobs.list())
    assert {(error["record"], error["column"]) for error in job.errors()} >= {(2, "x"), (6, "x")}


@pytest.mark.parametrize(
    ("data", "column"),
    [
        (pd.DataFrame([[1.0, 2.0]], columns=["x", "x"]), "'x' appears more than once"),
        (pd.DataFrame([[1.0, 2.0]], columns=[1, "1"]), "'1' appears more than once"),
        (pd.DataFrame({"x": [1.0], "p": pd.period_range("2026", periods=1, freq="M")}), r"'p' holds period\[M\]"),
        (pd.DataFrame({"x": [1.0], "i": pd.interval_range(0, 1)}), "'i' holds interval"),
        (pd.DataFrame({"x": [1.0], "z": [1j]}), "'z' holds complex128"),
        (pa.table([[1.0], [2.0]], names=["x", "x"]), "'x' appears more than once"),
        (pd.DataFrame({"": [1.0], "x": [1.0]}), "empty or blank"),
        (pl.DataFrame({"": [1.0], "x": [1.0]}), "empty or blank"),
        (pa.table({"m": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}), "'m' holds month_day_nano_interval"),
        (pl.DataFrame({"a": pl.Series([[]], dtype=pl.Array(pl.Int8, 0))}), "'a' holds arrays without elements"),
        (np.zeros(1, [("x", "f4"), ("z", "c8")]), "'z' holds complex64"),
        (pd.DataFrame({"x": np.ones(1, np.longdouble)}), r"'x' holds float\d+, .*astype\(float\)"),
        (np.zeros(1, [("x", "f4"), ("z", np.longdouble)]), r"'z' holds float\d+"),
        (np.ma.array(np.zeros(1, [("x", "f4")]), mask=[(True,)]), "'x' has masked values: fill them"),
        (
            pa.table({"u": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])}),
            "'u' holds sparse_union",
        ),
        (np.array([["a", 1]], dtype=object), "Python objects.*DataFrame"),
        (np.ma.array([1, 2], mask=[True, False]), "masked values: fill them"),
        ([{"x": 1.0, "y": {1}}], "holds a set, which has no form in JSON"),
        ([pd.DataFrame({"x": [1.0]})], "holds a DataFrame.*one table"),
    ],
)
def test_a_column_that_cannot_be_sent_is_named(client: Client, data: Any, column: str) -> None:
    with pytest.raises(InvalidInput, match=column):
        client.submit(data, model="double")


def test_categories_of_any_kind_come_back_as_they_went(client: Client) -> None:
    kinds = {
        "intervals": pd.cut([0.0, 1.0, 2.0], 2),
        "months": pd.Categorical(pd.period_range("2026", periods=3, freq="M")),
        "of several types": pd.Categorical([1, "a", None]),
        "pairs": pd.Series([(1, 2), (3, 4), (1, 2)]).astype("category"),
    }
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0]} | kinds).rename_axis(columns="field")
    passes_pandas(client, frame)
    assert through(client, frame).columns.name == "field"


def test_half_of_a_pair_of_surrogates_does_not_cost_the_call(client: Client) -> None:
    passes_pandas(client, pd.DataFrame({"x": [0.0, 1.0], "text": pd.Series(["\ud800", "a"], dtype=object)}))


def test_columns_that_are_called_like_those_of_the_model_keep_their_values(client: Client) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0], "prediction": ["a", "b"], "input_prediction": pd.Categorical(["c", "d"])})
    out = through(client, frame)
    assert list(out.columns) == ["x", "input_input_prediction", "input_prediction", "prediction"]
    assert out["input_prediction"].dtype == "category"
    assert out["input_input_prediction"].tolist() == ["a", "b"]
    assert out["prediction"].tolist() == pytest.approx([2, 4], abs=1e-4)


def test_arrays_of_fixed_shape_come_back(client: Client) -> None:
    shapes = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8, dtype="f4").reshape(2, 2, 2))
    table = pa.table({"x": [1.0, 2.0], "shape": shapes})
    assert through(client, table).select(table.column_names).equals(table)


def test_records_may_hold_what_numpy_and_the_standard_library_compute(client: Client) -> None:
    at = dt.datetime(2026, 1, 1)  # noqa: DTZ001 - as many records hold them
    record = {"x": np.float32(1.5), "at": at, "price": decimal.Decimal("1.10"), "none": pd.NA, "list": np.arange(2)}
    (out,) = client.predict([record], model="double")
    assert out["prediction"] == pytest.approx(3, abs=1e-4)
    assert (out["at"], out["price"], out["none"]) == ("2026-01-01T00:00:00", "1.10", None)


def test_records_with_numbers_that_json_does_not_have_cost_their_records_alone(client: Client) -> None:
    records: list[dict[str, Any]] = [
        {"x": float("nan"), "t": "a"},
        {"x": np.float32("nan"), "t": "b"},
        {"x": 1.0, "t": float("inf")},
    ]
    with pytest.warns(match="2 of 3 rows"):
        out = client.predict(records, model="double")
    assert [row["t"] for row in out] == ["a", "b", "Infinity"]
    assert out[2]["prediction"] == pytest.approx(2, abs=1e-4)
    assert {error["code"] for error in next(client.jobs.list()).errors()} == {"missing-value"}


def test_masked_floats_are_missing_values(client: Client) -> None:
    with pytest.warns(match="1 of 2 rows"):
        out = client.predict(np.ma.array([[1.0], [2.0]], mask=[[False], [True]]), model="double")
    assert out["prediction"].tolist() == pytest.approx([2, np.nan], nan_ok=True, abs=1e-4)


def test_only_what_passed_through_gets_its_type_again(client: Client) -> None:
    # `prediction` is a column of the input and one of the model.
    frame = pd.DataFrame({"x": [1.0, 2.0], "prediction": pd.Categorical(["a", "b"])})
    out = client.predict(frame, model="double", passthrough="all")
    assert out["input_prediction"].dtype == frame["prediction"].dtype
    assert out["prediction"].dtype.kind == "f"
    # Here the model takes it, so that only its own travels.
    taken = pd.DataFrame({"prediction": [1, 2], "n": pd.array([1, None], dtype="Int8")})
    out = client.predict(taken, model="double", columns={"x": "prediction"})
    assert list(out.columns) == ["n", "prediction"]
    assert out["n"].dtype == "Int8"
    assert out["prediction"].dtype.kind == "f"
    out = client.predict(frame, model="double", passthrough="none")
    assert out["prediction"].dtype.kind == "f"


def test_a_result_is_given_as_a_table_of_each_library(client: Client) -> None:
    frame = pl.DataFrame({"x": [1.0, None], "n": [2**60 + 1, None], "yes": [True, None]})
    job = client.submit(frame, model="double", passthrough="all").wait()
    table = job.result().to_arrow()
    assert table.select(["x", "n", "yes"]).to_pylist() == frame.to_dicts()
    out = job.result().to_pandas()
    assert [str(kind) for kind in out.dtypes[:3]] == ["float64", "Int64", "boolean"]
    assert out["n"][0] == 2**60 + 1
    assert pl.concat(job.result().iter_frames()).equals(job.result().to_polars())


def test_a_result_keeps_its_types_and_digits_in_another_format_with_types(client: Client) -> None:
    frame = pl.DataFrame({"x": [0.1, 1e300], "c": pl.Series([["a"], None], dtype=pl.List(pl.Categorical()))})
    frame = frame.with_columns(at=pl.lit("2026-01-01").str.to_datetime(time_zone="Europe/Berlin"))
    result = client.submit(frame, model="double", passthrough="all").wait().result()
    for format, read in (("parquet", pl.read_parquet), ("arrow", pl.read_ipc)):
        kept = read(result.read(format=format)).select(frame.columns)
        assert kept.equals(frame.cast({"c": pl.List(pl.String())}))


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet", "arrow"])
def test_a_frame_may_ask_for_any_format_of_its_result(client: Client, format: str) -> None:
    times = pd.date_range("2026-10-25", periods=2, freq="h", tz="Europe/Berlin")
    out = through(client, pd.DataFrame({"x": [1.0, 2.0], "at": times}, index=["a", "b"]), format=format)
    assert np.allclose(out["prediction"].astype(float), [2, 4], atol=1e-4)
    assert list(out.index) == ["a", "b"]
    if format in ("parquet", "arrow"):
        assert list(out["at"]) == list(times)


def test_a_long_table_travels_in_blocks_and_comes_back_in_order(client: Client) -> None:
    frame = pl.DataFrame({"x": np.arange(300_000.0), "text": pl.Series(range(300_000)).cast(pl.String)})
    content = content_of(frame)
    assert content.length is None
    assert len(list(content.blocks())) > 3
    assert list(content.blocks()) == list(content.blocks())
    out = through(client, frame)
    assert out.select("x", "text").equals(frame)
    assert np.allclose(out["prediction"], 2 * frame["x"], rtol=1e-5, atol=1e-3)
    assert through(client, frame.to_pandas())["text"].tolist() == frame["text"].to_list()


def test_a_table_that_is_read_once_is_not_sent_twice() -> None:
    table = pa.table({"x": np.arange(300_000.0), "y": np.arange(300_000.0), "z": np.arange(300_000.0)})
    assert content_of(table).repeatable
    assert not content_of(table.to_reader()).repeatable


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(frame=polars_frames())
def test_many_frames_of_polars_come_back_equal(client: Client, frame: pl.DataFrame) -> None:
    passes_polars(client, frame)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(frame=pandas_frames())
def test_many_frames_of_pandas_come_back_equal(client: Client, frame: pd.DataFrame) -> None:
    passes_pandas(client, frame)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(table=arrow_tables())
def test_many_tables_of_pyarrow_come_back_equal(client: Client, table: pa.Table) -> None:
    passes_arrow(client, table)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", frames.CASES)
@pytest.mark.usefixtures("client")
def test_ten_million_rows_take_less_than_a_gigabyte_of_the_client(server: str, case: str) -> None:
    figures = frames.measured(case, server, frames.ROWS)
    assert figures["peak_mb"] < 1000, figures
