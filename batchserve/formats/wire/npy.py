"""One array in NumPy's own file format, read by offsets.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batchserve.errors import InvalidInput

__all__ = [
    "ArrayHeader",
    "array_bytes",
    "blocks",
    "header_bytes",
    "native",
    "read_header",
    "read_records",
    "read_scalar",
]

_BLOCK = 2**20
_SURROGATES = range(0xD800, 0xE000)
_NUMBERS = "biufSU"
_HEADER_ERRORS = (ValueError, EOFError, OSError, TypeError, KeyError, SyntaxError, TokenError, RecursionError)
"""What numpy raises for a damaged header, which it parses as a Python literal."""


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """The header of an array; its values begin at byte `data` of the stream and have `bytes` bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    data: int

    @property
    def records(self) -> int:
        return self.shape[0]

    @property
    def values_per_record(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def bytes_per_record(self) -> int:
        return self.dtype.itemsize * self.values_per_record

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(stream: IO[bytes], start: int, stop: int, what: str) -> ArrayHeader:
    """The header of the array that stands in bytes `start` to `stop` of a stream; `what` names it in errors.

    Raises InvalidInput for anything but a complete array of numbers or strings.
    """
    stream.seek(start)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except _HEADER_ERRORS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidInput(f"{what} is not an npy array:  {reason}") from error
    if version >= (3, 0) and dtype.names:
        # Version 3 is version 2 with field names in UTF-8, which were just read as Latin-1.
        dtype.names = tuple(name.encode("latin-1").decode() for name in dtype.names)
    header = ArrayHeader(dtype, shape, fortran, stream.tell())
    _check(header, stop, what)
    return header


def read_records(stream: IO[bytes], header: ArrayHeader, first: int, records: int) -> npt.NDArray[Any]:
    """The records from `first` on, in native byte order; bytes become strings.

    Raises InvalidInput when the stream ends before them or a byte string is not UTF-8.
    """
    shape = (records, *header.shape[1:])
    if header.fortran and len(shape) > 1:
        # The values of all records for one place lie together, and the places are in Fortran order, too.
        places = np.empty((header.values_per_record, records), header.dtype)
        for place, values in enumerate(places):
            values[:] = _values(stream, header, place * header.records + first, records)
        array = places.T.reshape(shape, order="F")
    else:
        per_record = header.values_per_record
        array = _values(stream, header, first * per_record, records * per_record).reshape(shape)
    return array if array.dtype.names else native(array)


def read_scalar(stream: IO[bytes], header: ArrayHeader) -> npt.NDArray[Any]:
    """The only value of an array without axes."""
    return native(_values(stream, header, 0, 1).reshape(()))


def header_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of an array in C order."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def array_bytes(array: npt.NDArray[Any]) -> bytes:
    """A complete npy file of an array, its values in C order and little-endian. Objects become strings."""
    if array.dtype.hasobject:
        array = np.asarray(["" if value is None else str(value) for value in array.ravel()], np.str_).reshape(
            array.shape
        )
    array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    return header_bytes(array.dtype, array.shape) + array.tobytes()


def blocks(stream: IO[bytes], header: ArrayHeader) -> Iterator[bytes]:
    """The raw values of an array, about 1 MiB of whole values at a time."""
    stream.seek(header.data)
    block = max(1, _BLOCK // header.dtype.itemsize) * header.dtype.itemsize
    for left in range(header.bytes, 0, -block):
        yield stream.read(min(block, left))


def _check(header: ArrayHeader, stop: int, what: str) -> None:
    dtype = header.dtype
    if dtype.hasobject:
        raise InvalidInput(f"{what} holds Python objects (dtype {dtype}): save it as numbers or strings")
    if inner := [name for name in dtype.names or () if dtype[name].subdtype]:
        raise InvalidInput(
            f"{what} has an array in its field {inner[0]!r}, expected numbers, booleans or strings: "
            "save an npz with one array for each field"
        )
    kinds = [dtype[name] for name in dtype.names] if dtype.names else [dtype]
    for kind in kinds:
        if kind.kind not in _NUMBERS or kind.itemsize == 0 or (kind.kind == "f" and kind.itemsize > 8):
            raise InvalidInput(f"{what} has dtype {dtype}: expected numbers, booleans or strings")
    if any(length < 0 for length in header.shape) or (header.shape and header.values_per_record == 0):
        raise InvalidInput(f"{what} has shape {header.shape}: a record would hold no value")
    if header.data + header.bytes > stop:
        raise InvalidInput(
            f"{what} is cut off: its shape {header.shape} and dtype {dtype} need {header.bytes} bytes, "
            f"got {max(0, stop - header.data)}"
        )


def _values(stream: IO[bytes], header: ArrayHeader, first: int, count: int) -> npt.NDArray[Any]:
    length = count * header.dtype.itemsize
    stream.seek(header.data + first * header.dtype.itemsize)
    data = stream.read(length)
    if len(data) < length:
        raise InvalidInput(f"the array ends after {len(data)} of {length} bytes")
    return np.frombuffer(data, header.dtype)


def native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in native byte order, bytes as strings. Raises InvalidInput for bytes that are not UTF-8, and for
    strings with invalid characters."""
    if array.dtype.kind == "S":
        try:
            return np.strings.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"a byte string of the array is not UTF-8: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "U" and array.size:
        codes = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        wrong = (codes > sys.maxunicode) | ((codes >= _SURROGATES.start) & (codes < _SURROGATES.stop))
        if wrong.any():
            raise InvalidInput(f"a string of the array holds {int(codes[wrong][0]):#x}, which is not a character")
    return array
