"""Parquet, Arrow, npy and npz: planned, read, written and assembled, checked by pyarrow and numpy."""

import datetime as dt
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchserve.domain import Chunk, ChunkLimits, RowError
from batchserve.errors import InvalidInput, InvalidOptions, SchemaMismatch, UnsupportedMedia
from batchserve.formats.arrow import ArrowFile, ArrowStream
from batchserve.formats.parquet import Parquet
from batchserve.formats.protocol import Format, Part, Records
from batchserve.formats.tensors import Npy, Npz
from batchserve.formats.wire import ipc, thrift
from batchserve.storage import open_storage

TABLES: list[Format] = [Parquet(), ArrowFile(), ArrowStream()]
ARROWS: list[Format] = [ArrowFile(), ArrowStream()]
ALL: list[Format] = [*TABLES, Npy(), Npz()]
LIMITS = [ChunkLimits(), ChunkLimits(records=7), ChunkLimits(bytes=2000), ChunkLimits(bytes=1)]
any_table = pytest.mark.parametrize("format", TABLES, ids=lambda format: format.name)
any_arrow = pytest.mark.parametrize("format", ARROWS, ids=lambda format: format.name)
any_format = pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)


def frame(rows: int, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    present = random.random(rows) > 0.2
    return pl.DataFrame(
        {
            "whole": random.integers(-9, 9, rows),
            "number": np.where(random.random(rows) < 0.1, np.nan, random.random(rows)),
            "text": pl.Series(["ü" * int(n) for n in random.integers(0, 6, rows)], dtype=pl.String),
            "flag": pl.Series((random.random(rows) > 0.5).tolist(), dtype=pl.Boolean),
            "day": pl.Series([dt.date(2024, 2, 29)] * rows, dtype=pl.Date),
            "gaps": pl.Series([float(i) if p else None for i, p in enumerate(present)], dtype=pl.Float32),
        },
    )


def records_of(format: Format, rows: int, seed: int = 0) -> Records:
    """Records that the format can hold."""
    if format.name == "npy":
        return {"": np.random.default_rng(seed).random((rows, 3))}
    return frame(rows, seed)


def plan(format: Format, source: BinaryIO, limits: ChunkLimits, after: Chunk | None = None) -> list[Chunk]:
    return list(format.plan(source, after, limits))


def read_table(format: Format, source: BinaryIO, chunk: Chunk, **options: Any) -> pl.DataFrame:
    records = format.read(source, chunk, options.pop("types", {}), **options).records
    assert isinstance(records, pl.DataFrame)
    return records


def read_all(format: Format, source: BinaryIO, limits: ChunkLimits) -> pl.DataFrame:
    return pl.concat([read_table(format, source, chunk) for chunk in plan(format, source, limits)])


def tensors(format: Format, source: BinaryIO, chunk: Chunk) -> dict[str, np.ndarray]:
    records = format.read(source, chunk, {}).records
    assert isinstance(records, dict)
    return records


def assembled(format: Format, frames: Sequence[Records], folder: Path, records: int) -> Path:
    """The file that a folder storage composes from parts with these records."""
    storage = open_storage(str(folder))
    parts = []
    for number, part in enumerate(frames):
        data = format.write(part)
        with storage.create(f"results/{number}") as writer:
            writer.write(data)
            writer.commit()
        count = len(part) if isinstance(part, pl.DataFrame) else len(next(iter(part.values())))
        parts.append(Part(f"results/{number}", len(data), count))
    storage.compose("results/whole", format.assemble(iter(parts), storage.open, records))
    with storage.open("results/whole") as source:
        return Path(source.name)


def assert_contiguous(chunks: list[Chunk], records: int) -> None:
    assert chunks[0].first_record == 0
    assert all(a.first_record + a.records == b.first_record for a, b in pairwise(chunks))
    assert chunks[-1].first_record + chunks[-1].records == records


# Promises of all formats


@any_format
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_chunks_cover_every_record_once_and_in_order(format: Format, limits: ChunkLimits) -> None:
    source = io.BytesIO(format.write(records_of(format, 100)))
    chunks = plan(format, source, limits)
    assert_contiguous(chunks, 100)
    assert all(0 < chunk.records <= limits.records for chunk in chunks)


@any_format
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_planning_resumes_after_any_chunk(format: Format, limits: ChunkLimits) -> None:
    source = io.BytesIO(format.write(records_of(format, 100)))
    chunks = plan(format, source, limits)
    for number, chunk in enumerate(chunks):
        assert plan(format, source, limits, after=chunk) == chunks[number + 1 :]


@any_format
def test_a_chunk_can_be_halved(format: Format) -> None:
    source = io.BytesIO(format.write(records_of(format, 100)))
    before, chunk, *_ = plan(format, source, ChunkLimits(records=20))
    halves = plan(format, source, ChunkLimits(records=10), after=before)[:2]
    assert [half.records for half in halves] == [10, 10]
    assert halves[0].first_record == chunk.first_record


@any_format
def test_an_input_without_records_is_one_empty_chunk(format: Format) -> None:
    source = io.BytesIO(format.write(records_of(format, 0)))
    (chunk,) = plan(format, source, ChunkLimits())
    assert (chunk.first_record, chunk.records) == (0, 0)
    assert plan(format, source, ChunkLimits(), after=chunk) == []
    records = format.read(source, chunk, {}).records
    assert {name: len(records[name]) for name in (records.columns if isinstance(records, pl.DataFrame) else records)}
    assert all(len(records[n]) == 0 for n in (records.columns if isinstance(records, pl.DataFrame) else records))


@any_format
def test_the_same_records_give_the_same_bytes(format: Format) -> None:
    assert format.write(records_of(format, 50)) == format.write(records_of(format, 50))


@any_format
def test_parts_without_records_assemble_to_a_file_without_records(format: Format, tmp_path: Path) -> None:
    path = assembled(format, [records_of(format, 0)] * 2, tmp_path, 0)
    with path.open("rb") as source:
        assert [chunk.records for chunk in plan(format, source, ChunkLimits())] == [0]


@any_format
def test_a_missing_part_is_detected(format: Format, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 21 records.*got 20"):
        assembled(format, [records_of(format, 10)] * 2, tmp_path, 21)


@any_format
def test_an_input_that_is_cut_off_is_refused(format: Format) -> None:
    data = format.write(records_of(format, 1000))
    for quarter in range(4):
        with pytest.raises((InvalidInput, UnsupportedMedia)):
            exhaust(format, data[: len(data) * quarter // 4])
    with pytest.raises(InvalidInput):
        exhaust(format, data[:-9])


@any_format
def test_noise_behind_the_magic_is_refused(format: Format) -> None:
    data = format.write(records_of(format, 1000))
    random = np.random.default_rng(1)
    for _ in range(20):
        with pytest.raises((InvalidInput, UnsupportedMedia)):
            exhaust(format, data[:8] + random.bytes(len(data) - 18) + data[-10:])


@any_format
def test_damaged_bytes_never_raise_anything_but_invalid_input(format: Format) -> None:
    """Damage in the values themselves can go undetected, because no format here has mandatory checksums."""
    data = bytearray(format.write(records_of(format, 40)))
    random = np.random.default_rng(2)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] = random.integers(256)
        try:
            exhaust(format, bytes(damaged))
        except (InvalidInput, UnsupportedMedia, SchemaMismatch):
            refused += 1
    assert refused > 0


def exhaust(format: Format, data: bytes) -> None:
    """Header, plan and all chunks, of which there may be many more than records when lengths lie."""
    source = io.BytesIO(data)
    format.header(source)
    for _, chunk in zip(range(50), format.plan(source, None, ChunkLimits()), strict=False):
        format.read(source, chunk, {})


# Tables


@any_table
def test_a_header_has_names_types_and_a_sample(format: Format) -> None:
    whole = frame(300)
    header = format.header(io.BytesIO(format.write(whole)))
    assert header.columns == dict(whole.schema)
    assert isinstance(header.sample, pl.DataFrame)
    assert header.sample.equals(whole[:100])


@any_table
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_chunks_hold_what_was_written(format: Format, limits: ChunkLimits) -> None:
    assert read_all(format, io.BytesIO(format.write(frame(100))), limits).equals(frame(100))


@any_table
def test_only_the_columns_asked_for_are_kept_in_file_order(format: Format) -> None:
    source = io.BytesIO(format.write(frame(10)))
    (chunk,) = plan(format, source, ChunkLimits())
    assert read_table(format, source, chunk, columns=["gaps", "whole", "unknown"]).columns == ["whole", "gaps"]


@any_table
def test_values_that_do_not_fit_are_null_and_an_error_with_their_record(format: Format) -> None:
    source = io.BytesIO(format.write(pl.DataFrame({"x": ["1", "2", "three", "4", None]})))
    _, chunk, _ = plan(format, source, ChunkLimits(records=2))
    reading = format.read(source, chunk, {"x": "float32"})
    assert isinstance(reading.records, pl.DataFrame)
    assert reading.records["x"].to_list() == [None, 4.0]
    assert reading.records.schema == {"x": pl.Float32}
    assert reading.errors == [RowError(0, "wrong-type", "expected float32, got 'three'", "x")]


@any_table
def test_a_column_of_lists_for_a_number_names_the_column(format: Format) -> None:
    source = io.BytesIO(format.write(pl.DataFrame({"x": [[1.0], [2.0]]})))
    (chunk,) = plan(format, source, ChunkLimits())
    with pytest.raises(SchemaMismatch, match=r"column 'x': expected float32, got List\(Float64\)"):
        format.read(source, chunk, {"x": "float32"})


@any_table
def test_tensors_cannot_be_a_table(format: Format) -> None:
    with pytest.raises(InvalidOptions, match="npz"):
        format.write({"x": np.zeros((2, 2))})


@any_table
def test_categories_become_strings(format: Format) -> None:
    whole = pl.DataFrame({"c": ["x", None, "y"]}, schema={"c": pl.Categorical})
    source = io.BytesIO(format.write(whole))
    assert format.header(source).columns == {"c": pl.String()}
    assert read_all(format, source, ChunkLimits(records=1)).rows() == [("x",), (None,), ("y",)]


@any_table
def test_parts_of_different_columns_are_refused(format: Format, tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch, match="results/1"):
        assembled(format, [frame(3), frame(3).drop("day")], tmp_path, 6)


@any_table
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_assembled_parts_are_the_concatenation(format: Format, rows: list[int]) -> None:
    frames = [frame(count, seed) for seed, count in enumerate(rows)]
    whole = pl.concat(frames)
    with tempfile.TemporaryDirectory() as folder:
        path = assembled(format, frames, Path(folder), whole.height)
        with path.open("rb") as source:
            assert read_all(format, source, ChunkLimits(records=64)).equals(whole)
        foreign = pyarrow_table(format, path)
    foreign.validate(full=True)
    from_pyarrow = pl.from_arrow(foreign)
    assert isinstance(from_pyarrow, pl.DataFrame)
    assert from_pyarrow.equals(whole)


def pyarrow_table(format: Format, path: Path) -> pa.Table:
    match format.name:
        case "parquet":
            return pq.read_table(path)
        case "arrow":
            return pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
        case _:
            return pa.ipc.open_stream(pa.py_buffer(path.read_bytes())).read_all()


# Parquet


def test_assembled_row_groups_are_those_of_the_parts(tmp_path: Path) -> None:
    frames = [frame(10), frame(0), frame(200, 1), frame(1, 2)]
    path = assembled(Parquet(), frames, tmp_path, 211)
    file = pq.ParquetFile(path)
    assert (file.metadata.num_rows, file.num_row_groups) == (211, 3)
    for number, part in enumerate([frames[0], frames[2], frames[3]]):
        group = pl.from_arrow(file.read_row_group(number))
        assert isinstance(group, pl.DataFrame)
        assert group.equals(part)
        for column in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(number).column(column)
            assert not chunk.has_offset_index
            assert not chunk.has_column_index


def test_statistics_of_assembled_row_groups_filter_by_predicates(tmp_path: Path) -> None:
    frames = [pl.DataFrame({"x": range(start, start + 100)}) for start in (0, 100, 200)]
    path = assembled(Parquet(), frames, tmp_path, 300)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).column(0).statistics.max for i in range(3)] == [99, 199, 299]
    assert pl.scan_parquet(path).filter(pl.col("x") >= 195).collect()["x"].to_list() == list(range(195, 300))
    assert pq.read_table(path, filters=[("x", "==", 150)]).to_pydict() == {"x": [150]}


def test_a_footer_written_back_is_the_same() -> None:
    for rows in (0, 100):
        data = Parquet().write(frame(rows).with_columns(l=[1, 2, 3]))
        footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
        assert thrift.dump(thrift.load(footer)) == footer
    buffer = io.BytesIO()
    pq.write_table(frame(1000).to_arrow(), buffer, row_group_size=30, sorting_columns=[pq.SortingColumn(0)])
    data = buffer.getvalue()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert thrift.dump(thrift.load(footer)) == footer


def test_foreign_parquet_parts_with_bloom_filters_and_page_indexes_assemble(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    parts = []
    for number in range(3):
        buffer = io.BytesIO()
        pq.write_table(frame(100, number).to_arrow(), buffer, row_group_size=40, write_page_index=True)
        with storage.create(f"{number}") as writer:
            writer.write(buffer.getvalue())
            writer.commit()
        parts.append(Part(f"{number}", len(buffer.getvalue()), 100))
    storage.compose("whole", Parquet().assemble(parts, storage.open, 300))
    with storage.open("whole") as source:
        assert pq.read_metadata(source).num_row_groups == 9
        assert read_all(Parquet(), source, ChunkLimits()).equals(pl.concat([frame(100, i) for i in range(3)]))


def test_the_sample_of_a_parquet_file_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    """All scoring processes need the columns; only the check of an input needs values, and unpacks pages."""
    path = tmp_path / "damaged.parquet"
    frame(100).write_parquet(path)
    damaged = bytearray(path.read_bytes())
    damaged[4:40] = bytes(36)
    path.write_bytes(damaged)
    with path.open("rb") as source:
        header = Parquet().header(source)
    assert header.columns == dict(frame(100).schema)
    with pytest.raises(InvalidInput, match="cannot be read"):
        _ = header.sample


def test_the_sample_of_a_parquet_file_holds_its_first_records(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    frame(300).write_parquet(path)
    with path.open("rb") as source:
        sample = Parquet().header(source).sample
    assert isinstance(sample, pl.DataFrame)
    assert sample.equals(frame(300)[:100])


def test_chunks_prefer_the_borders_of_row_groups() -> None:
    buffer = io.BytesIO()
    frame(100).write_parquet(buffer, row_group_size=30)
    assert [c.records for c in plan(Parquet(), buffer, ChunkLimits(records=70))] == [60, 40]
    assert [c.records for c in plan(Parquet(), buffer, ChunkLimits(records=20))] == [20, 10, 20, 10, 20, 20]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with b''"),
        (b"PAR1" + bytes(100), "cut off: at its end, byte 104"),
        (b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "claims 2147483647 of 112 bytes"),
        (b"PAR1" + bytes(100) + b"\x04\0\0\0PARE", "encrypted"),
        (b"PAR1" + b"\x19" * 100 + b"\x64\0\0\0PAR1", "damaged"),
    ],
)
def test_a_refused_parquet_says_why(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Parquet().header(io.BytesIO(data))


@pytest.mark.slow
def test_a_slice_of_a_giant_row_group_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "giant.parquet"
    rows = 2_000_000
    pl.DataFrame({f"c{i}": np.random.default_rng(i).random(rows) for i in range(10)}).write_parquet(
        path, compression="uncompressed", row_group_size=rows
    )
    assert path.stat().st_size > 150 * 2**20
    assert growth_while_reading("parquet", "Parquet", path) < 80


def growth_while_reading(module: str, format: str, path: Path) -> int:
    """The growth of the peak memory, in MiB, of a process that reads three chunks of 10,000 records far apart."""
    script = f"""
import resource
from batchserve.domain import ChunkLimits
from batchserve.formats.{module} import {format}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

format = {format}()
with open({str(path)!r}, "rb") as source:
    chunks = list(format.plan(source, None, ChunkLimits(records=10_000)))
    before = peak()
    for place in (0, len(chunks) // 2, -1):
        assert len(format.read(source, chunks[place], {{}}).records) > 0
print(peak() - before)
"""
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout)


# Arrow


def foreign(table: pa.Table, format: Format, rows: int | None = None, **options: Any) -> io.BytesIO:
    """The table as pyarrow writes it, in record batches of that many rows."""
    buffer = io.BytesIO()
    new = pa.ipc.new_file if format.name == "arrow" else pa.ipc.new_stream
    with new(buffer, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return buffer


@any_arrow
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("rows", [3, 40, 1000])
def test_foreign_batches_of_any_size_are_read(format: Format, compression: str | None, rows: int) -> None:
    source = foreign(frame(200).to_arrow(), format, rows, compression=compression)
    for limits in LIMITS[:3]:
        assert read_all(format, source, limits).equals(frame(200))


ODD_COLUMNS = {
    "null": pa.nulls(50),
    "text": pa.array([None if i % 7 == 0 else "x" * i for i in range(50)]),
    "view": pa.array([None if i % 5 == 0 else "y" * i for i in range(50)], pa.string_view()),
    "bytes": pa.array([b"z" * i for i in range(50)], pa.large_binary()),
    "fixed": pa.array([b"%03d" % i for i in range(50)], pa.binary(3)),
    "decimal": pa.array([None, *range(1, 50)], pa.decimal128(10, 2)),
    "time": pa.array(range(50), pa.time64("ns")),
    "date": pa.array([i * 86_400_000 for i in range(50)], pa.date64()),
    "moment": pa.array(range(50), pa.timestamp("ms", "UTC")),
    "span": pa.array(range(50), pa.duration("us")),
    "half": pa.array(np.arange(50, dtype=np.float16)),
    "flag": pa.array([None if i % 11 == 0 else i % 2 == 0 for i in range(50)]),
    "small": pa.array(range(50), pa.uint8()),
    "category": pa.array([f"c{i % 4}" for i in range(50)]).dictionary_encode(),
    "list": pa.array([list(range(i % 4)) for i in range(50)]),
    "struct": pa.array([{"a": i, "b": str(i)} for i in range(50)]),
}


@any_arrow
@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_slices_of_a_large_batch_hold_its_rows(format: Format, name: str) -> None:
    table = pa.table({"first": range(50), name: ODD_COLUMNS[name], "last": [str(i) for i in range(50)]})
    source = foreign(table, format)
    whole = read_all(format, source, ChunkLimits())
    assert whole["last"].to_list() == [str(i) for i in range(50)]
    for records in (1, 7, 8, 13):
        chunks = plan(format, source, ChunkLimits(records=records))
        assert len({(chunk.start, chunk.stop) for chunk in chunks}) == 1
        assert pl.concat([read_table(format, source, chunk) for chunk in chunks]).equals(whole)


@any_arrow
def test_chunks_that_are_slices_follow_smaller_batches(format: Format) -> None:
    sizes = [3, 2, 50, 0, 4, 1]
    whole = frame(sum(sizes))
    batches: list[pa.RecordBatch] = []
    for size in sizes:
        done = sum(batch.num_rows for batch in batches)
        batches += whole[done : done + size].to_arrow().to_batches() or [
            pa.RecordBatch.from_pylist([], whole.to_arrow().schema)
        ]
    buffer = io.BytesIO()
    new = pa.ipc.new_file if format.name == "arrow" else pa.ipc.new_stream
    with new(buffer, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    limits = ChunkLimits(records=20)
    chunks = plan(format, buffer, limits)
    assert [chunk.records for chunk in chunks] == [5, 20, 20, 10, 5]
    for number, chunk in enumerate(chunks):
        assert plan(format, buffer, limits, after=chunk) == chunks[number + 1 :]
    assert read_all(format, buffer, limits).equals(whole)


def test_a_slice_of_a_giant_batch_takes_little_memory(tmp_path: Path) -> None:
    rows = 2_000_000
    table = pa.table({f"c{i}": np.random.default_rng(i).random(rows) for i in range(10)})
    path = tmp_path / "giant.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert path.stat().st_size > 150 * 2**20
    assert growth_while_reading("arrow", "ArrowFile", path) < 50


def test_dictionaries_that_are_replaced_in_a_stream_apply_from_there_on() -> None:
    words = [["a", "b"], ["x", "y", "z"], ["q"]]
    schema = pa.schema([("d", pa.dictionary(pa.int32(), pa.string()))])
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, schema) as writer:
        for values in words:
            column = pa.DictionaryArray.from_arrays(pa.array(range(len(values)), pa.int32()), values)
            writer.write_batch(pa.record_batch([column], schema=schema))
    for limits in (ChunkLimits(), ChunkLimits(records=1), ChunkLimits(records=2), ChunkLimits(records=4)):
        assert read_all(ArrowStream(), buffer, limits)["d"].to_list() == ["a", "b", "x", "y", "z", "q"]


def test_delta_dictionaries_are_refused() -> None:
    schema = pa.schema([("d", pa.dictionary(pa.int32(), pa.string()))])
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for values in (["a"], ["a", "b"]):
            column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), values)
            writer.write_batch(pa.record_batch([column], schema=schema))
    with pytest.raises(InvalidInput, match="delta dictionary"):
        read_all(ArrowStream(), buffer, ChunkLimits())


def test_a_stream_may_end_without_its_end_mark() -> None:
    data = ArrowStream().write(frame(5))
    assert data.endswith(ipc.END)
    assert read_all(ArrowStream(), io.BytesIO(data[:-8]), ChunkLimits()).equals(frame(5))


def test_a_stream_that_is_cut_off_names_the_byte() -> None:
    data = ArrowStream().write(frame(500))
    with pytest.raises(InvalidInput, match=f"cut off at byte {len(data) - 100}"):
        plan(ArrowStream(), io.BytesIO(data[:-100]), ChunkLimits())


@any_arrow
def test_messages_from_before_arrow_0_15_are_refused(format: Format) -> None:
    source = foreign(frame(5).to_arrow(), format, use_legacy_format=True)
    with pytest.raises(InvalidInput, match=r"before Arrow 0\.15"):
        format.header(source)


def test_a_large_compressed_batch_is_refused_with_the_rows_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "BODY_LIMIT", 1000)
    source = foreign(frame(1000).to_arrow(), ArrowStream(), compression="lz4")
    with pytest.raises(InvalidInput, match=r"write record batches of at most \d+ rows"):
        ArrowStream().header(source)


def test_a_compressed_buffer_that_claims_terabytes_is_refused() -> None:
    data = bytearray(foreign(pa.table({"x": np.zeros(1000)}), ArrowStream(), compression="zstd").getvalue())
    claim = data.index((8000).to_bytes(8, "little") + b"\x28\xb5\x2f\xfd")
    data[claim : claim + 8] = (2**42).to_bytes(8, "little")
    with pytest.raises(InvalidInput, match="4398046511104 bytes"):
        ArrowStream().header(io.BytesIO(data))


def test_an_assembled_file_gives_every_batch_by_number(tmp_path: Path) -> None:
    frames = [frame(10), frame(0), frame(200, 1), frame(1, 2)]
    path = assembled(ArrowFile(), frames, tmp_path, 211)
    file = pa.ipc.open_file(path)
    assert file.num_record_batches == 3
    for number, part in enumerate([frames[0], frames[2], frames[3]]):
        batch = pl.from_arrow(file.get_batch(number))
        assert isinstance(batch, pl.DataFrame)
        assert batch.equals(part)
    assert pl.read_ipc(path).equals(pl.concat(frames))
    assert pl.scan_ipc(path).select("text").collect().height == 211


def test_an_assembled_file_is_a_stream_behind_its_magic(tmp_path: Path) -> None:
    path = assembled(ArrowFile(), [frame(10).drop("number"), frame(20).drop("number")], tmp_path, 30)
    assert pa.ipc.open_stream(path.read_bytes()[8:]).read_all() == pa.ipc.open_file(path).read_all()


# npy and npz


def saved(array: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer


def zipped(compressed: bool = False, **arrays: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer


ARRAYS = [
    np.arange(30.0),
    np.arange(60, dtype=np.int16).reshape(30, 2),
    np.asfortranarray(np.arange(90.0).reshape(30, 3)),
    np.asfortranarray(np.arange(30 * 24, dtype=np.int32).reshape(30, 2, 3, 4)),
    np.arange(30 * 24, dtype=np.float32).reshape(30, 2, 3, 4),
    np.arange(30, dtype=">f8"),
    np.array([f"é{i}" for i in range(30)]),
    np.arange(30) % 2 == 0,
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_ranges_of_an_array_are_its_slices(array: np.ndarray) -> None:
    source = saved(array)
    chunks = plan(Npy(), source, ChunkLimits(records=7))
    assert [chunk.records for chunk in chunks] == [7, 7, 7, 7, 2]
    for chunk in chunks:
        part = tensors(Npy(), source, chunk)[""]
        np.testing.assert_array_equal(part, array[chunk.start : chunk.stop])
        assert part.dtype.isnative


@pytest.mark.parametrize("compressed", [False, True])
def test_ranges_of_all_arrays_of_an_archive_are_their_slices(compressed: bool) -> None:
    arrays = {f"a{i}": array for i, array in enumerate(ARRAYS)} | {"scalar": np.float32(3.5)}
    source = zipped(compressed, **arrays)
    for chunk in plan(Npz(), source, ChunkLimits(records=11)):
        part = tensors(Npz(), source, chunk)
        assert list(part) == list(arrays)
        assert part["scalar"] == np.float32(3.5)
        for name in part.keys() - {"scalar"}:
            np.testing.assert_array_equal(part[name], arrays[name][chunk.start : chunk.stop])


def test_bytes_of_an_array_limit_a_chunk() -> None:
    source = saved(np.zeros((100, 4), np.float32))
    assert [chunk.records for chunk in plan(Npy(), source, ChunkLimits(bytes=16 * 40))] == [40, 40, 20]


def test_the_header_of_arrays_is_a_sample() -> None:
    header = Npy().header(saved(np.arange(300.0)))
    assert header.columns == {}
    assert isinstance(header.sample, dict)
    np.testing.assert_array_equal(header.sample[""], np.arange(100.0))


def test_a_structured_array_is_a_table() -> None:
    array = np.array([(1, 2.5, b"x"), (2, 3.5, b"y")], dtype=[("ganz", ">i4"), ("größe 数", "f8"), ("t", "S3")])
    with pytest.warns(UserWarning, match="format 3"):
        source = saved(array)
    assert Npy().header(source).columns == {"ganz": pl.Int32(), "größe 数": pl.Float64(), "t": pl.String()}
    _, chunk = plan(Npy(), source, ChunkLimits(records=1))
    got = read_table(Npy(), source, chunk, types={"ganz": "float32"})
    assert got.rows() == [(2.0, 3.5, "y")]
    assert got.schema["ganz"] == pl.Float32()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(1.0), "without axes"),
        (np.array([{}]), "Python objects"),
        (np.array([1j]), "complex128"),
        (np.array(["2024-01-01"], "M8[D]"), "datetime64"),
        (np.zeros((5, 0)), "no value"),
        (np.zeros(2, [("x", "f4", 3)]), "expected numbers"),
    ],
)
def test_a_refused_array_says_why(array: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Npy().header(saved(array))


def with_member(name: str, data: bytes = b"") -> io.BytesIO:
    buffer = zipped(x=np.zeros(3))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, data)
    return buffer


def refused_archives() -> Iterator[tuple[io.BytesIO, str]]:
    yield zipped(a=np.zeros(3), b=np.zeros(4)), "a: 3, b: 4"
    yield zipped(a=np.float64(3)), "record axis"
    yield with_member("readme.txt"), "readme.txt"
    yield with_member("../x.npy"), "unsafe name"
    yield with_member("/x.npy"), "unsafe name"
    yield with_member("a\\x.npy"), "unsafe name"
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = with_member("x.npy")
    yield twice, "two members"
    yield zipped(compressed=True, a=np.zeros(9 * 2**20)), "more than 50"
    yield zipped(a=np.array([{}])), "Python objects"
    encrypted = bytearray(zipped(a=np.zeros(3)).getvalue())
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    yield io.BytesIO(bytes(encrypted)), "encrypted"
    yield io.BytesIO(b"PK\3\4 and no more"), "damaged or cut off"


def test_a_refused_archive_says_why() -> None:
    for source, message in refused_archives():
        with pytest.raises(InvalidInput, match=message):
            plan(Npz(), source, ChunkLimits())


def test_a_table_becomes_a_matrix_of_floats() -> None:
    mixed = pl.DataFrame({"a": [1, None], "b": [True, False], "c": [0.5, 1.5]})
    np.testing.assert_array_equal(np.load(io.BytesIO(Npy().write(mixed))), np.array([[1, 1, 0.5], [np.nan, 0, 1.5]]))
    small = np.load(io.BytesIO(Npy().write(pl.DataFrame({"p": [0.25, None]}, schema={"p": pl.Float32}))))
    assert (small.dtype, small.shape) == (np.dtype(np.float32), (2,))


def test_text_in_npy_is_refused_with_what_to_ask_for() -> None:
    for records in (frame(3), {"": np.array(["x"])}, {"": np.array(["x"], object)}):
        with pytest.raises(InvalidOptions, match="format=npz"):
            Npy().write(records)
    with pytest.raises(InvalidOptions, match="one array"):
        Npy().write({"a": np.zeros(1), "b": np.zeros(1)})


@pytest.mark.parametrize("array", ARRAYS[:5], ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_an_assembled_array_is_the_concatenation(array: np.ndarray, tmp_path: Path) -> None:
    parts: list[Records] = [{"": array[:10]}, {"": array[10:10]}, {"": array[10:]}]
    whole = np.load(assembled(Npy(), parts, tmp_path, 30))
    np.testing.assert_array_equal(whole, array)
    assert whole.dtype == array.dtype.newbyteorder("<")


def test_arrays_of_different_shape_are_not_assembled(tmp_path: Path) -> None:
    for format in (Npy(), Npz()):
        with pytest.raises(SchemaMismatch, match="results/1"):
            assembled(format, [{"": np.zeros((2, 3))}, {"": np.zeros((2, 4))}], tmp_path / format.name, 4)


def test_an_assembled_archive_holds_the_concatenation_of_each_array(tmp_path: Path) -> None:
    parts: list[Records] = [
        {"label": np.array(["a", "b"], object), "p/x": np.array([[1, 2], [3, 4]], np.float32), "n": np.array([1, 2])},
        {"label": np.array([], object), "p/x": np.zeros((0, 2), np.float32), "n": np.array([], int)},
        {"label": np.array(["longer"], object), "p/x": np.array([[5, 6]], np.float32), "n": np.array([np.nan])},
    ]
    path = assembled(Npz(), parts, tmp_path, 3)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    whole = np.load(path)
    assert whole["label"].tolist() == ["a", "b", "longer"]
    np.testing.assert_array_equal(whole["p/x"], np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    np.testing.assert_array_equal(whole["n"], np.array([1, 2, np.nan]))


def test_an_archive_of_a_table_has_an_array_for_each_column() -> None:
    whole = frame(20)
    arrays = np.load(io.BytesIO(Npz().write(whole)))
    assert list(arrays) == whole.columns
    np.testing.assert_array_equal(arrays["whole"], whole["whole"].to_numpy())
    np.testing.assert_array_equal(arrays["gaps"], whole["gaps"].fill_null(float("nan")).to_numpy())
    assert arrays["text"].tolist() == whole["text"].to_list()
    assert arrays["day"][0] == "2024-02-29"


def test_an_archive_with_names_beyond_ascii_is_read_back() -> None:
    source = io.BytesIO(Npz().write({"größe": np.arange(3.0)}))
    assert list(np.load(source)) == ["größe"]
    (chunk,) = plan(Npz(), source, ChunkLimits())
    assert tensors(Npz(), source, chunk)["größe"].tolist() == [0.0, 1.0, 2.0]
