"""A storage whose objects are no files: of each, a chunk fetches what it needs, and the answers are the same."""

import io
import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import graphs
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from bench import Bench, opened
from hand import HandEngine
from remote import RemoteStorage
from uuid_utils import uuid7

from batchserve.domain import ChunkLimits, JobState
from batchserve.errors import InvalidInput
from batchserve.formats import get_format
from batchserve.formats.wire import thrift
from batchserve.scoring import inputs
from batchserve.storage import input_key
from batchserve.storage.ranged import RangedReader

RECORDS = 10_000


@pytest.fixture
def remote(tmp_path: Path) -> RemoteStorage:
    return RemoteStorage(str(tmp_path / "remote"))


def put(storage: RemoteStorage, data: bytes, key: str = "inputs/1") -> RangedReader:
    with storage.create(key) as writer:
        writer.write(data)
        writer.commit()
    source = storage.open(key)
    assert isinstance(source, RangedReader)
    return source


@cache
def table() -> pl.DataFrame:
    """Of all kinds of columns; the texts make most of the bytes."""
    chance = np.random.default_rng(1)
    return pl.DataFrame(
        {
            "work": np.arange(RECORDS, dtype=np.float32) % 3,
            "text": [chance.bytes(100).hex() for _ in range(RECORDS)],
            "pair": [{"x": number, "list": [number] * (number % 3)} for number in range(RECORDS)],
            "gaps": [None if number % 5 else number for number in range(RECORDS)],
        }
    )


def parquet(frame: pl.DataFrame, rows: int) -> bytes:
    file = io.BytesIO()
    frame.write_parquet(file, row_group_size=rows)
    return file.getvalue()


# --- the reader ------------------------------------------------------------------------------------------------------


def test_a_reader_reads_as_a_file_does(remote: RemoteStorage) -> None:
    data = random.Random(1).randbytes(1_000_000)
    source, file = put(remote, data), io.BytesIO(data)
    chance = random.Random(2)
    for _ in range(300):
        place = chance.randrange(1_100_000)
        assert source.seek(place) == file.seek(place)
        size = chance.choice((1, 30, 1000, 100_000, 300_000))
        assert source.read(size) == file.read(size)
        assert source.tell() == file.tell()
    for whence, place in ((os.SEEK_END, -10), (os.SEEK_SET, 5), (os.SEEK_CUR, 7)):
        assert source.seek(place, whence) == file.seek(place, whence)
        assert source.read() == file.read()
    with pytest.raises(OSError, match="Invalid argument"):
        source.seek(-1)


def test_a_reader_fetches_no_more_than_is_read(remote: RemoteStorage) -> None:
    source = put(remote, bytes(10_000_000))
    source.seek(0, os.SEEK_END)
    assert remote.fetched["inputs/1"] == 0
    source.seek(5_000_000)
    for _ in range(1000):
        source.read(8)
    small = remote.fetched["inputs/1"]
    assert 8000 <= small <= 200_000
    source.stored.read(1_000_000, 3_000_000)
    assert remote.fetched["inputs/1"] - small == 2_000_000


def test_a_small_reader_fetches_the_whole_once(remote: RemoteStorage) -> None:
    assert put(remote, b"abc").read() == b"abc"
    assert put(remote, b"").read() == b""
    assert remote.fetched["inputs/1"] == 3


# --- jobs ------------------------------------------------------------------------------------------------------------


@contextmanager
def scoring_from(storage: RemoteStorage | None) -> Iterator[None]:
    """Scoring reads from this storage; None: from the folder."""
    with pytest.MonkeyPatch.context() as patch:
        if storage is not None:
            patch.setattr(inputs, "open_storage", lambda _address: storage)
        inputs.storage_at.cache_clear()
        inputs.header_of.cache_clear()
        yield
    inputs.storage_at.cache_clear()
    inputs.header_of.cache_clear()


def score(bench: Bench, data: bytes, storage: RemoteStorage | None) -> tuple[str, bytes]:
    """The id and the result of a job whose scoring reads from a storage, in chunks of 100 records."""
    job_id = str(uuid7())
    stored = replace(bench.store(input_key(job_id), data), format="parquet")
    model = bench.register("busy", graphs.busy())
    bench.queue(job_id, model, [stored], format="parquet")
    hand = bench.by_hand(chunk_records=50)
    with scoring_from(storage):
        hand.work()
    hand.stop()
    job = bench.get(job_id)
    assert (job.state, job.chunks_total, job.rows_ok) == (JobState.COMPLETED, 100, RECORDS)
    return job_id, bench.result(job_id)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(100, id="a row group for each chunk", marks=pytest.mark.slow),
        pytest.param(RECORDS, id="one row group"),
    ],
)
def test_a_job_of_a_hundred_chunks_fetches_its_parquet_input_about_once(
    database_url: str, tmp_path: Path, rows: int
) -> None:
    data = parquet(table(), rows)
    with opened(database_url, tmp_path / "store", HandEngine()) as bench:
        _, expected = score(bench, data, None)
        storage = RemoteStorage(str(tmp_path / "store"))
        job_id, result = score(bench, data, storage)
    assert result == expected
    assert 0.5 * len(data) < storage.fetched[input_key(job_id)] < 1.5 * len(data)


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [ChunkLimits(records=200), ChunkLimits(records=1500), ChunkLimits(bytes=50_000)])
@pytest.mark.parametrize("writer", ["small groups", "one group", "page indexes", "plain", "no records"])
def test_slices_that_are_fetched_are_those_of_the_file(remote: RemoteStorage, writer: str, limits: ChunkLimits) -> None:
    frame = table().head(0 if writer == "no records" else 2000)
    file = io.BytesIO()
    match writer:
        case "page indexes":
            pq.write_table(frame.to_arrow(), file, row_group_size=1000, write_page_index=True, data_page_size=2000)
        case "plain":
            pq.write_table(frame.to_arrow(), file, row_group_size=700, use_dictionary=False, compression="none")
        case _:
            file.write(parquet(frame, 317 if writer == "small groups" else 2000))
    source, parquet_ = put(remote, file.getvalue()), get_format("parquet")
    assert parquet_.header(source).columns == parquet_.header(file).columns
    chunks = list(parquet_.plan(source, None, limits))
    assert chunks == list(parquet_.plan(file, None, limits))
    for chunk, columns in product(chunks, (None, ["text"], ["work", "pair"], ["gaps", "work"])):
        fetched, read = (parquet_.read(given, chunk, {}, columns).records for given in (source, file))
        assert isinstance(fetched, pl.DataFrame)
        assert isinstance(read, pl.DataFrame)
        assert fetched.equals(read)


def test_columns_that_are_not_wanted_are_not_fetched(remote: RemoteStorage) -> None:
    data = parquet(table(), RECORDS)
    source, format = put(remote, data), get_format("parquet")
    (chunk,) = format.plan(source, None, ChunkLimits())
    planned = remote.fetched["inputs/1"]
    format.read(source, chunk, {}, ["work"])
    assert remote.fetched["inputs/1"] - planned < 0.2 * len(data)


def test_what_a_header_shows_of_the_records_is_fetched_when_it_is_asked_for(remote: RemoteStorage) -> None:
    frame = table()
    data = parquet(frame, RECORDS)
    header = get_format("parquet").header(put(remote, data))
    known = remote.fetched["inputs/1"]
    assert known < 0.3 * len(data)
    sample = header.sample
    assert isinstance(sample, pl.DataFrame)
    assert sample.equals(frame.head(100))
    assert remote.fetched["inputs/1"] > known


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(9, (thrift.I64, 10**9), id="beyond the file"),
        pytest.param(9, (thrift.I64, -5), id="before the file"),
        pytest.param(7, (thrift.I64, -5), id="a negative size"),
        pytest.param(7, (thrift.BINARY, b"x"), id="a size that is no number"),
        pytest.param(14, (thrift.BINARY, b"x"), id="an offset that is no number"),
        pytest.param(3, (thrift.LIST, (thrift.BINARY, [])), id="no name"),
    ],
)
def test_a_footer_whose_columns_are_nowhere_is_refused(
    remote: RemoteStorage, field: int, value: tuple[int, object]
) -> None:
    data = parquet(table().head(10), 10)
    length = int.from_bytes(data[-8:-4], "little")
    footer = thrift.load(data[-8 - length : -8])
    footer[4][1][1][0][1][1][1][0][3][1][field] = value
    changed = thrift.dump(footer)
    source = put(remote, data[: -8 - length] + changed + len(changed).to_bytes(4, "little") + b"PAR1")
    format = get_format("parquet")
    (chunk,) = format.plan(source, None, ChunkLimits())
    with pytest.raises(InvalidInput, match="the footer of the Parquet file is damaged"):
        format.read(source, chunk, {}, ["work"])


def test_a_row_group_is_fetched_once_for_the_chunks_that_cut_it_and_kept_no_longer(remote: RemoteStorage) -> None:
    data = parquet(table(), RECORDS)
    source, format = put(remote, data), get_format("parquet")
    first, second, last = format.plan(source, None, ChunkLimits(records=4000))
    fetched = [remote.fetched["inputs/1"]]
    for chunk in (first, second, last, last):
        format.read(source, chunk, {})
        fetched.append(remote.fetched["inputs/1"])
    assert fetched[1] == fetched[2] == fetched[3]
    assert fetched[4] - fetched[3] == fetched[1] - fetched[0] > 0.9 * len(data)


# --- archives --------------------------------------------------------------------------------------------------------


def archive() -> bytes:
    """A hundred members of 200 KB that are no images: they are read, not decoded."""
    chance = random.Random(3)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(100):
            archive.writestr(f"{number:03d}.png", chance.randbytes(200_000))
    return file.getvalue()


@pytest.mark.parametrize("records", [1, 7])
def test_chunks_of_an_archive_fetch_it_about_once(remote: RemoteStorage, records: int) -> None:
    data = archive()
    file, format = io.BytesIO(data), get_format("zip")
    put(remote, data)
    assert format.header(remote.open("inputs/1")).columns == format.header(file).columns
    chunks = list(format.plan(remote.open("inputs/1"), None, ChunkLimits(records=records)))
    assert len(chunks) == -(-100 // records)
    assert remote.fetched["inputs/1"] < 0.1 * len(data), "planning reads the directory"
    for chunk in chunks:
        fetched, read = (format.read(source, chunk, {}).records for source in (remote.open("inputs/1"), file))
        assert isinstance(fetched, pl.DataFrame)
        assert isinstance(read, pl.DataFrame)
        assert fetched.equals(read)
    assert len(data) < remote.fetched["inputs/1"] < 1.5 * len(data)


def test_what_a_header_shows_of_an_archive_is_fetched_when_it_is_asked_for(remote: RemoteStorage) -> None:
    header = get_format("zip").header(put(remote, archive()))
    known = remote.fetched["inputs/1"]
    assert known < 200_000
    assert len(header.sample) == 20
    assert remote.fetched["inputs/1"] > known + 4_000_000
