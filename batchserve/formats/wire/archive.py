"""ZIP archives: members of uploaded ones are read one by one and never extracted; written ones have stored members."""

import os
import stat
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from batchserve.errors import InvalidInput
from batchserve.formats.records import check_width, read_span, read_up_to
from batchserve.storage import Piece
from batchserve.storage.ranged import RangedObject, RangedReader

__all__ = [
    "DAMAGED",
    "Directory",
    "StoredMember",
    "check_directory",
    "checked_members",
    "find_directory",
    "member_data",
    "read_member",
    "stored_archive",
    "walk",
]

DAMAGED = (BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
"""What `zipfile` raises over archives that are damaged, encrypted, or compressed in a way that it does not know."""
_MAX_RATIO = 50
_RATIO_FREE = 64 * 2**20
_LOCAL_HEADER = 30
_ZIP64 = 0xFFFFFFFF
_UTF8_NAME = 0x800

_ENTRY = struct.Struct("<4s6H3I5H2I")
"""Fixed fields of a central directory entry; name, extra fields and comment follow."""
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_MAX_COMMENT = 0xFFFF
_PAGE = 256 * 2**10
"""Bytes of a directory that are read together: more than the longest entry."""


@dataclass(frozen=True, slots=True)
class StoredMember:
    """A member to be written without compression."""

    name: str
    bytes: int
    crc: int
    pieces: Iterable[Piece]


def checked_members(archive: ZipFile) -> list[ZipInfo]:
    """The members in order. Raises InvalidInput when one is hostile: names that lead out of a folder or come twice,
    links, encryption, other methods than stored and deflated, more than 50 bytes from each byte above 64 MiB."""
    names: set[str] = set()
    check_width(len(archive.infolist()))
    for member in archive.infolist():
        _check_member(member)
        if member.orig_filename in names:
            raise _double(member.orig_filename)
        names.add(member.orig_filename)
    return archive.infolist()


def _check_member(member: ZipInfo) -> None:
    name = member.orig_filename
    if not name or name.startswith("/") or "\\" in name or "\0" in name or (".." in name and ".." in name.split("/")):
        raise InvalidInput(f"the archive has a member with an unsafe name: {name!r}")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise InvalidInput(f"the member {name!r} of the archive is a link")
    if member.flag_bits & 1:
        raise InvalidInput(f"the member {name!r} of the archive is encrypted")
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise InvalidInput(f"the member {name!r} is compressed by method {member.compress_type}: use deflate")
    if member.file_size > _RATIO_FREE and member.file_size > _MAX_RATIO * member.compress_size:
        raise InvalidInput(
            f"the member {name!r} unpacks {member.compress_size} to {member.file_size} bytes: "
            f"more than {_MAX_RATIO} from each are refused"
        )


def _double(name: str) -> InvalidInput:
    return InvalidInput(f"the archive has two members named {name!r}")


def member_data(source: BinaryIO, archive: ZipFile, member: ZipInfo) -> tuple[IO[bytes], int]:
    """A seekable stream and the place in it where the bytes of a member begin.

    A stored member is read from the archive's own bytes at no cost. A deflated one is unpacked from its beginning up
    to the place that is read.
    """
    if member.compress_type == ZIP_DEFLATED:
        return archive.open(member), 0
    source.seek(member.header_offset)
    header = source.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise InvalidInput(f"the member {member.filename!r} of the archive is damaged: it has no header")
    name, extra = struct.unpack("<HH", header[26:])
    return source, member.header_offset + _LOCAL_HEADER + name + extra


# --- archives of any number of members -------------------------------------------------------------------------------
#
# zipfile reads the whole directory whenever it opens an archive. That is nothing for a few arrays, and gigabytes and
# seconds for a million images, of which a chunk wants a hundred.


@dataclass(frozen=True, slots=True)
class Directory:
    """The central directory of an archive: bytes `start` to `stop` of the source. `base`: where the archive begins."""

    start: int
    stop: int
    base: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def find_directory(source: BinaryIO) -> Directory:
    """Where the directory is, by the end of an archive. Raises InvalidInput where there is none: it is cut off, or no
    archive."""
    return _fetch_end(source.stored) if isinstance(source, RangedReader) else _read_end(source)


@lru_cache(maxsize=32)
def _fetch_end(stored: RangedObject) -> Directory:
    """Every chunk asks for it, and the bytes of an object never change."""
    with stored.open() as source:
        return _read_end(source)


def _read_end(source: BinaryIO) -> Directory:
    size = source.seek(0, os.SEEK_END)
    begin = max(0, size - _END.size - _MAX_COMMENT)
    tail = read_span(source, begin, size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise InvalidInput("the zip archive has no directory at its end: it is damaged or cut off")
    _, disk, _, _, _, length, offset, _ = _END.unpack_from(tail, at)
    stop = begin + at
    end64 = stop - _LOCATOR64.size - _END64.size
    if end64 >= 0:
        longer = read_span(source, end64, stop)
        if longer.startswith(b"PK\6\6") and longer.startswith(b"PK\6\7", _END64.size):
            *_, disk, _, _, _, length, offset = _END64.unpack_from(longer)
            stop = end64
    if disk:
        raise InvalidInput("the zip archive is one of several volumes: send it as one")
    start = stop - length
    if start < offset:
        raise InvalidInput(f"the zip archive is damaged or cut off: its directory of {length} bytes is not at {offset}")
    return Directory(start, stop, start - offset)


def walk(
    source: BinaryIO, directory: Directory, start: int = 0, stop: int | None = None
) -> Iterator[tuple[ZipInfo, int]]:
    """The members whose entries stand from byte `start` to `stop` of the directory (None: its end), in order, each
    with the place where its entry ends. Reads page by page.

    Raises InvalidInput where the directory is damaged, and as `checked_members` does; names that come twice, and a
    great ratio of the whole, only `check_directory` sees.
    """
    position = start
    stop = directory.bytes if stop is None else stop
    while position < stop:
        page = read_span(source, directory.start + position, directory.start + min(position + _PAGE, stop))
        at = 0
        while (found := _parse_entry(page, at, directory.base)) is not None:
            member, at = found
            _check_member(member)
            yield member, position + at
        if not at:
            raise InvalidInput(f"the directory of the zip archive is damaged at its byte {position}")
        position += at


def _parse_entry(page: bytes, at: int, base: int) -> tuple[ZipInfo, int] | None:
    """The entry at a place and where it ends; None where no whole entry is."""
    if len(page) - at < _ENTRY.size:
        return None
    (mark, _, _, flags, method, _, _, crc, packed, size, of_name, of_extra, of_comment, _, _, attributes, offset) = (
        _ENTRY.unpack_from(page, at)
    )
    name = at + _ENTRY.size
    extra = name + of_name
    end = extra + of_extra + of_comment
    if mark != b"PK\1\2" or end > len(page):
        return None
    if max(size, packed, offset) == _ZIP64:
        size, packed, offset = _large(page[extra : extra + of_extra], size, packed, offset)
    member = ZipInfo(_name(page[name:extra], flags))
    member.flag_bits, member.compress_type, member.CRC = flags, method, crc
    member.file_size, member.compress_size, member.header_offset = size, packed, base + offset
    member.external_attr = attributes
    return member, end


def _large(extra: bytes, *fields: int) -> Iterator[int]:
    """The fields of an entry, those that do not fit there from its ZIP64 extra field."""
    values: tuple[int, ...] = ()
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            values = struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4)
        extra = extra[4 + length :]
    left = iter(values)
    for field in fields:
        yield next(left, field) if field == _ZIP64 else field


def _name(data: bytes, flags: int) -> str:
    """Many programs, Info-ZIP and Finder among them, write UTF-8 without the flag that says so; hardly any name in
    cp437 is valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        if flags & _UTF8_NAME:
            raise InvalidInput(f"the archive has a member whose name is not UTF-8: {data[:200]!r}") from None
        return data.decode("cp437")


def check_directory(source: BinaryIO, directory: Directory) -> int:
    """Looks at every entry, at the cost of 8 bytes of memory for each. Returns how many members are no directories.

    Raises InvalidInput as `checked_members` does, and when the archive unpacks to more than 50 times its bytes
    above 64 MiB, as one does whose members share their bytes.
    """
    hashes = array("q")
    files = size = 0
    for member, _ in walk(source, directory):
        hashes.append(hash(member.orig_filename))
        files += not member.is_dir()
        size += member.file_size
    if size > max(_RATIO_FREE, _MAX_RATIO * directory.stop):
        raise InvalidInput(
            f"the archive unpacks {directory.stop} to {size} bytes: more than {_MAX_RATIO} from each are refused"
        )
    counted, times = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    if len(counted) < len(hashes):
        _check_twins(source, directory, set(counted[times > 1].tolist()))
    return files


def _check_twins(source: BinaryIO, directory: Directory, hashes: set[int]) -> None:
    """Different names may have equal hashes."""
    names: set[str] = set()
    for member, _ in walk(source, directory):
        if hash(member.orig_filename) in hashes:
            if member.orig_filename in names:
                raise _double(member.orig_filename)
            names.add(member.orig_filename)


def read_member(source: BinaryIO, member: ZipInfo) -> bytes:
    """The bytes of a member. Raises BadZipFile, with what is wrong, when this member alone is damaged."""
    try:
        source.seek(member.header_offset)
    except (OverflowError, OSError):
        raise BadZipFile("its position is outside of the archive") from None
    header = read_up_to(source, _LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
        raise BadZipFile("it has no header")
    source.seek(sum(struct.unpack_from("<HH", header, 26)), os.SEEK_CUR)
    packed = read_up_to(source, member.compress_size)
    if len(packed) < member.compress_size:
        raise BadZipFile("it is cut off")
    try:
        data = zlib.decompressobj(-15).decompress(packed, member.file_size + 1) if member.compress_type else packed
    except zlib.error as error:
        raise BadZipFile(f"it cannot be unpacked: {error}") from error
    if len(data) != member.file_size:
        raise BadZipFile(f"it has not the {member.file_size} bytes that the archive declares")
    if zlib.crc32(data) != member.CRC:
        raise BadZipFile("its checksum is wrong")
    return data


# --- our own archives ------------------------------------------------------------------------------------------------


def stored_archive(members: Iterable[StoredMember]) -> Iterator[Piece]:
    """The pieces of an archive of stored members, all dated 1980-01-01, with ZIP64 where sizes ask for it."""
    position = count = 0
    directory = []
    for member in members:
        info = ZipInfo(member.name)
        info.file_size = info.compress_size = member.bytes
        info.CRC, info.header_offset = member.crc, position
        # zipfile sets the flag for a UTF-8 name and the extra field for a large size.
        header = info.FileHeader(zip64=member.bytes >= _ZIP64)
        yield header
        yield from member.pieces
        position += len(header) + member.bytes
        directory.append(_entry(info))
        count += 1
    entries = b"".join(directory)
    yield entries + _end(count, len(entries), position)


def _entry(info: ZipInfo) -> bytes:
    """One entry of the central directory."""
    name = info.filename.encode()
    flags = 0 if info.filename.isascii() else _UTF8_NAME
    large = [info.file_size, info.compress_size] if info.file_size >= _ZIP64 else []
    far = [info.header_offset] if info.header_offset >= _ZIP64 else []
    extra = struct.pack(f"<HH{len(large + far)}Q", 1, 8 * len(large + far), *large, *far) if large or far else b""
    size, offset = min(info.file_size, _ZIP64), min(info.header_offset, _ZIP64)
    version = zipfile.ZIP64_VERSION if extra else zipfile.DEFAULT_VERSION
    date = 1 << 5 | 1
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 3 << 8 | version, version, flags, ZIP_STORED, 0, date,
            info.CRC, size, size, len(name), len(extra), 0, 0, 0, 0o600 << 16, offset,
        )
        + name
        + extra
    )  # fmt: skip


def _end(count: int, size: int, position: int) -> bytes:
    """The end of the central directory that has `size` bytes and stands at `position`."""
    end = struct.pack(
        "<4sHHHHIIH",
        b"PK\5\6",
        0,
        0,
        min(count, 0xFFFF),
        min(count, 0xFFFF),
        min(size, _ZIP64),
        min(position, _ZIP64),
        0,
    )
    if max(position, size) < _ZIP64 and count < 0xFFFF:
        return end
    version = zipfile.ZIP64_VERSION
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 3 << 8 | version, version, 0, 0, count, count, size, position)
    return end64 + struct.pack("<4sIQI", b"PK\6\7", 0, position + size, 1) + end
