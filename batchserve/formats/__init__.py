"""File formats, each bound to a dialect, and their detection. Media types and file names are hints of the client; the
bytes decide. A contradiction is refused by name.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePath

import orjson

from batchserve.domain import Dialect, ReadOptions
from batchserve.errors import InvalidLocation, InvalidOptions, UnsupportedMedia
from batchserve.formats.arrow import ArrowFile, ArrowStream
from batchserve.formats.csv import Csv
from batchserve.formats.csv_dialect import recognise_delimiter
from batchserve.formats.encodings import encoding_of_mark, known_encoding, require_utf8
from batchserve.formats.images import Image, Zip
from batchserve.formats.json import Json
from batchserve.formats.jsonl import Jsonl
from batchserve.formats.parquet import Parquet
from batchserve.formats.protocol import Format, Header, Open, Part, Reading, Records, Tensors
from batchserve.formats.tensors import Npy, Npz

__all__ = [
    "FORMATS",
    "RESULT_FORMATS",
    "Format",
    "Header",
    "Open",
    "Part",
    "Reading",
    "Records",
    "Tensors",
    "by_media_type",
    "encoding_of",
    "format_of_name",
    "get_format",
    "require_suffix_of_result",
    "sniff",
    "unsupported",
]

RESULT_FORMATS: dict[str, Format] = {
    format.name: format
    for format in (Csv(), Jsonl(), Json(), Parquet(), ArrowFile(), ArrowStream(), Npy(), Npz())  # in order of use
}
"""Formats of tables and arrays, which can be read and written."""
_IMAGES = (
    Image("jpeg", "image/jpeg", ".jpg"),
    Image("png", "image/png", ".png"),
    Image("webp", "image/webp", ".webp"),
    Image("gif", "image/gif", ".gif"),
)
FORMATS: dict[str, Format] = RESULT_FORMATS | {format.name: format for format in (Zip(), *_IMAGES)}
"""All formats, which inputs may have. Each is bound to the plain dialect."""
_BOUND: dict[str, Callable[[Dialect], Format]] = {
    "csv": lambda dialect: Csv(dialect.delimiter, dialect.decimal),
    "json": lambda dialect: Json(dialect.columns),
    "npz": lambda dialect: Npz(dialect.arrays),
}
"""Formats with dialects; the bytes of the others are self-describing."""

_TAB = "text/tab-separated-values"
_XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
_ALIASES = {
    "application/csv": "csv",
    _TAB: "csv",
    "application/jsonl": "jsonl",
    "application/jsonlines": "jsonl",
    "application/ndjson": "jsonl",
    "application/x-jsonlines": "jsonl",
    "application/parquet": "parquet",
    "application/x-parquet": "parquet",
    "application/vnd.apache.x-parquet": "parquet",
    "application/x-zip-compressed": "zip",
    _XLSX: "zip",
    "image/jpg": "jpeg",
}
_MEDIA_TYPES = {format.media_type: format.name for format in FORMATS.values()} | _ALIASES
_SUFFIXES = {format.suffix: format.name for format in RESULT_FORMATS.values()} | {
    ".tsv": "csv",
    ".ndjson": "jsonl",
    ".pq": "parquet",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_OF_OTHERS = (
    ".jpeg .tif .tiff .bmp .svg .pdf .gz .gzip .tgz .zst .zstd .bz2 .xz .lz4 .lzma .br .snappy .sz .z .tar .7z .rar "
    ".xls .xlsx .xlsm .xlsb .ods .orc .avro .pkl .pickle .joblib .h5 .hdf5 .mat .sav .dta .sas7bdat .rds .rdata "
    ".db .sqlite .sqlite3 .duckdb .html .htm .xml .doc .docx"
)
_NO_RESULTS = {format.suffix for format in FORMATS.values()} - _SUFFIXES.keys() | set(_OF_OTHERS.split())
"""Suffixes that say what a result never is."""
_SAYS_NOTHING = {
    "",
    "*/*",
    "application/octet-stream",
    "application/vnd.ms-excel",  # Windows says it of CSV
    "application/x-www-form-urlencoded",  # curl sends it for -d and --data-binary
    "binary/octet-stream",
    "text/plain",
}

_TEXTS = {format.name for format in FORMATS.values() if format.is_text}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrows",
    b"\x93NUMPY": "npy",
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
}
_FOREIGN = {
    b"BM": "a BMP image (send it as PNG)",
    b"II*\x00": "a TIFF image (send it as PNG)",
    b"MM\x00*": "a TIFF image (send it as PNG)",
    b"RIFF": "a RIFF file that is not a WebP image",
    b"%PDF-": "a PDF document",
    b"{\\rtf": "a text document in RTF",
    b"\x1f\x8b": "gzip data (send it with the header Content-Encoding: gzip)",
    b"\x28\xb5\x2f\xfd": "zstd data (send it with the header Content-Encoding: zstd)",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\x00": "xz data",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\x00": "an SQLite database (export the table as CSV or Parquet)",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word document (save its table as .xlsx or CSV)",
    b"FEA1": "a Feather file of version 1 (write it with version=2)",
    b"ORC": "an ORC file (send Parquet)",
    b"RDX2\n": "an R workspace (write the table as CSV or Parquet)",
    b"RDX3\n": "an R workspace (write the table as CSV or Parquet)",
    b"X\n\x00\x00\x00": "an R object in RDS (write the table as CSV or Parquet)",
    b"$FL2": "an SPSS file (write the table as CSV or Parquet)",
    b"<stata_dta>": "a Stata file (write the table as CSV or Parquet)",
    b"MATLAB 5.0 MAT-file": "a MATLAB file (write the table as CSV or Parquet)",
    b"\x7fELF": "a program",
}
_FOREIGN_BY_BYTE = {
    magic[:1]: [(same, what) for same, what in _FOREIGN.items() if same[:1] == magic[:1]] for magic in _FOREIGN
}
"""Few of them need a comparison with each input."""
_KNOWN = (*_MAGIC, *_ZIP)
_FOREIGN_ZIPS = {
    b"mimetype": "an OpenDocument or EPUB document (save its table as .xlsx or CSV)",
    b"META-INF/": "a Java archive",
}
"""Kinds of ZIP files by the name of their first member."""
_NULS = "binary data with NUL bytes, of no known format"
_DELIMITERS = {",": ",", ";": ";", "|": "|", "\t": "\t", "tab": "\t", "\\t": "\t"}
_DECIMALS = {".": ".", ",": ","}
_BOM = b"\xef\xbb\xbf"
_NO_OPTIONS = ReadOptions()


def get_format(name: str, dialect: Dialect | None = None) -> Format:
    """The format of that name, for files in a dialect (None: the plain one).

    Raises InvalidOptions that lists the formats of results.
    """
    if name not in FORMATS:
        raise InvalidOptions(f"there is no format {name!r}; expected one of {', '.join(RESULT_FORMATS)}")
    return _BOUND[name](dialect) if dialect is not None and name in _BOUND else FORMATS[name]


def format_of_name(name: str) -> str | None:
    """The format that the suffix of a file name says; None where it says none of ours."""
    return _SUFFIXES.get(os.path.splitext(name)[1].lower())  # noqa: PTH122 - of each of many inputs


def require_suffix_of_result(name: str) -> None:
    """Raises InvalidLocation for a file name that says compression, or a kind of file that no result is of. One that
    says nothing may be the name of any."""
    suffix = PurePath(name).suffix
    if suffix.lower() in _NO_RESULTS:
        known = ", ".join(format.suffix for format in RESULT_FORMATS.values())
        raise InvalidLocation(f"a result cannot be written as {suffix}: give its address one of the suffixes {known}")


def by_media_type(media_type: str) -> Format | None:
    """The format of a media type, whose parameters do not matter; None where it names none of ours."""
    name = _MEDIA_TYPES.get(_bare(media_type))
    return FORMATS[name] if name else None


def encoding_of(prefix: bytes, options: ReadOptions) -> str | None:
    """The codec that makes a text which begins with `prefix` UTF-8: by its byte order mark, else by the option. None:
    it is UTF-8, or no text at all. `sniff` takes UTF-8.

    Raises InvalidOptions for an encoding that is not supported.
    """
    chosen = None if options.encoding is None else known_encoding(options.encoding)
    if prefix.startswith(_KNOWN) or _is_webp(prefix):
        return None
    if (marked := encoding_of_mark(prefix)) is not None:
        return None if marked == "utf-8" else marked
    return f"{chosen}-le" if chosen in ("utf-16", "utf-32") else chosen


def sniff(
    prefix: bytes,
    content_type: str | None,
    filename: str | None,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
    columns: Collection[str] = (),
) -> tuple[Format, Dialect]:
    """The format and dialect of an input that begins with `prefix` (a few KiB are plenty).

    `content_type` and `filename` come from the client, `options` from the user, `columns` are the names that a table is
    expected to have. Empty bytes have the declared format, or CSV: whether an input may be empty is checked when it is
    read. Raises UnsupportedMedia that says what the bytes look like, InvalidOptions for another delimiter or decimal
    mark.
    """
    if content_type == "application/json" and filename is None and options == _NO_OPTIONS and _is_plain_json(prefix):
        return FORMATS["json"], Dialect()
    bare = _bare(content_type or "")
    suffix = PurePath(filename or "").suffix.lower()
    declared = None if bare in _SAYS_NOTHING else _MEDIA_TYPES.get(bare, bare)
    delimiter = None if options.delimiter is None else _chosen("delimiter", options.delimiter, _DELIMITERS)
    decimal = "." if options.decimal is None else _chosen("decimal", options.decimal, _DECIMALS)
    if delimiter is None and (bare == _TAB or (declared in (None, "csv") and suffix == ".tsv")):
        delimiter = "\t"
    if declared is not None and declared not in FORMATS:
        raise unsupported(f"the media type {bare} is not supported")
    foreign = _foreign(prefix)
    found = foreign or _detect(prefix, declared, suffix)
    if (declared, found) == ("zip", "npz"):
        declared = found  # which is a ZIP, too
    if (declared or found) == "json" and _is_ndjson(prefix):
        declared = found = "jsonl"  # which many programs store as .json
    if foreign or (declared is not None and not _agree(declared, found, prefix)):
        raise unsupported(f"the bytes look like {found}" + (f", but they were declared as {bare}" if declared else ""))
    format = FORMATS[declared or found]
    if format.is_text:
        require_utf8(prefix, b"}" if format.name == "json" else b"\n", has_header=format.name == "csv")
    if delimiter is None:
        delimiter = recognise_delimiter(prefix, columns) if format.name == "csv" else ","
    return format, Dialect(delimiter, decimal=decimal)


def _is_plain_json(prefix: bytes) -> bool:
    """Whether the bytes are certainly those of JSON records, as most online requests send them."""
    return prefix.startswith((b'[{"', b'{"')) and prefix.isascii() and b"\0" not in prefix


def _detect(prefix: bytes, declared: str | None, suffix: str) -> str:
    """The name of the detected format; else the declared one, else csv."""
    if prefix.startswith(_KNOWN):
        known = next((name for magic, name in _MAGIC.items() if prefix.startswith(magic)), None)
        if known is not None:
            return known
    if _is_webp(prefix):
        return "webp"
    if prefix.startswith(_ZIP):
        member = _first_member(prefix)
        return "npz" if member.endswith(b".npy") or (not member and declared == "npz") else "zip"
    if not prefix.strip():
        return declared or _SUFFIXES.get(suffix, "csv")
    said = declared or _SUFFIXES.get(suffix)
    return said if said in _TEXTS and _agree(said, said, prefix) else _detect_text(prefix)


def _foreign(prefix: bytes) -> str | None:
    """What unsupported bytes look like."""
    # Protocol 2 and later; the frame or the first opcode follows.
    if prefix[:1] == b"\x80" and prefix[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        return "a Python pickle, which can run any code when it is loaded (send a frame as Parquet)"
    for magic, what in _FOREIGN_BY_BYTE.get(prefix[:1], ()):
        if prefix.startswith(magic) and not (magic.isascii() and magic.isalnum() and _is_text(prefix)):
            return None if _is_webp(prefix) else what
    if prefix.startswith(_ZIP) and (first := _first_member(prefix)) in _FOREIGN_ZIPS:
        return _FOREIGN_ZIPS[first]
    if prefix.removeprefix(_BOM).lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<table")):
        return "an HTML or XML document (a page with an error, or a table saved as a web page)"
    if prefix[:1] == b"\0" and prefix[4:8] == b"ftyp":
        return "a HEIC or AVIF image or a video (send images as JPEG or PNG)"
    known = prefix.startswith(_KNOWN) or _is_webp(prefix)
    if b"\x00" not in prefix or known:
        return None
    return "UTF-16 text (send the option encoding=utf-16)" if _is_utf16(prefix) else _NULS


def _is_utf16(prefix: bytes) -> bool:
    """Whether nearly every other byte is NUL, as in European texts."""
    low, high = sorted((prefix[::2].count(0), prefix[1::2].count(0)))
    return low == 0 and high >= 0.4 * len(prefix)


def _is_webp(prefix: bytes) -> bool:
    return prefix.startswith(b"RIFF") and prefix[8:12] == b"WEBP"


def _first_member(prefix: bytes) -> bytes:
    """The name of the first member of a ZIP; empty where there is none."""
    return prefix[30 : 30 + int.from_bytes(prefix[26:28], "little")] if prefix.startswith(_ZIP[0]) else b""


def _is_text(prefix: bytes) -> bool:
    """A CSV header may begin with the letters of a magic number."""
    try:
        prefix.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return b"\x00" not in prefix


def _detect_text(prefix: bytes) -> str:
    text = prefix.removeprefix(_BOM).lstrip()
    if text.startswith(b"["):
        return "json"
    if not text.startswith(b"{"):
        return "csv"
    line, newline, rest = text.partition(b"\n")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        # The beginning of a long line, of a document over several lines, or a faulty first record.
        wrapped = re.match(rb'\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*\[\s*[{[\]]', text)
        over_lines = newline and not line.rstrip().endswith(b"}")
        return "json" if wrapped or over_lines else "jsonl"
    data = record.get("data")
    if isinstance(data, list) and all(isinstance(value, dict) for value in data):
        return "json"
    # Arrays may be records; or, in one line of several, a value.
    arrays = isinstance(data, list) and all(isinstance(value, list) for value in data)
    return "json" if arrays and not rest.strip() else "jsonl"


def _is_ndjson(prefix: bytes) -> bool:
    """Whether an object in a line is followed by another one."""
    line, _, rest = prefix.removeprefix(_BOM).lstrip().partition(b"\n")
    if not line.startswith(b"{") or not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _agree(declared: str, found: str, prefix: bytes) -> bool:
    """Whether bytes in which `found` was seen can be what was declared."""
    if declared not in _TEXTS or found not in _TEXTS:
        return declared == found or not prefix
    text = prefix.removeprefix(_BOM).lstrip()
    if declared == "csv":
        return not text.startswith((b'{"', b'[{"'))
    return not text or text.startswith((b"{", b"[") if declared == "json" else b"{")


def _chosen(option: str, given: str, known: Mapping[str, str]) -> str:
    if given not in known:
        expected = " ".join(name for name in known if name.isprintable() and "\\" not in name)
        raise InvalidOptions(f"the {option} {given!r} is not supported; expected one of {expected}")
    return known[given]


def _bare(media_type: str) -> str:
    return media_type.partition(";")[0].strip().lower()


def unsupported(what: str) -> UnsupportedMedia:
    """The refusal of bytes, with the media types that are taken."""
    supported = ", ".join(format.media_type for format in FORMATS.values())
    return UnsupportedMedia(f"{what}; expected one of {supported}")
