"""Results are written where their owners want them: one object, or a folder of objects by the values of a column."""

import errno
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import polars as pl

from batchserve.domain import Target
from batchserve.errors import InvalidOptions, LocationRefused, TargetExists, Unavailable
from batchserve.formats import get_format
from batchserve.formats.protocol import Part
from batchserve.inference.matching import require_folders
from batchserve.scoring.planning import WHOLE
from batchserve.storage import Composed, Occupied, Storage, Stored
from batchserve.storage.locations import create_at, exists, read_at, root_of

AT_ONCE = 8
"""Objects that are written at a time: each is synced."""
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
_MOST_VALUES = 10_000
_LONGEST_NAME = 255
"""Bytes in the name of a folder, in all common file systems."""
_LONGEST_KEY = 1024
"""Bytes in the key of an object."""
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""As other tools name the folder of records without a value."""


def write_object(target: Target, url: str, blocks: Iterable[bytes]) -> Composed:
    """Writes one object whole, or not at all. Raises TargetExists and LocationRefused."""
    try:
        if not target.overwrite and exists(url, target.root):
            return _require_same(target, url, blocks)
        with create_at(url, target.root, replaces=target.overwrite, mark=target.mark) as writer:
            for block in blocks:
                writer.write(block)
            try:
                return writer.commit()
            except Occupied as found:  # it has appeared since
                return _require_equal(target, url, found.stored)
    except OSError as error:
        if error.errno in _REFUSED:
            raise LocationRefused(f"{url} cannot be written: {error.strerror}") from error
        raise


def _require_same(target: Target, url: str, blocks: Iterable[bytes]) -> Composed:
    """Raises TargetExists unless an object has these bytes: then an earlier attempt at this job has written it."""
    digest, size = hashlib.sha256(), 0
    try:
        with read_at(url, target.root) as known:
            for block in blocks:
                if known.read(len(block)) != block:
                    raise _exists(url)
                digest.update(block)
                size += len(block)
            if known.read(1):
                raise _exists(url)
    except FileNotFoundError:
        raise Unavailable(f"{url} was removed while it was compared") from None
    return Composed(size, digest.hexdigest())


def _require_equal(target: Target, url: str, stored: Stored) -> Composed:
    """As `_require_same`, of bytes that were written already."""
    try:
        with read_at(url, target.root) as known:
            is_same = hashlib.file_digest(known, "sha256").hexdigest() == stored.sha256  # type: ignore[arg-type]
    except FileNotFoundError:
        raise Unavailable(f"{url} was removed while it was compared") from None
    if not is_same:
        raise _exists(url)
    return stored


def _exists(url: str) -> TargetExists:
    return TargetExists(f"{url} exists and is not replaced: remove it, or submit the job with overwrite=true")


def write_partitions(store: Storage, target: Target, column: str, parts: Sequence[Part]) -> Composed:
    """Writes the records of all parts into folders named after the values of a column, without that column: an object
    for each value and part. Raises TargetExists; and LocationRefused and InvalidOptions for values that cannot name
    folders, before any is made."""
    _require_folders(store, target, column, parts)
    size = first = 0
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for part in parts:
            pieces = _partitioned(store, part, column)
            written = [
                threads.submit(write_object, target, _url(target.url, name, first), [content])
                for name, content in pieces.items()
            ]
            size += sum(future.result().bytes for future in written)
            first += part.records
    return Composed(size, None)


def _require_folders(store: Storage, target: Target, column: str, parts: Sequence[Part]) -> None:
    """Raises what `write_partitions` does for the values of all parts."""
    names: set[str] = set()
    for part in parts:
        values = _values(_column(store, part, column)).unique(maintain_order=True)
        if len(values) <= _MOST_VALUES:
            names |= {_folder(values[place:]) for place in range(len(values))}
        if max(len(values), len(names)) > _MOST_VALUES:
            raise InvalidOptions(f"partition_by: {column!r} has more than {_MOST_VALUES} values")
    for name in names:
        url = _url(target.url, name, 0)
        if url.startswith("file:"):
            what, length, most = "a name", len(name), _LONGEST_NAME
        else:
            what, length, most = "keys", len(url.split("/", 3)[-1].encode()), _LONGEST_KEY
        if length > most:
            has = f"would have {what} of {length} bytes; at most {most} are possible"
            raise LocationRefused(f"partition_by: the folder {name[:80]}... {has}")
        root_of(url, [target.root])


def _column(store: Storage, part: Part, column: str) -> pl.Series:
    """Raises InvalidOptions for one by which the result cannot be partitioned."""
    format = get_format("parquet")
    with store.open(part.key) as source:
        there = list(format.header(source).columns)
        if column not in there:
            raise InvalidOptions(f"partition_by: the result has no column {column!r}; it has {', '.join(there)}")
        if len(there) == 1:
            raise InvalidOptions(f"partition_by: the result has no column besides {column!r}")
        records = format.read(source, next(format.plan(source, None, WHOLE)), {}, [column]).records
    assert isinstance(records, pl.DataFrame)
    require_folders(column, records[column].dtype)
    return records[column]


def _partitioned(store: Storage, part: Part, column: str) -> dict[str, bytes]:
    """The contents of the files of a part, by the names of their folders: so no two have one address."""
    with store.open(part.key) as source:
        frame = pl.read_parquet(source.read())
    found: dict[str, list[pl.DataFrame]] = {}
    # Not by a dict of polars: its keys are objects of Python, in which times have no nanoseconds.
    for records in frame.with_columns(_values(frame[column])).partition_by(column, maintain_order=True):
        found.setdefault(_folder(records[column]), []).append(records.drop(column))
    return {name: get_format("parquet").write(pl.concat(records)) for name, records in found.items()}


def _values(column: pl.Series) -> pl.Series:
    """With null for each text whose folder is that of null."""
    if column.dtype != pl.String():
        return column
    return column.set(column.is_in(["", _NO_VALUE]), None)


def _folder(values: pl.Series) -> str:
    """The name of the folder of records that share a value."""
    first = values[:1]
    shown = _NO_VALUE if first.has_nulls() else quote(_text(first), safe="")
    return f"{quote(values.name, safe='')}={shown}"


def _text(value: pl.Series) -> str:
    """Another one for each value of the column. Raises InvalidOptions."""
    kind = value.dtype
    try:
        if isinstance(kind, pl.Time) or (isinstance(kind, pl.Datetime | pl.Duration) and kind.time_unit == "ns"):
            count = int(value.to_physical().item())
            if count % 1000:  # Python has no nanoseconds
                return f"{count} ns" if isinstance(kind, pl.Duration) else str(value.cast(pl.String()).item())
        return str(value.item())
    except (ValueError, OverflowError, pl.exceptions.PanicException) as error:
        raise InvalidOptions(f"partition_by: a {kind} in {value.name!r} has no text: {error}") from error


def _url(folder: str, name: str, first: int) -> str:
    # Quoted once more, since the address of a file is decoded.
    return f"{folder}{quote(name, safe='=') if folder.startswith('file:') else name}/part-{first:015d}.parquet"
