"""Files that hold a table and are none themselves: a zip of one table, and a workbook.

They are unpacked where they are stored, so that a chunk of the table can be read from any of its bytes. Other zips are
archives of images, and stay as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO
from zipfile import ZipFile

from batchserve.errors import InvalidInput, PayloadTooLarge
from batchserve.formats import unsupported
from batchserve.formats.wire.archive import DAMAGED, check_directory, find_directory, walk

__all__ = ["TABLES", "Contents", "contents_of", "unpacked"]

TABLES = frozenset(
    {".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".arrows", ".feather", ".npy", ".xlsx"}
)
"""Suffixes of files that are tables."""
_SAY_NOTHING = frozenset({"", ".txt", ".dat", ".data"})
"""Those of tables, if the zip has no other file and its bytes are a table's."""
_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
_PACKED = frozenset({".gz", ".zst", ".zip", ".bz2", ".xz", ".7z", ".tar", ".tgz"})
_DOCUMENTS = {
    "xl/workbook.bin": "an Excel workbook in binary (.xlsb): save it as .xlsx or CSV",
    "word/document.xml": "a Word document: save its table as CSV",
    "ppt/presentation.xml": "a PowerPoint document: save its table as CSV",
    "META-INF/MANIFEST.MF": "a Java archive",
    "META-INF/container.xml": "an EPUB document",
    "content.xml": "an OpenDocument file: save its table as .xlsx or CSV",
    "data.pkl": "a file of PyTorch, which is no table",
}
_WORKBOOK = "xl/workbook.xml"
_NAMED = 5
_BLOCK = 2**20


@dataclass(slots=True)
class Contents:
    """What a zip holds: a workbook, one table, or else images."""

    is_workbook: bool = False
    table: str | None = None
    """The name of the one file that is a table."""

    @property
    def is_images(self) -> bool:
        return not self.is_workbook and self.table is None


@dataclass(slots=True)
class _Count:
    files: int = 0
    images: int = 0
    tables: int = 0
    packed: int = 0
    unclear: int = 0
    office: bool = False
    named: list[str] = field(default_factory=list)
    """The first tables and packed files."""


def contents_of(source: BinaryIO) -> Contents:
    """Looks at the whole directory. Raises InvalidInput for what is hostile or damaged anywhere in it, and for a table
    among other files, UnsupportedMedia for documents that are zips."""
    directory = find_directory(source)
    check_directory(source, directory)
    count = _Count()
    for member, _ in walk(source, directory):
        if member.is_dir() or _is_of_the_system(member.filename):
            continue
        if member.filename == _WORKBOOK:
            return Contents(is_workbook=True)
        if what := _DOCUMENTS.get(member.filename):
            raise unsupported(f"the bytes look like {what}")
        count.office = count.office or member.filename == "[Content_Types].xml"
        suffix = PurePosixPath(member.filename).suffix.lower()
        count.files += 1
        count.images += suffix in _IMAGES
        count.tables += suffix in TABLES
        count.packed += suffix in _PACKED
        count.unclear += suffix in _SAY_NOTHING
        if suffix in TABLES | _PACKED | _SAY_NOTHING and len(count.named) < _NAMED:
            count.named.append(member.filename)
    if count.office:
        raise unsupported("the bytes look like an Office document that is no Excel workbook")
    _require_one_kind(count)
    return Contents(table=count.named[0] if count.tables or (count.unclear == count.files == 1) else None)


def _require_one_kind(count: _Count) -> None:
    if not count.tables and not count.packed:
        return
    listed = ", ".join(map(repr, count.named)) + (" and more" if count.tables + count.packed > _NAMED else "")
    if count.packed:
        raise InvalidInput(f"the zip has packed files in it: {listed}; unpack them, and send each table as an input")
    if count.tables > 1:
        raise InvalidInput(f"the zip has several tables: {listed}; send each as an input of its own")
    if count.images:
        raise InvalidInput(f"the zip has a table, {listed}, and images: send either")
    if count.files > 1:
        raise InvalidInput(f"the zip has a table, {listed}, and {count.files - 1} other files: send the table alone")


def unpacked(source: BinaryIO, name: str, most: int) -> Iterator[bytes]:
    """The bytes of a file in a zip, in blocks. Raises PayloadTooLarge for more than `most`, InvalidInput when it is
    damaged."""
    size = 0
    try:
        with ZipFile(source) as archive, archive.open(name) as member:
            while block := member.read(_BLOCK):
                size += len(block)
                if size > most:
                    raise PayloadTooLarge(f"{name!r} of the zip has more than {most} bytes")
                yield block
    except DAMAGED as error:
        raise InvalidInput(f"{name!r} of the zip cannot be unpacked: {error}") from None


def _is_of_the_system(name: str) -> bool:
    """What Finder and Explorer add to a zip."""
    path = PurePosixPath(name)
    return path.parts[0] == "__MACOSX" or path.name in (".DS_Store", "Thumbs.db", "desktop.ini")
