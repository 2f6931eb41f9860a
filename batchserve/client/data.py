"""What users hand in, as the body of a request; and results in the form users want. Heavy libraries come in lazily."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from batchserve.client.transport import BLOCK, Body

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl

    Frame: TypeAlias = pd.DataFrame | pl.DataFrame
    Arrays: TypeAlias = np.ndarray[Any, Any] | Mapping[str, np.ndarray[Any, Any]]
    Data: TypeAlias = (
        str | os.PathLike[str] | bytes | BinaryIO | Frame | Arrays | Sequence[Mapping[str, Any]] | Mapping[str, Any]
    )

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
    ".onnx": "application/octet-stream",
}
UNKNOWN = "application/octet-stream"
"""The server looks at the bytes."""

_FORMATS = {".tsv": "csv", ".ndjson": "jsonl", ".feather": "arrow"}
_ENCODINGS = {".gz": "gzip", ".zst": "zstd"}
_RECORDS_IN_BATCH = 65_536


def body_of(data: "Data") -> Body:
    """The body that carries `data`: a path (`str` too), bytes, a binary file, a DataFrame of pandas or polars, an array
    or a mapping of arrays of numpy, one record (a mapping) or a list of records. Files are read block by block."""
    if isinstance(data, str | os.PathLike):
        return _of_path(Path(data))
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes_body(bytes(data), UNKNOWN)
    if hasattr(data, "read"):
        return _of_file(data)
    match library_of(data):
        case "polars":
            return _of_polars(data)  # type: ignore[arg-type]
        case "pandas":
            return _of_polars(_polars_of_pandas(data))  # type: ignore[arg-type]
        case "numpy":
            return _of_array(data)
    if holds_arrays(data):
        return _of_arrays(data)  # type: ignore[arg-type]
    if isinstance(data, Mapping | Sequence):
        return bytes_body(json.dumps(data).encode(), "application/json")
    raise TypeError(
        f"cannot send a {type(data).__name__}: expected a path, bytes, a binary file, a DataFrame, a numpy array "
        "or a list of records"
    )


def format_of(path: Path) -> str | None:
    """The `format` option that a file name asks for; None if it tells none."""
    suffix = path.suffix.lower()
    return _FORMATS.get(suffix, suffix[1:]) if suffix in MEDIA_TYPES else None


def bytes_body(content: bytes, media_type: str) -> Body:
    view = memoryview(content)

    def blocks() -> Iterator[bytes]:
        for start in range(0, len(view), BLOCK):
            yield bytes(view[start : start + BLOCK])

    return Body(blocks, media_type, len(content))


def holds_arrays(data: object) -> bool:
    return isinstance(data, Mapping) and bool(data) and all(library_of(value) == "numpy" for value in data.values())


def library_of(data: object) -> str:
    """The package that the type of `data` comes from."""
    return type(data).__module__.partition(".")[0]


def _of_path(path: Path) -> Body:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    encoding = _ENCODINGS.get(suffixes[-1]) if suffixes else None
    suffix = suffixes[-2] if encoding and len(suffixes) > 1 else "".join(suffixes[-1:])

    def blocks() -> Iterator[bytes]:
        with path.open("rb") as file:
            yield from _read(file)

    return Body(blocks, MEDIA_TYPES.get(suffix, UNKNOWN), path.stat().st_size, encoding, path.name)


def _of_file(file: Any) -> Body:
    name = getattr(file, "name", None)
    filename = Path(name).name if isinstance(name, str) else None
    media_type = MEDIA_TYPES.get(Path(filename or "").suffix.lower(), UNKNOWN)
    if not file.seekable():
        return Body(lambda: _read(file), media_type, filename=filename, repeatable=False)
    start = file.tell()
    length = file.seek(0, os.SEEK_END) - start

    def blocks() -> Iterator[bytes]:
        file.seek(start)
        return _read(file)

    return Body(blocks, media_type, length, filename=filename)


def _read(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _of_polars(frame: "pl.DataFrame") -> Body:
    buffer = io.BytesIO()
    frame.write_ipc(buffer, compression="zstd", record_batch_size=_RECORDS_IN_BATCH)
    return bytes_body(buffer.getvalue(), MEDIA_TYPES[".arrow"])


def _of_array(array: Any) -> Body:
    import numpy as np

    return bytes_body(_written(lambda file: np.save(file, array, allow_pickle=False)), MEDIA_TYPES[".npy"])


def _of_arrays(arrays: Mapping[str, Any]) -> Body:
    import numpy as np

    return bytes_body(_written(lambda file: np.savez(file, allow_pickle=False, **arrays)), MEDIA_TYPES[".npz"])


def _written(write: Callable[[BinaryIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _polars_of_pandas(frame: "pd.DataFrame") -> "pl.DataFrame":
    """Column by column, which needs no pyarrow. The index stays behind; NaN, NaT and None become null."""
    import numpy as np
    import polars as pl

    def values(column: "pd.Series[Any]") -> Any:
        if column.dtype.kind in "biufM" and isinstance(column.dtype, np.dtype):
            return column.to_numpy()
        return column.astype(object).where(column.notna(), None).tolist()

    return pl.DataFrame(
        {str(name): pl.Series(str(name), values(frame[name]), nan_to_null=True) for name in frame.columns}
    )


def polars_of(content: bytes) -> "pl.DataFrame":
    """The frame that an Arrow file holds."""
    import polars as pl

    return pl.read_ipc(io.BytesIO(content))


def pandas_of(content: bytes) -> "pd.DataFrame":
    """The frame that an Arrow file holds, without a need for pyarrow: null is NaN in numbers, None in text."""
    import pandas as pd

    frame = polars_of(content)
    return pd.DataFrame({column.name: column.to_numpy() for column in frame.iter_columns()})


def numpy_of(content: bytes) -> "np.ndarray[Any, Any]":
    """The array that an npy file holds."""
    import numpy as np

    array: np.ndarray[Any, Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def structured_of(content: bytes) -> "np.ndarray[Any, Any]":
    """The columns that an Arrow file holds, as the fields of one array."""
    return polars_of(content).to_numpy(structured=True)


def arrays_of(content: bytes) -> "dict[str, np.ndarray[Any, Any]]":
    """The arrays that an npz file holds."""
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
