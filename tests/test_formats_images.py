"""Images as tables: one body is one record, an archive has one for each of its files."""

import io
import random
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchserve.domain import Chunk, ChunkLimits, RowError
from batchserve.errors import InvalidInput, InvalidOptions, SchemaMismatch
from batchserve.formats import FORMATS, RESULT_FORMATS, get_format, sniff
from batchserve.formats.records import MAX_RECORD
from batchserve.formats.wire.archive import StoredMember, find_directory, stored_archive, walk

ZIP = get_format("zip")
KINDS = ("jpeg", "png", "webp", "gif")


def picture(kind: str = "png", seed: int = 0) -> bytes:
    """A small image of random dots."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 6, 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind)
    return target.getvalue()


PICTURES = {f"photos/{seed % 3}/{seed:02d}.{kind}": picture(kind, seed) for seed, kind in enumerate(KINDS * 3)}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment
    return target.getvalue()


def records_of(data: bytes, limits: ChunkLimits | None = None) -> tuple[list[tuple[str, bytes | None]], list[RowError]]:
    """All records of an archive, chunk by chunk, after its header has been checked."""
    source = io.BytesIO(data)
    assert ZIP.header(source).columns == {"file": pl.String(), "image": pl.Binary()}
    found: list[tuple[str, bytes | None]] = []
    errors: list[RowError] = []
    for chunk in ZIP.plan(source, None, limits or ChunkLimits()):
        assert chunk.first_record == len(found)
        reading = ZIP.read(source, chunk, {})
        assert isinstance(reading.records, pl.DataFrame)
        found += reading.records.rows()
        errors += [replace(error, record=chunk.first_record + error.record) for error in reading.errors]
    return found, errors


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_table_of_one_record_with_its_bytes(kind: str) -> None:
    data = picture(kind)
    format, _ = sniff(data, None, None)
    source = io.BytesIO(data)
    header = format.header(source)
    assert (format.name, header.columns) == (kind, {"image": pl.Binary()})
    (chunk,) = format.plan(source, None, ChunkLimits(bytes=1, records=1))
    assert list(format.plan(source, chunk, ChunkLimits())) == []
    reading = format.read(source, chunk, {})
    assert (chunk.records, reading.errors) == (1, [])
    for records in (reading.records, header.sample):
        assert isinstance(records, pl.DataFrame)
        assert records.rows() == [(data,)]


def test_an_image_of_more_than_64_mib_is_a_record_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.write(picture())
        file.truncate(MAX_RECORD + 1)
    with path.open("rb") as source:
        reading = get_format("png").read(source, Chunk(0, 1, 0, MAX_RECORD + 1), {})
    assert isinstance(reading.records, pl.DataFrame)
    assert reading.records["image"].to_list() == [None]
    (error,) = reading.errors
    assert (error.record, error.code, error.column) == (0, "image-too-large", "image")
    assert "67108865 bytes" in error.message


def test_the_sample_of_a_file_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "photos"
    path.write_bytes(zipped(PICTURES))
    with path.open("rb") as source:
        header = ZIP.header(source)
    assert isinstance(header.sample, pl.DataFrame)
    assert dict(header.sample.rows()) == PICTURES


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(RESULT_FORMATS)))
def test_images_cannot_be_written(name: str) -> None:
    format = get_format(name)
    with pytest.raises(InvalidOptions, match=f"which {name} cannot hold: request csv, jsonl"):
        format.write(pl.DataFrame({"a": [1]}))
    with pytest.raises(InvalidOptions, match="a result is a table"):
        format.assemble([], lambda key: io.BytesIO(key.encode()), 0)


def test_an_image_fills_no_column_of_numbers() -> None:
    source = io.BytesIO(picture())
    with pytest.raises(SchemaMismatch, match="column 'image': expected float32, got Binary"):
        get_format("png").read(source, Chunk(0, 1, 0, len(picture())), {"image": "float32"})


# --- archives --------------------------------------------------------------------------------------------------------


def streamed(members: dict[str, bytes]) -> bytes:
    """An archive as written by a program that cannot seek: the sizes follow the data."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return pipe.data


def zip64(members: dict[str, bytes]) -> bytes:
    """An archive with ZIP64 in all places, as if all members were large."""
    target = io.BytesIO()
    limit, zipfile.ZIP64_LIMIT = zipfile.ZIP64_LIMIT, 10  # type: ignore[misc]
    try:
        with zipfile.ZipFile(target, "w") as archive:
            for name, data in members.items():
                with archive.open(name, "w", force_zip64=True) as member:
                    member.write(data)
    finally:
        zipfile.ZIP64_LIMIT = limit  # type: ignore[misc]
    return target.getvalue()


def our_own(members: dict[str, bytes]) -> bytes:
    stored = (StoredMember(name, len(data), zlib.crc32(data), [data]) for name, data in members.items())
    return b"".join(piece for piece in stored_archive(stored) if isinstance(piece, bytes))


WRITERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "stored": lambda members: zipped(members, zipfile.ZIP_STORED),
    "deflated": zipped,
    "with a comment": lambda members: zipped(members, comment=b"PK\5 of July" * 100),
    "behind other bytes": lambda members: b"#!/bin/sh\nexit\n" + zipped(members),
    "streamed": streamed,
    "zip64": zip64,
    "our own": our_own,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("limits", [ChunkLimits(), ChunkLimits(bytes=1), ChunkLimits(records=5)], ids=["all", "1", "5"])
def test_every_archive_gives_its_files_in_their_order(writer: str, limits: ChunkLimits) -> None:
    found, errors = records_of(WRITERS[writer](PICTURES), limits)
    assert (found, errors) == (list(PICTURES.items()), [])


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=9
).filter(lambda name: name not in (".", ".."))
archives = st.lists(
    st.tuples(names, st.one_of(st.none(), st.binary(max_size=60))), max_size=30, unique_by=lambda member: member[0]
)
limits = st.builds(ChunkLimits, bytes=st.integers(1, 200), records=st.integers(1, 8))


@settings(max_examples=150, deadline=None)
@given(
    members=archives, limits=limits, other=limits, method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
)
def test_chunks_of_any_limits_hold_every_file_once_and_in_order(
    members: list[tuple[str, bytes | None]], limits: ChunkLimits, other: ChunkLimits, method: int
) -> None:
    """A member without bytes is written as a folder."""
    data = zipped({name if data is not None else f"{name}/": data or b"" for name, data in members}, method)
    files = [(name, data) for name, data in members if data is not None]
    if not files:
        with pytest.raises(InvalidInput, match="holds no files"):
            ZIP.header(io.BytesIO(data))
        return
    assert records_of(data, limits) == (files, [])
    source = io.BytesIO(data)
    chunks = list(ZIP.plan(source, None, limits))
    assert [a.stop for a in chunks[:-1]] == [b.start for b in chunks[1:]]
    for number, chunk in enumerate(chunks, 1):
        size = sum(len(data) for _, data in files[chunk.first_record :][: chunk.records])
        assert chunk.records == 1 or (chunk.records <= limits.records and size <= limits.bytes)
        assert list(ZIP.plan(source, chunk, limits)) == chunks[number:]
    middle = len(chunks) // 2
    again = list(ZIP.plan(source, chunks[middle - 1], other)) if middle else chunks
    read: list[tuple[str, bytes]] = []
    for chunk in chunks[:middle] + again:
        records = ZIP.read(source, chunk, {}).records
        assert isinstance(records, pl.DataFrame)
        read += records.rows()
    assert read == files


def test_names_are_utf8_or_cp437() -> None:
    data = zipped({"Zürich/漢字.png": picture(), "a.png": picture()})
    entry = data.rindex(b"a.png")
    old = bytearray(data.replace(b"a.png", b"\x81.png"))
    assert old[entry] == 0x81
    found, errors = records_of(bytes(old))
    assert ([name for name, _ in found], errors) == (["Zürich/漢字.png", "ü.png"], [])
    unflagged = zipped({"Z__rich.png": picture()}).replace(b"Z__rich", "Zürich".encode())  # as Finder writes it
    assert [name for name, _ in records_of(unflagged)[0]] == ["Zürich.png"]


def test_only_the_columns_that_are_asked_for_are_read() -> None:
    source = io.BytesIO(zipped(PICTURES))
    (chunk,) = ZIP.plan(source, None, ChunkLimits())
    for columns in (["file"], ["image"], ["image", "file"]):
        records = ZIP.read(source, chunk, {"file": "string"}, columns).records
        assert isinstance(records, pl.DataFrame)
        assert records.columns == sorted(columns)
        assert records.height == len(PICTURES)


def test_a_chunk_of_a_large_archive_reads_little_of_it(tmp_path: Path) -> None:
    """The chunk has a hundred of 100,000 members; neither the others nor their entries are read."""
    data = picture()
    path = tmp_path / "many.zip"
    members = (StoredMember(f"{i:06d}.png", len(data), zlib.crc32(data), [data]) for i in range(100_000))
    with path.open("wb") as file:
        for piece in stored_archive(members):
            assert isinstance(piece, bytes)
            file.write(piece)

    class Counted(io.FileIO):
        total = 0

        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(size) or b""
            self.total += len(found)
            return found

    limits = ChunkLimits(records=100)
    with path.open("rb") as source:
        chunks = list(ZIP.plan(source, None, limits))
    assert len(chunks) == 1000
    with Counted(path) as counted:
        assert next(ZIP.plan(counted, chunks[499], limits)) == chunks[500]
        records = ZIP.read(counted, chunks[500], {}).records
        assert counted.total < 1_000_000
    assert isinstance(records, pl.DataFrame)
    assert records["file"].to_list() == [f"{i:06d}.png" for i in range(50_000, 50_100)]


# --- one member that is damaged --------------------------------------------------------------------------------------


def entries(data: bytes) -> Iterator[tuple[str, int, int]]:
    """The name, the position of the bytes and the position of the entry of each member."""
    source = io.BytesIO(data)
    directory = find_directory(source)
    begin = 0
    for member, end in walk(source, directory):
        name, extra = struct.unpack_from("<HH", data, member.header_offset + 26)
        yield member.filename, member.header_offset + 30 + name + extra, directory.start + begin
        begin = end


def damaged(method: int, damage: Callable[[bytearray, int, int], None]) -> bytes:
    """Three images, of which the second is damaged in its bytes or its entry."""
    data = bytearray(zipped({name: picture(seed=seed) for seed, name in enumerate(("a", "b", "c"))}, method))
    _, content, entry = list(entries(bytes(data)))[1]
    damage(data, content, entry)
    return bytes(data)


def put(offset: int, value: int) -> Callable[[bytearray, int, int], None]:
    """Writes a number into the entry of a member."""

    def damage(data: bytearray, content: int, entry: int) -> None:  # noqa: ARG001
        data[entry + offset : entry + offset + 4] = struct.pack("<I", value)

    return damage


def flip(data: bytearray, content: int, entry: int) -> None:  # noqa: ARG001
    data[content + 20] ^= 0xFF


def overwrite(data: bytearray, content: int, entry: int) -> None:  # noqa: ARG001
    data[content : content + 40] = random.Random(5).randbytes(40)


def behead(data: bytearray, content: int, entry: int) -> None:  # noqa: ARG001
    data[content - 31 : content - 27] = b"\0\0\0\0"


@pytest.mark.parametrize(
    ("method", "damage", "code", "said"),
    [
        (zipfile.ZIP_STORED, flip, "invalid-image", "its checksum is wrong"),
        (zipfile.ZIP_DEFLATED, overwrite, "invalid-image", "damaged in the archive"),
        (zipfile.ZIP_STORED, behead, "invalid-image", "it has no header"),
        (zipfile.ZIP_STORED, put(42, 2**31), "invalid-image", "it has no header"),
        (zipfile.ZIP_STORED, put(20, 2**20), "invalid-image", "it is cut off"),
        (zipfile.ZIP_DEFLATED, put(24, 5), "invalid-image", "it has not the 5 bytes"),
        (zipfile.ZIP_DEFLATED, put(24, 50_000), "invalid-image", "it has not the 50000 bytes"),
        (zipfile.ZIP_STORED, put(20, 2**31), "image-too-large", "2147483648 bytes; at most 67108864 (64 MiB)"),
    ],
    ids=["flipped", "overwritten", "beheaded", "elsewhere", "too long", "bytes left", "bytes missing", "gigabytes"],
)
def test_a_damaged_member_is_a_record_that_fails_alone(
    method: int, damage: Callable[[bytearray, int, int], None], code: str, said: str
) -> None:
    found, errors = records_of(damaged(method, damage))
    assert found == [("a", picture(seed=0)), ("b", None), ("c", picture(seed=2))]
    assert [(error.record, error.code, error.column) for error in errors] == [(1, code, "image")]
    assert "'b'" in errors[0].message
    assert said in errors[0].message


def test_a_member_of_more_than_64_mib_is_a_record_that_fails_alone() -> None:
    noise = random.Random(3).randbytes(2**20) * 65
    found, errors = records_of(zipped({"a": picture(), "large": noise, "c": picture()}, zipfile.ZIP_STORED))
    assert found == [("a", picture()), ("large", None), ("c", picture())]
    assert [(error.record, error.code) for error in errors] == [(1, "image-too-large")]


# --- archives that are refused ---------------------------------------------------------------------------------------


def with_info(change: Callable[[zipfile.ZipInfo], None]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("good.png", picture())
        info = zipfile.ZipInfo("evil")
        change(info)
        archive.writestr(info, picture())
    return target.getvalue()


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def doubled() -> bytes:
    data = zipped(dict.fromkeys(("good.png", "evil", "other.png", "lied"), picture()))
    return data.replace(b"lied", b"evil")


def overlapping() -> bytes:
    """Two thousand members of 1 MiB that share the same few bytes."""
    data = zipped({"evil": bytes(2**20)})
    directory = find_directory(io.BytesIO(data))
    entry = data[directory.start : directory.stop]
    made = b"".join(entry.replace(b"evil", b"%04d" % i) for i in range(2000))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2000, 2000, len(made), directory.start, 0)
    return data[: directory.start] + made + end


GOOD = zipped(PICTURES)
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: zipped({"good.png": b"", "/evil": b""}), "unsafe name: '/evil'"),
    "parent": (lambda: zipped({"good.png": b"", "a/../evil": b""}), "unsafe name: 'a/../evil'"),
    "backslash": (lambda: zipped({"good.png": b"", "a\\evil": b""}), r"unsafe name: 'a\\\\evil'"),
    "NUL": (lambda: zipped({"good.png": b"", "evil_": b""}).replace(b"evil_", b"evil\0"), r"unsafe name: 'evil\\x00'"),
    "no name": (lambda: our_own({"good.png": b"", "": b""}), "unsafe name: ''"),
    "link": (lambda: with_info(link), "the member 'evil' of the archive is a link"),
    "double": (doubled, "two members named 'evil'"),
    "encrypted": (lambda: damaged(zipfile.ZIP_STORED, put(8, 1)), "the member 'b' of the archive is encrypted"),
    "method": (lambda: zipped({"evil": picture()}, zipfile.ZIP_LZMA), "'evil' is compressed by method 14: use deflate"),
    "bomb": (lambda: zipped({"good.png": picture(), "evil": bytes(80 * 2**20)}), "the member 'evil' unpacks"),
    "overlapping": (overlapping, "the archive unpacks [0-9]+ to 2097152000 bytes"),
    "not UTF-8": (lambda: zipped({"evilé": b""}).replace("é".encode(), b"\xff\xff"), "name is not UTF-8: b'evil"),
    "empty": (lambda: zipped({}), "holds no files"),
    "only folders": (lambda: zipped({"a/": b"", "a/b/": b""}), "holds no files"),
    "cut off": (lambda: GOOD[: len(GOOD) // 2], "has no directory at its end"),
    "cut off in its directory": (lambda: GOOD[:-30], "has no directory at its end"),
    "without its beginning": (lambda: GOOD[100:], "is damaged"),
    "bytes inside its directory": (
        lambda: GOOD.replace(b"PK\1\2", b"PK\1\3", 3).replace(b"PK\1\3", b"PK\1\2", 2), "damaged at its byte"),
    "one of several volumes": (
        lambda: GOOD[:-18] + b"\1\0\1\0" + GOOD[-14:], "is one of several volumes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_archive_is_refused_as_a_whole_and_the_member_is_named(name: str) -> None:
    make, said = REFUSED[name]
    data = make()
    with pytest.raises(InvalidInput, match=said) as caught:
        ZIP.header(io.BytesIO(data))
    assert len(caught.value.detail) < 400


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), bits=st.integers(1, 255))
def test_an_archive_with_any_byte_changed_is_refused_or_read_with_row_errors(at: int, bits: int) -> None:
    data = bytearray(GOOD)
    data[at] ^= bits
    try:
        found, errors = records_of(bytes(data))
    except InvalidInput:
        return
    failed = {error.record for error in errors}
    for record, (name, image) in enumerate(found):
        assert (image is None) == (record in failed)
        assert image is None or image in PICTURES.values()
        assert isinstance(name, str)
