"""Thrift's compact protocol, read and written independently of the meaning of fields.

A struct becomes a dict from field number to (wire type, value); writing it gives the same bytes again. The protocol:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from dataclasses import dataclass
from typing import Any

__all__ = [
    "BINARY", "I16", "I32", "I64", "LIST", "STRUCT", "Encoded", "Struct", "ThriftError", "dump", "end_of", "load",
    "number_at",
]  # fmt: skip

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(1, 14)

Struct = dict[int, tuple[int, Any]]
"""Values: int, bool, bytes (BINARY, DOUBLE, UUID), Struct, (element type, values), (key type, value type, items)."""

_DEPTH = 32
_FIXED = {DOUBLE: 8, UUID: 16}


class ThriftError(ValueError):
    """The bytes are not a struct in the compact protocol."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded struct, allowed in place of a Struct."""

    data: bytes


def load(data: bytes) -> Struct:
    """The struct at the beginning of the bytes. Raises ThriftError."""
    try:
        return _Reader(data).struct(0)
    except IndexError as error:
        raise ThriftError("the struct has no end") from error


def end_of(data: bytes, field: int) -> int:
    """Where the fields of a struct up to this one end, if they come in order. Raises ThriftError."""
    try:
        return _Reader(data).end_of(field)
    except IndexError as error:
        raise ThriftError("the struct has no end") from error


def number_at(data: bytes, position: int) -> int:
    """The number of the next field, which is the one after that before it. Raises ThriftError."""
    try:
        return _Reader(data, position).next_number()
    except IndexError as error:
        raise ThriftError("the struct has no end") from error


def dump(struct: Struct) -> bytes:
    """The bytes of a struct."""
    out = bytearray()
    _write_struct(out, struct)
    return bytes(out)


class _Reader:
    def __init__(self, data: bytes, position: int = 0) -> None:
        self._data, self._position = data, position

    def end_of(self, field: int) -> int:
        number = 0
        while number < field and (head := self._byte()):
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            if head & 15 not in (TRUE, FALSE):
                self._value(head & 15, 0)
        if number != field:
            raise ThriftError(f"there is no field {field}")
        return self._position

    def next_number(self) -> int:
        if self._byte() not in (1 << 4 | I32, 1 << 4 | I64):
            raise ThriftError("the next field is no number")
        return self._zigzag()

    def struct(self, depth: int) -> Struct:
        if depth > _DEPTH:
            raise ThriftError("structs are nested too deeply")
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            # A boolean field has its value in its type.
            fields[number] = (kind, kind == TRUE) if kind in (TRUE, FALSE) else (kind, self._value(kind, depth))
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEPTH:
            raise ThriftError("values are nested too deeply")
        match kind:
            case 1 | 2:
                return self._byte() == TRUE
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 8:
                return self._take(self._varint())
            case 9 | 10:
                head = self._byte()
                size = self._varint() if head >> 4 == 15 else head >> 4
                self._check(size)
                return head & 15, [self._value(head & 15, depth + 1) for _ in range(size)]
            case 11:
                size = self._varint()
                self._check(size)
                kinds = self._byte() if size else 0
                key, value = kinds >> 4, kinds & 15
                return key, value, [(self._value(key, depth + 1), self._value(value, depth + 1)) for _ in range(size)]
            case 12:
                return self.struct(depth + 1)
            case _ if kind in _FIXED:
                return self._take(_FIXED[kind])
            case _:
                raise ThriftError(f"there is no type {kind}")

    def _check(self, size: int) -> None:
        # Every element has at least one byte: a short input cannot claim much memory.
        if size > len(self._data) - self._position:
            raise ThriftError(f"a list of {size} elements does not fit")

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _take(self, size: int) -> bytes:
        self._check(size)
        self._position += size
        return self._data[self._position - size : self._position]

    def _varint(self) -> int:
        result = shift = 0
        while (byte := self._byte()) & 0x80:
            result |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ThriftError("a number is too long")
        return result | byte << shift

    def _zigzag(self) -> int:
        number = self._varint()
        return number >> 1 ^ -(number & 1)


def _write_struct(out: bytearray, struct: Struct | Encoded) -> None:
    if isinstance(struct, Encoded):
        out += struct.data
        return
    last = 0
    for number, (kind, value) in struct.items():
        if 0 < number - last < 16:
            out.append((number - last) << 4 | kind)
        else:
            out.append(kind)
            _write_zigzag(out, number)
        if kind not in (TRUE, FALSE):
            _write_value(out, kind, value)
        last = number
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    match kind:
        case 1 | 2:
            out.append(TRUE if value else FALSE)
        case 3:
            out.append(value)
        case 4 | 5 | 6:
            _write_zigzag(out, value)
        case 8:
            _write_varint(out, len(value))
            out += value
        case 9 | 10:
            _write_list(out, *value)
        case 11:
            _write_map(out, *value)
        case 12:
            _write_struct(out, value)
        case _:
            out += value


def _write_list(out: bytearray, element: int, values: list[Any]) -> None:
    out.append(min(len(values), 15) << 4 | element)
    if len(values) >= 15:
        _write_varint(out, len(values))
    for value in values:
        _write_value(out, element, value)


def _write_map(out: bytearray, key: int, element: int, items: list[tuple[Any, Any]]) -> None:
    _write_varint(out, len(items))
    if items:
        out.append(key << 4 | element)
    for name, value in items:
        _write_value(out, key, name)
        _write_value(out, element, value)


def _write_zigzag(out: bytearray, number: int) -> None:
    _write_varint(out, number << 1 ^ number >> 63)


def _write_varint(out: bytearray, number: int) -> None:
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
