"""ZIP archives: members of a foreign one are read one by one and never extracted; our own hold stored members."""

import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from batchserve.errors import InvalidInput
from batchserve.formats.records import check_width
from batchserve.storage import Piece

__all__ = ["StoredMember", "checked_members", "member_data", "stored_archive"]

_MAX_RATIO = 50
_RATIO_FREE = 64 * 2**20
_LOCAL_HEADER = 30
_ZIP64 = 0xFFFFFFFF
_UTF8_NAME = 0x800


@dataclass(frozen=True, slots=True)
class StoredMember:
    """A member to be written without compression."""

    name: str
    bytes: int
    crc: int
    pieces: Iterable[Piece]


def checked_members(archive: ZipFile) -> list[ZipInfo]:
    """The members in their order. Raises InvalidInput when one is hostile: names that lead out of a folder or come
    twice, encryption, other methods than stored and deflated, more than 50 bytes from each byte above 64 MiB."""
    names: set[str] = set()
    check_width(len(archive.infolist()))
    for member in archive.infolist():
        name = member.orig_filename
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise InvalidInput(f"the archive has a member with an unsafe name: {name!r}")
        if name in names:
            raise InvalidInput(f"the archive has two members named {name!r}")
        names.add(name)
        if member.flag_bits & 1:
            raise InvalidInput(f"the member {name!r} of the archive is encrypted")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise InvalidInput(f"the member {name!r} is compressed by method {member.compress_type}: use deflate")
        if member.file_size > max(_RATIO_FREE, _MAX_RATIO * member.compress_size):
            raise InvalidInput(
                f"the member {name!r} unpacks {member.compress_size} to {member.file_size} bytes: "
                f"more than {_MAX_RATIO} from each are refused"
            )
    return archive.infolist()


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
