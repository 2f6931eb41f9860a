"""No format loses a record: for any table and any limits, chunks hold all records once and in order."""

import csv
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchserve.domain import Chunk, ChunkLimits, Dialect, DType
from batchserve.formats import RESULT_FORMATS, Format, Part, Records, get_format
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import MOST_TOGETHER, PlanTask, plan_chunks
from batchserve.storage import Piece, open_storage
from batchserve.worker.limits import even_limits

Row = tuple[str | None, float | None, int | None]
TYPES: dict[str, DType] = {"te xt": "string", "x": "float64", "n": "int64"}
NAMES = list(TYPES)


@dataclass(frozen=True)
class Variety:
    """The choices of a writer."""

    delimiter: str
    newline: str
    blank_lines: bool
    wide: bool
    """Whether to quote, indent or escape everything, depending on the format."""
    group: int
    """Records of a row group or record batch."""


texts = st.text(alphabet=",;|\t\"'\n\r {}[]\\:aé漢😀\u2028", max_size=8) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)
rows = st.lists(
    st.tuples(
        st.none() | texts,
        st.none() | st.floats(allow_nan=False, allow_infinity=False),
        st.none() | st.integers(-(2**63), 2**63 - 1),
    ),
    max_size=40,
)
limits = st.builds(ChunkLimits, bytes=st.integers(1, 400), records=st.integers(1, 12))
varieties = st.builds(
    Variety,
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    blank_lines=st.booleans(),
    wide=st.booleans(),
    group=st.integers(1, 15),
)


def csv_bytes(table: list[Row], variety: Variety) -> bytes:
    text = io.StringIO()
    returns = any("\r" in (text or "") for text, *_ in table)  # which csv quotes where they end its lines only
    writer = csv.writer(
        text,
        delimiter=variety.delimiter,
        lineterminator=variety.newline,
        quoting=csv.QUOTE_ALL if variety.wide or returns else csv.QUOTE_MINIMAL,
    )
    writer.writerow(NAMES)
    for row in table:
        if variety.blank_lines:
            text.write(variety.newline)
        writer.writerow(row)
    return text.getvalue().encode()


def jsonl_bytes(table: list[Row], variety: Variety) -> bytes:
    blank = variety.newline if variety.blank_lines else ""
    lines = [json.dumps(dict(zip(NAMES, row, strict=True)), ensure_ascii=variety.wide) + blank for row in table]
    return variety.newline.join(lines).encode()


def json_bytes(table: list[Row], variety: Variety) -> bytes:
    array = [dict(zip(NAMES, row, strict=True)) for row in table]
    document = {"note": "]", "data": array, "count": len(table)} if variety.blank_lines else array
    return json.dumps(document, ensure_ascii=variety.wide, indent=2 if variety.wide else None).encode()


def arrow_table(table: list[Row]) -> pa.Table:
    types = [pa.large_string(), pa.float64(), pa.int64()]
    columns = zip(*table, strict=True) if table else [[], [], []]
    return pa.table([pa.array(list(c), t) for c, t in zip(columns, types, strict=True)], names=NAMES)


def parquet_bytes(table: list[Row], variety: Variety) -> bytes:
    file = io.BytesIO()
    pq.write_table(arrow_table(table), file, row_group_size=variety.group, use_dictionary=variety.wide)
    return file.getvalue()


def arrow_bytes(open_writer: Callable[..., Any]) -> Callable[[list[Row], Variety], bytes]:
    def written(table: list[Row], variety: Variety) -> bytes:
        file = io.BytesIO()
        whole = arrow_table(table)
        with open_writer(file, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=variety.group)
        return file.getvalue()

    return written


def matrix(table: list[Row]) -> np.ndarray:
    return np.array([[x or 0.0, float(n or 0)] for _, x, n in table]).reshape(len(table), 2)


def npy_bytes(table: list[Row], variety: Variety) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(matrix(table)) if variety.wide else matrix(table))
    return file.getvalue()


def npz_bytes(table: list[Row], variety: Variety) -> bytes:
    file = io.BytesIO()
    save = np.savez_compressed if variety.wide else np.savez
    save(file, a=matrix(table), b=np.array([n or 0 for _, _, n in table], np.int64))
    return file.getvalue()


WRITERS: dict[str, Callable[[list[Row], Variety], bytes]] = {
    "csv": csv_bytes,
    "jsonl": jsonl_bytes,
    "json": json_bytes,
    "parquet": parquet_bytes,
    "arrow": arrow_bytes(pa.ipc.new_file),
    "arrows": arrow_bytes(pa.ipc.new_stream),
    "npy": npy_bytes,
    "npz": npz_bytes,
}


def expected(name: str, table: list[Row]) -> list[Any]:
    """The table in the form of `listed`."""
    if name == "npy":
        return [tuple(row) for row in matrix(table).tolist()]
    if name == "npz":
        return [(*row, n or 0) for row, (_, _, n) in zip(matrix(table).tolist(), table, strict=True)]
    if name == "csv":  # the csv module writes nulls and empty texts alike
        return [(text or None, x, n) for text, x, n in table]
    return list(table)


def listed(name: str, records: Records) -> list[Any]:
    if isinstance(records, pl.DataFrame):
        assert records.columns == NAMES
        return [(text or None, x, n) for text, x, n in records.rows()] if name == "csv" else records.rows()
    if name == "npy":
        return [tuple(row) for row in records[""].tolist()]
    return [(*row, n) for row, n in zip(records["a"].tolist(), records["b"].tolist(), strict=True)]


def read(format: Format, source: BinaryIO, chunk: Chunk) -> Records:
    reading = format.read(source, chunk, TYPES)
    assert reading.errors == []
    return reading.records


def read_all(format: Format, source: BinaryIO, chunks: list[Chunk]) -> list[Any]:
    found: list[Any] = []
    for chunk in chunks:
        assert chunk.first_record == len(found)
        of_chunk = listed(format.name, read(format, source, chunk))
        assert len(of_chunk) == chunk.records
        found += of_chunk
    return found


def composed(pieces: list[Piece], objects: dict[str, bytes]) -> bytes:
    """The bytes that a storage composes from pieces."""
    return b"".join(p if isinstance(p, bytes) else objects[p.key][p.start : p.stop] for p in pieces)


def test_every_format_of_results_is_planned_here() -> None:
    assert set(WRITERS) == set(RESULT_FORMATS)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None)
@given(table=rows, limits=limits, variety=varieties)
def test_chunks_hold_every_record_once_and_in_order(
    name: str, table: list[Row], limits: ChunkLimits, variety: Variety
) -> None:
    format = get_format(name, Dialect(variety.delimiter))
    source = io.BytesIO(WRITERS[name](table, variety))
    chunks = list(format.plan(source, None, limits))

    if not name.startswith("arrow"):  # its chunks name the whole record batches that hold their records
        assert [a.stop for a in chunks[:-1]] == [b.start for b in chunks[1:]]
    assert all(chunk.records <= limits.records for chunk in chunks)
    assert all(chunk.records > 0 for chunk in chunks) or len(chunks) == 1
    assert read_all(format, source, chunks) == expected(name, table)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None)
@given(table=rows, limits=limits, other=limits, variety=varieties)
def test_planning_resumes_after_any_chunk(
    name: str, table: list[Row], limits: ChunkLimits, other: ChunkLimits, variety: Variety
) -> None:
    format = get_format(name, Dialect(variety.delimiter))
    source = io.BytesIO(WRITERS[name](table, variety))
    chunks = list(format.plan(source, None, limits))

    for number, chunk in enumerate(chunks, 1):
        assert list(format.plan(source, chunk, limits)) == chunks[number:]
    middle = len(chunks) // 2
    if middle:
        cut_again = list(format.plan(source, chunks[middle - 1], other))
        assert read_all(format, source, chunks[:middle] + cut_again) == expected(name, table)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None)
@given(table=rows, limits=limits, variety=varieties)
def test_assembled_parts_hold_every_record_once_and_in_order(
    name: str, table: list[Row], limits: ChunkLimits, variety: Variety
) -> None:
    format = get_format(name, Dialect(variety.delimiter))
    source = io.BytesIO(WRITERS[name](table, variety))
    objects: dict[str, bytes] = {}
    parts: list[Part] = []
    for number, chunk in enumerate(format.plan(source, None, limits)):
        records = read(format, source, chunk)
        part = format.write(records)
        assert part == format.write(records)
        alone = next(iter(format.plan(io.BytesIO(part), None, ChunkLimits())))
        assert listed(name, read(format, io.BytesIO(part), alone)) == listed(name, records)
        objects[str(number)] = part
        parts.append(Part(str(number), len(part), chunk.records))

    pieces = list(format.assemble(iter(parts), lambda key: io.BytesIO(objects[key]), len(table)))
    result = io.BytesIO(composed(pieces, objects))

    chunks = list(format.plan(result, None, ChunkLimits()))
    assert read_all(format, result, chunks) == expected(name, table)


class Trickle(io.BytesIO):
    """A source that returns fewer bytes than requested, like a network."""

    step = 7

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size, self.step) if size is not None and size > 0 else size)


@pytest.mark.parametrize("name", ["csv", "jsonl", "json"])
@settings(max_examples=25, deadline=None)
@given(table=rows, limits=limits, variety=varieties)
def test_chunks_do_not_depend_on_how_the_bytes_arrive(
    name: str, table: list[Row], limits: ChunkLimits, variety: Variety
) -> None:
    format = get_format(name, Dialect(variety.delimiter))
    data = WRITERS[name](table, variety)
    at_once = list(format.plan(io.BytesIO(data), None, limits))

    assert list(format.plan(Trickle(data), None, limits)) == at_once
    assert read_all(format, Trickle(data), at_once) == expected(name, table)


@pytest.mark.parametrize("name", [*RESULT_FORMATS, "zip"])
def test_half_of_the_records_is_half_of_the_way_in_every_format(name: str) -> None:
    source = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for record in range(40):
                archive.writestr(f"{record:02}.png", bytes(2000))
    else:
        plain = Variety(",", "\n", blank_lines=False, wide=False, group=4)
        source.write(WRITERS[name]([("abcd", 0.5, 10 + record) for record in range(40)], plain))
    format = get_format(name)
    chunks = list(format.plan(source, None, ChunkLimits(2**30, 4)))
    half = sum(chunk.records for chunk in chunks[:5])
    assert (len(chunks), half) == (10, 20)
    assert chunks[4].stop / format.end(source) == pytest.approx(0.5, abs=0.25)  # next to a header and a footer


@pytest.mark.parametrize(("megabytes", "chunks"), [(3, 1), (5, 2), (12, 2), (18, 2), (40, 4), (70, 8)])
def test_a_text_is_cut_into_even_chunks_that_processes_can_share(megabytes: int, chunks: int) -> None:
    line = b'{"a":0.123456789,"b":"0123456789"}\n'
    data = line * (megabytes * 2**20 // len(line))
    limits = even_limits(ChunkLimits(bytes=16 * 2**20, records=2**40), "jsonl", len(data))
    planned = list(get_format("jsonl").plan(io.BytesIO(data), None, limits))
    sizes = [chunk.stop - chunk.start for chunk in planned]
    assert (len(sizes), sum(sizes)) == (chunks, len(data))
    assert max(sizes) <= 16 * 2**20
    assert min(sizes) > 0.98 * max(sizes) or megabytes == 5  # 4 MiB are worth a chunk, what is left is the next one


@pytest.mark.parametrize(
    ("format", "size"), [("parquet", 16 * 2**20), ("csv", 2**20), ("csv", 2**62)], ids=["parquet", "small", "whole"]
)
def test_other_limits_stay_as_they_are(format: str, size: int) -> None:
    limits = ChunkLimits(bytes=size, records=1000)
    assert even_limits(limits, format, 100 * 2**20) == limits


def test_a_long_text_has_chunks_of_nearly_the_limit_that_many_numbers_of_processes_divide() -> None:
    limits = ChunkLimits(bytes=16 * 2**20, records=2**40)
    counts = []
    for megabytes in range(130, 4000, 130):
        even = even_limits(limits, "csv", megabytes * 2**20)
        assert 10 * 2**20 < even.bytes <= limits.bytes
        counts.append(round(megabytes * 2**20 / (even.bytes - 16 * 2**10)))
    assert all(count % 4 == 0 for count in counts)
    assert {12, 24, 32, 48, 96, 256} <= set(counts)


# --- several inputs --------------------------------------------------------------------------------------------------


def plan_of(inputs: list[Input], sizes: tuple[int, ...], limits: ChunkLimits, most: int, window: int) -> list[Chunk]:
    """The chunks of a job over these inputs, planned by calls of `most` chunks that see `window` inputs; after each
    call the planner remembers only its last chunk, as after a restart."""
    chunks: list[Chunk] = []
    while True:
        last = chunks[-1] if chunks else None
        number = 0 if last is None else last.input + (last.inputs if last.inputs > 1 else 0)
        after = last if last is not None and last.inputs == 1 else None
        bases = {chunk.input: chunk.first_record for chunk in reversed(chunks)}
        base = bases[number] if after else sum(chunk.records for chunk in chunks)
        stop = number + window
        if number == len(inputs):
            return chunks
        own, *further = inputs[number:stop]
        task = PlanTask(own, after, limits, most, number, base, tuple(further), sizes[number:stop], stop >= len(inputs))
        planned = plan_chunks(task)
        chunks += planned.chunks
        if planned.complete and stop >= len(inputs):
            return chunks


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 9), st.sampled_from([0, 30, 100])), min_size=1, max_size=90),
    records=st.integers(5, 40),
    format=st.sampled_from(["csv", "parquet"]),
    most=st.integers(1, 6),
)
def test_where_chunks_of_several_inputs_end_depends_on_the_inputs_alone(
    counts: list[int], records: int, format: str, most: int
) -> None:
    with TemporaryDirectory() as folder:
        storage = open_storage(folder)
        inputs, sizes = [], []
        for number, count in enumerate(counts):
            content = get_format(format).write(pl.DataFrame({"x": [float(record) for record in range(count)]}))
            with storage.create(f"inputs/{number:03}") as writer:
                writer.write(content)
                writer.commit()
            inputs.append(Input(folder, f"inputs/{number:03}", format, Dialect()))
            sizes.append(len(content))
        limits = ChunkLimits(bytes=2**20, records=records)
        whole = plan_of(inputs, tuple(sizes), limits, 2**62, len(inputs))
        assert plan_of(inputs, tuple(sizes), limits, most, 2 * MOST_TOGETHER) == whole
    starts = [0, *accumulate(chunk.records for chunk in whole)]
    assert [chunk.first_record for chunk in whole] == starts[:-1]
    assert starts[-1] == sum(counts)
    assert all(chunk.records <= records and chunk.inputs <= MOST_TOGETHER for chunk in whole)
    assert len({chunk.first_record for chunk in whole}) == len(whole)
