"""Converts users' data into request bodies, and results into users' types. Heavy libraries are imported lazily."""

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias
from uuid import UUID

from batchserve.client.ipc import END, blocks_of
from batchserve.client.tables import Table, table_of
from batchserve.client.transport import BLOCK, Content
from batchserve.errors import InvalidInput, InvalidOptions

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    class ArrowStream(Protocol):
        """A table of pyarrow, DuckDB, Ibis and others."""

        def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...

    Frame: TypeAlias = pd.DataFrame | pd.Series[Any] | pl.DataFrame | pl.LazyFrame | pl.Series | ArrowStream | Table
    Arrays: TypeAlias = np.ndarray[Any, Any] | Mapping[str, np.ndarray[Any, Any]]
    OnePath: TypeAlias = str | os.PathLike[str]
    Paths: TypeAlias = OnePath | Sequence[OnePath]
    Record: TypeAlias = Mapping[str, Any]
    Data: TypeAlias = OnePath | bytes | BinaryIO | Frame | Arrays | Record | Sequence[Record | Sequence[Any] | OnePath]

MEDIA_TYPES = {
    ".csv": "text/csv",
    ".tsv": "text/csv",
    ".jsonl": "application/x-ndjson",
    ".ndjson": "application/x-ndjson",
    ".json": "application/json",
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": "application/vnd.apache.arrow.file",
    ".feather": "application/vnd.apache.arrow.file",
    ".arrows": "application/vnd.apache.arrow.stream",
    ".npy": "application/x-npy",
    ".npz": "application/x-npz",
    ".zip": "application/zip",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".onnx": "application/octet-stream",
}
UNKNOWN = "application/octet-stream"
"""The server detects the format."""

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".arrows": "arrows",
    ".npy": "npy",
    ".npz": "npz",
}
"""Formats of results by file suffix."""
_NO_RESULTS = frozenset({".gz", ".zst", ".bz2", ".xz", ".zip", ".xls", ".xlsx", ".xlsm", ".ods"})
"""Of what results are not: compressed, or sheets."""
_ENCODINGS = {".gz": "gzip", ".zst": "zstd"}
_FEW_BLOCKS = 3
"""Of a stream of one record batch: its schema, the batch, its end."""


def content_of(data: "Data") -> Content:
    """The body that carries `data`: a path (`str` too), bytes, a binary file, a table (of pandas, polars or pyarrow, a
    structured array, whatever gives an Arrow stream), an array or a mapping of arrays of numpy, one record (a mapping)
    or a list of records (mappings, or lists of values). Files and tables are read block by block.

    A folder of images, or a list of their paths, becomes a zip. Raises InvalidInput for one without an image suffix.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        return _of_images(_images_in(path), f"{path.resolve().name}.zip") if path.is_dir() else _of_path(path)
    if holds_paths(data):
        return _of_images(_images_of([Path(path) for path in data]))  # type: ignore[arg-type,union-attr]
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes_content(bytes(data), UNKNOWN)
    if hasattr(data, "read"):
        return _of_file(data)
    if (table := data if isinstance(data, Table) else table_of(data)) is not None:
        return _of_table(table)
    if library_of(data) == "numpy":
        return _of_array(data)
    if holds_arrays(data):
        return _of_arrays(data)  # type: ignore[arg-type]
    if isinstance(data, Mapping | Sequence):
        return bytes_content(_json_text(data).encode(), "application/json")
    raise TypeError(
        f"cannot send a {type(data).__name__}: expected a path, bytes, a binary file, a table, a numpy array, "
        "a list of records or of paths"
    )


def _json_text(data: Any) -> str:
    try:
        return json.dumps(data, default=_json_of, allow_nan=False)
    except ValueError as error:
        if "float" not in str(error):
            raise
    return json.dumps(_finite(data), default=_json_of)


def _finite(value: Any) -> Any:
    """The value as JSON has it: NaN is missing, and infinity a text."""
    if library_of(value) == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _json_of(value: Any) -> Any:
    """A value of a record that JSON has no form of, as one that it has: numbers of NumPy, times, decimals, UUIDs."""
    if library_of(value) == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise InvalidInput(
        f"a list of records holds a {type(value).__name__}, which has no form in JSON: convert it to a number or a text"
        + (", or pass one table" if hasattr(value, "columns") else "")
    )


def format_of(path: Path) -> str | None:
    """The `format` option for a file name; None if its suffix is unknown."""
    return _FORMATS.get(path.suffix.lower())


def require_format(path: Path) -> None:
    """Raises InvalidOptions for a file name whose suffix promises what no result is: a reader would go by it."""
    if path.suffix.lower() in _NO_RESULTS:
        known = ", ".join(_FORMATS)
        raise InvalidOptions(f"output: a result is not written as {path.suffix}, got {path}; expected one of {known}")


def paths_of(data: object) -> "list[str | os.PathLike[str]]":
    """All paths of `data`; none if it is not a path."""
    if holds_paths(data):
        return list(data)  # type: ignore[call-overload, no-any-return]
    return [data] if isinstance(data, str | os.PathLike) else []


def path_of(data: object) -> Path | None:
    """The path of `data`, of several the first; None if it is not a path."""
    first = data[0] if holds_paths(data) else data  # type: ignore[index]
    return Path(first) if isinstance(first, str | os.PathLike) else None


def holds_paths(data: object) -> bool:
    return isinstance(data, list | tuple) and bool(data) and all(isinstance(item, str | os.PathLike) for item in data)


def bytes_content(content: bytes, media_type: str) -> Content:
    view = memoryview(content)

    def blocks() -> Iterator[bytes]:
        for start in range(0, len(view), BLOCK):
            yield bytes(view[start : start + BLOCK])

    return Content(blocks, media_type, len(content))


def holds_arrays(data: object) -> bool:
    return isinstance(data, Mapping) and bool(data) and all(library_of(value) == "numpy" for value in data.values())


def library_of(data: object) -> str:
    """The package that the type of `data` comes from."""
    return type(data).__module__.partition(".")[0]


def _of_path(path: Path) -> Content:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    encoding = _ENCODINGS.get(suffixes[-1]) if suffixes else None
    suffix = suffixes[-2] if encoding and len(suffixes) > 1 else "".join(suffixes[-1:])

    def blocks() -> Iterator[bytes]:
        with path.open("rb") as file:
            yield from _read(file)

    name = path.name.encode(errors="surrogateescape").decode(errors="replace")  # a name may be any bytes
    return Content(blocks, MEDIA_TYPES.get(suffix, UNKNOWN), path.stat().st_size, encoding, name)


def _images_in(folder: Path) -> dict[str, Path]:
    """The images in a folder and all below it, by their paths in it, in order. Hidden files and folders are skipped."""
    found = ((path.relative_to(folder), path) for path in folder.rglob("*") if is_image(path) and path.is_file())
    images = {name.as_posix(): path for name, path in found if not any(part.startswith(".") for part in name.parts)}
    if not images:
        raise InvalidInput(f"there are no images in {str(folder)!r}: expected files named {named_images()}")
    return dict(sorted(images.items()))


def _images_of(paths: Sequence[Path]) -> dict[str, Path]:
    """These images, by their paths below the folder that is common to all."""
    if (other := next((path for path in paths if not is_image(path)), None)) is not None:
        raise InvalidInput(
            f"several files are sent as a zip of images, and {str(other)!r} has no image suffix: "
            f"expected {named_images()}"
        )
    whole = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - `absolute` leaves `..`, `resolve` no links
    common = os.path.commonpath([path.parent for path in whole])
    images = {path.relative_to(common).as_posix(): path for path in whole}
    if len(images) < len(paths):
        twice = next(path for path in whole if whole.count(path) > 1)
        raise InvalidInput(f"{str(twice)!r} appears twice: its records would be ambiguous")
    return images


def is_image(path: Path) -> bool:
    return MEDIA_TYPES.get(path.suffix.lower(), "").startswith("image/")


def named_images() -> str:
    return ", ".join(f"*{suffix}" for suffix, media_type in MEDIA_TYPES.items() if media_type.startswith("image/"))


def _of_images(images: Mapping[str, Path], filename: str | None = None) -> Content:
    """A zip, written while it is sent. Equal images give equal bytes."""

    def blocks() -> Iterator[bytes]:
        sink = _Sink()
        with zipfile.ZipFile(sink, "w") as archive:  # type: ignore[call-overload]
            for name, path in images.items():
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
                if sink.size >= BLOCK:
                    yield sink.taken()
        yield sink.taken()

    return Content(blocks, MEDIA_TYPES[".zip"], filename=filename)


class _Sink:
    """A buffer of written bytes that were not yet taken. It is not seekable, so sizes follow the data."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self.size = 0

    def write(self, data: bytes) -> int:
        self._blocks.append(bytes(data))
        self.size += len(data)
        return len(data)

    def flush(self) -> None: ...

    def taken(self) -> bytes:
        blocks, self._blocks, self.size = self._blocks, [], 0
        return b"".join(blocks)


def _of_file(file: Any) -> Content:
    name = getattr(file, "name", None)
    filename = Path(name).name if isinstance(name, str) else None
    media_type = MEDIA_TYPES.get(Path(filename or "").suffix.lower(), UNKNOWN)
    if not file.seekable():
        return Content(lambda: _read(file), media_type, filename=filename, repeatable=False)
    start = file.tell()
    length = file.seek(0, os.SEEK_END) - start

    def blocks() -> Iterator[bytes]:
        file.seek(start)
        return _read(file)

    return Content(blocks, media_type, length, filename=filename)


def _read(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _of_table(table: Table) -> Content:
    """An Arrow stream, made while it is sent; a short one at once, so that its length is known."""
    blocks = blocks_of(table.frames())
    begin = list(islice(blocks, _FEW_BLOCKS))
    if begin[-1] == END:
        return bytes_content(b"".join(begin), MEDIA_TYPES[".arrows"])
    tries = chain([chain(begin, blocks)], (blocks_of(table.frames()) for _ in count()))
    return Content(lambda: next(tries), MEDIA_TYPES[".arrows"], repeatable=table.repeatable)


def _of_array(array: Any) -> Content:
    import numpy as np

    sent = _sendable(array, "the array")
    return bytes_content(_written(lambda file: np.save(file, sent, allow_pickle=False)), MEDIA_TYPES[".npy"])


def _of_arrays(arrays: Mapping[str, Any]) -> Content:
    import numpy as np

    sent = {name: _sendable(array, f"array {name!r}") for name, array in arrays.items()}
    return bytes_content(_written(lambda file: np.savez(file, allow_pickle=False, **sent)), MEDIA_TYPES[".npz"])


def _sendable(array: Any, name: str) -> Any:
    """Masked floats are NaN. Raises InvalidInput where an array holds what npy has no form of."""
    import numpy as np

    kind = getattr(array, "dtype", np.dtype(object)).kind
    if np.ma.is_masked(array):
        if kind != "f":
            raise InvalidInput(f"{name} has masked values: fill them (filled), or pass a DataFrame")
        return array.filled(np.nan)
    if kind == "T":  # NumPy's texts of any length
        return np.array(array.tolist(), dtype=np.str_).reshape(array.shape)
    if kind == "O":
        raise InvalidInput(
            f"{name} holds Python objects: convert it, as with astype(float) or astype(str), or pass a DataFrame"
        )
    return array


def _written(write: Callable[[BinaryIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def polars_of(content: bytes) -> "pl.DataFrame":
    """The frame that an Arrow file holds."""
    import polars as pl

    return pl.read_ipc(io.BytesIO(content))


def pandas_of(frame: "pl.DataFrame") -> "pd.DataFrame":
    """The frame as one of pandas, without a need for pyarrow: integers and booleans with nulls are nullable ones, null
    is NaN in floats and None in text."""
    import pandas as pd

    from batchserve.client.pandas_table import series_of_polars

    return pd.DataFrame({name: series_of_polars(frame.drop_in_place(name)) for name in frame.columns})


def arrow_of(frame: "pl.DataFrame") -> "pa.Table":
    """The frame as a table of pyarrow. Raises ImportError that says how to install it."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError("to_arrow() needs pyarrow: pip install pyarrow") from error
    return frame.to_arrow()


def numpy_of(content: bytes) -> "np.ndarray[Any, Any]":
    """The array that an npy file holds."""
    import numpy as np

    array: np.ndarray[Any, Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def arrays_of(content: bytes) -> "dict[str, np.ndarray[Any, Any]]":
    """The arrays that an npz file holds."""
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
