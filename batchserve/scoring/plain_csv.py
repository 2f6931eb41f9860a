"""A small CSV of plain numbers, some of which may be missing: read into the inputs of a model, and written with its
outputs, without a table. Several of them are scored in one run.

Only what certainly gives the result of the road for all others, to the byte, is plain; anything else is not, and is
left to that road.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import chain

import numpy as np
import orjson
import polars as pl

from batchserve.domain import Chunk, Dialect, DType, InputTensor, ModelVersion, Options, OutputTensor, Signature
from batchserve.errors import InvalidInput
from batchserve.formats.csv import Csv
from batchserve.formats.protocol import Tensors
from batchserve.formats.schema import numpy_type
from batchserve.inference.binding import Binding, columns_of
from batchserve.inference.matching import Match
from batchserve.inference.outputs import column_names
from batchserve.inference.run import varies
from batchserve.scoring.plain import ModelUse, match_by_names
from batchserve.scoring.results import names_beside

__all__ = ["PlainCsv", "Plan", "plan_of", "read_plain"]

_NUMBERS = b"0123456789.+-eE\n"
"""What numbers consist of, and the ends of their lines."""
_DELIMITERS = (",", ";", "|", "\t")
_TEXTS = bytes([*range(0x20, 0x7F), *range(0x80, 0x100)]).replace(b'"', b"")
"""What the texts of fields without quotation marks consist of, besides a delimiter that is no blank."""
_BOM = b"\xef\xbb\xbf"
_LOST_SIGN = re.compile(rb"-0(?<![eE]-0)(?!\.)")
"""JSON has no negative zero among the integers."""
_MISSING = re.compile(rb"(?<=,)(?=[,\]])|(?<=\[)(?=,)")
"""Not between two brackets: a blank line is no record."""
_KINDS = {"float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}
_WRITTEN = {*_KINDS, "uint64", "bool", "string"}
"""Types whose values are written as polars writes them."""
_FLOATS = ("float32", "float64")
_EXACT = 2**53
"""Up to here float64 holds each integer."""
_MIDDLE = np.uint64(1 << 28)
_BELOW = np.uint64((1 << 29) - 1)
"""The bits of a float64 that a float32 does not have, and the first of these."""
_SMALLEST = 2.0**-126
_LARGEST = 3.4e38
"""Between them a float32 has all its bits."""
_LARGEST_WIDE = 1e308

Rows = list[list[float | None]]
"""The numbers of each record; None is a missing one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the records of a header fill the inputs of a model, and how they are written with its answers."""

    signature: Signature
    """The model's, without the inputs that the options set."""
    shared: Tensors
    """Inputs set by the options."""
    delimiter: bytes
    before: int
    """Columns of texts before those that hold numbers."""
    numbers: int
    """Columns from the first to the last that the model takes."""
    after: int
    sources: Mapping[str, tuple[int, ...]]
    """The columns that fill each input, counted from the first one that the model takes."""
    needed: Mapping[str, Sequence[int]]
    """The columns of each input in which the model does not answer a missing number."""
    passed: tuple[int, ...]
    """The columns that pass through, in their order in the result."""
    head: bytes
    """The header line of the result."""

    @property
    def is_split(self) -> bool:
        """Whether a number passes through as it is written."""
        return any(self.before <= place < self.before + self.numbers for place in self.passed)

    @property
    def picked(self) -> tuple[int, ...]:
        """The places of what passes through among the fields of `_Lines`."""
        skipped = 0 if self.is_split else self.numbers
        return tuple(place if place < self.before else place - skipped for place in self.passed)


@dataclass(frozen=True, slots=True)
class PlainCsv:
    """See `plain.Plain`."""

    plan: Plan
    chunk: Chunk
    inputs: Tensors
    passed: Sequence[bytes] = field(repr=False)
    """What passes through of each record, as it is written."""

    @property
    def signature(self) -> Signature:
        return self.plan.signature

    @property
    def shared(self) -> Tensors:
        return self.plan.shared

    def write(self, outputs: Tensors) -> bytes | None:
        columns = [self.passed] if self.plan.passed else []
        for output in self.plan.signature.outputs:
            texts = _texts(output, len(column_names(self.plan.signature, output)), outputs[output.name], self.plan)
            if texts is None:
                return None
            columns.append(texts)
        lines = map(self.plan.delimiter.join, zip(*columns, strict=True))
        return b"%b%b\n" % (self.plan.head, b"\n".join(lines))


# Planning


def plan_of(header: bytes, dialect: Dialect, model: ModelVersion, options: Options) -> Plan | None:
    """The plan for inputs with this header line; None: they are never plain."""
    return _planned(header, dialect, ModelUse(model, options))


@lru_cache(maxsize=256)
def _planned(header: bytes, dialect: Dialect, use: ModelUse) -> Plan | None:
    signature, options = use.model.signature, use.options
    if options.format != "csv" or options.top_k is not None or signature.mode != "rows" or varies(signature):
        return None
    if dialect.decimal != "." or dialect.delimiter not in _DELIMITERS or b'"' in header:
        return None
    reader = Csv(dialect.delimiter)
    try:
        match = match_by_names(reader.header(BytesIO(header)), use)
        head = None if match is None else reader.write(_no_records(match))
    except (InvalidInput, pl.exceptions.PolarsError):
        return None  # the other road tells why
    if match is None or head is None or not match.signature.inputs:
        return None
    if not _takes_numbers(match.signature.inputs, match.binding) or not _is_flat(match):
        return None
    names = list(match.header.columns)
    places = {name: [names.index(source) for source in match.binding.sources[name]] for name in match.binding.sources}
    first, last = min(chain.from_iterable(places.values())), max(chain.from_iterable(places.values()))
    return Plan(
        signature=match.signature,
        shared=match.shared,
        delimiter=dialect.delimiter.encode(),
        before=first,
        numbers=last + 1 - first,
        after=len(names) - 1 - last,
        sources={name: tuple(place - first for place in there) for name, there in places.items()},
        needed={tensor.name: _needed(tensor, match.binding) for tensor in match.signature.inputs},
        passed=tuple(map(names.index, match.passed)),
        head=head,
    )


def _takes_numbers(tensors: Sequence[InputTensor], binding: Binding) -> bool:
    """Whether each input has numbers of one type from columns of that type, and answers all finite ones."""
    return not binding.arrays and all(
        (tensor.dtype in _KINDS and tensor.per_record and tensor.image is None and len(tensor.shape) < 3)
        and all(column.dtype == tensor.dtype for column in columns_of(tensor, binding.sources[tensor.name]))
        and all(binding.types[source] == tensor.dtype for source in binding.sources[tensor.name])
        and all(domain.is_plain for domain in tensor.domains)
        for tensor in tensors
    )


def _needed(tensor: InputTensor, binding: Binding) -> list[int]:
    columns = columns_of(tensor, binding.sources[tensor.name])
    return [place for place, column in enumerate(columns) if not column.nullable]


def _is_flat(match: Match) -> bool:
    """Whether each column of the result holds plain values."""
    return not match.result().lists and all(output.dtype in _WRITTEN for output in match.signature.outputs)


def _no_records(match: Match) -> pl.DataFrame:
    """The columns of the result."""
    added = list(match.result().columns)
    return pl.DataFrame(schema=names_beside(match.passed, added) + added)


# Reading


def read_plain(content: bytes, dialect: Dialect, model: ModelVersion, options: Options) -> PlainCsv | None:
    """The records of a CSV; None: they are not plain."""
    start = content.find(b"\n") + 1
    plan = plan_of(content[:start], dialect, model, options) if 0 < start < len(content) else None
    lines = None if plan is None else _Lines.of(content[start:], plan)
    if plan is None or lines is None:
        return None
    rows = lines.values(plan)
    inputs = None if rows is None else _inputs(rows, plan)
    if rows is None or inputs is None:
        return None
    return PlainCsv(plan, Chunk(0, len(rows), start, len(content)), inputs, lines.passed)


@dataclass(frozen=True, slots=True)
class _Lines:
    numbers: Sequence[bytes]
    """Of each record the columns from the first to the last that the model takes."""
    passed: Sequence[bytes]
    """Of each record what passes through."""

    @classmethod
    def of(cls, body: bytes, plan: Plan) -> "_Lines | None":
        """The lines below a header; None: they are not plain."""
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
        others = body.translate(None, _NUMBERS + plan.delimiter)
        if others and not _is_plain_text(body, others, plan.delimiter):
            return None
        lines = body.removesuffix(b"\n").split(b"\n")
        if not plan.before and not plan.after:
            numbers, rest = lines, []
        else:
            rest = [_fields_around(line, plan) for line in lines]
            if any(len(fields) != plan.before + 1 + plan.after for fields in rest):
                return None
            numbers = [fields.pop(plan.before) for fields in rest]
        if others and b"".join(numbers).translate(None, _NUMBERS + plan.delimiter):
            return None
        return cls(numbers, _passed(lines, rest, plan))

    def values(self, plan: Plan) -> Rows | None:
        """The numbers of each record; None: they are not plain."""
        text = b"],[".join(self.numbers)
        if b"-0" in text and _LOST_SIGN.search(text):
            return None
        text = b"[[%b]]" % text.replace(plan.delimiter, b",")
        rows = _parsed(text) or _parsed(_MISSING.sub(b"null", text))
        return rows if rows is not None and set(map(len, rows)) == {plan.numbers} else None


def _parsed(text: bytes) -> Rows | None:
    try:
        rows: Rows = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return rows


def _is_plain_text(body: bytes, others: bytes, delimiter: bytes) -> bool:
    """Whether a text with these `others` than numbers comes back as it is: without quotation marks, control characters,
    and blanks at the ends of fields."""
    if others.translate(None, _TEXTS):
        return False
    if b" " in others:
        ends = (b" " + delimiter, delimiter + b" ", b" \n", b"\n ")
        if any(end in body for end in ends) or body.startswith(b" ") or body.endswith(b" "):
            return False
    with suppress(UnicodeDecodeError):
        return others.isascii() or (bool(body.decode()) and not body.startswith(_BOM))
    return False


def _fields_around(line: bytes, plan: Plan) -> list[bytes]:
    """The fields of a record; those from the first to the last that the model takes are one."""
    fields = line.split(plan.delimiter, plan.before)
    return fields + fields.pop().rsplit(plan.delimiter, plan.after) if plan.after else fields


def _passed(lines: Sequence[bytes], rest: list[list[bytes]], plan: Plan) -> Sequence[bytes]:
    """What passes through of each record. `rest`: its fields without those from the first to the last that the model
    takes."""
    if plan.passed == tuple(range(plan.before + plan.numbers + plan.after)):
        return lines
    if plan.is_split:
        rest = [line.split(plan.delimiter) for line in lines]
        if any(len(fields) != plan.before + plan.numbers + plan.after for fields in rest):
            return []  # which their numbers show, too
    picked = plan.picked
    return [plan.delimiter.join([fields[place] for place in picked]) for fields in rest]


def _inputs(rows: Rows, plan: Plan) -> Tensors | None:
    """The numbers of the records as inputs of the model; None: the other road must round one, or refuse it."""
    inputs: Tensors = {}
    for tensor in plan.signature.inputs:
        places = plan.sources[tensor.name]
        own = rows if places == tuple(range(plan.numbers)) else [[row[place] for place in places] for row in rows]
        is_float = tensor.dtype in _FLOATS
        array = _floats(own, tensor.dtype, plan.needed[tensor.name]) if is_float else _integers(own, tensor.dtype)
        if array is None:
            return None
        inputs[tensor.name] = array[:, 0] if len(tensor.shape) == 1 else array
    return inputs


def _floats(rows: Rows, dtype: DType, needed: Sequence[int]) -> np.ndarray | None:
    """A text is rounded to float64, and then to float32. That is what it is rounded to at once, unless it becomes the
    middle of two float32s: an integer that is one, but not a text that is rounded to one. A missing number is NaN."""
    wide = np.array(rows, np.float64)
    size = np.abs(wide)
    if np.isnan(size.max()):
        missing = np.isnan(size)
        if missing[:, needed].any():
            return None
        size[missing] = 0
    if dtype == "float64":
        return wide if size.max() < _LARGEST_WIDE else None
    if size.max() >= _LARGEST or ((size < _SMALLEST) & (size != 0)).any():
        return None
    middle = (size.view(np.uint64) & _BELOW) == _MIDDLE
    if middle.any() and not all(_is_exact(rows[row][place]) for row, place in np.argwhere(middle)):
        return None
    return wide.astype(np.float32)


def _is_exact(value: object) -> bool:
    return isinstance(value, int) and -_EXACT <= value <= _EXACT


def _integers(rows: Rows, dtype: DType) -> np.ndarray | None:
    array, kind = np.array(rows), numpy_type(dtype)
    if array.dtype != np.int64:
        return None
    limits = np.iinfo(kind)
    fits = array.min() >= limits.min and array.max() <= limits.max
    return array.astype(kind) if fits else None


# Writing


def _texts(output: OutputTensor, width: int, array: np.ndarray, plan: Plan) -> Sequence[bytes] | None:
    """The fields of an output in each record; None: the other road must write them."""
    if array.ndim > 2 or array.dtype != numpy_type(output.dtype):
        return None
    matrix = array[:, np.newaxis] if array.ndim == 1 else array[:, :width]
    if matrix.shape[1] != width:
        return None
    if matrix.dtype.kind == "O":
        if not all(_is_plain_label(value, plan.delimiter) for value in set(matrix.flat)):
            return None
        return [plan.delimiter.join([value.encode() for value in row]) for row in matrix]
    if matrix.dtype.kind == "f" and not np.isfinite(matrix).all():
        return None
    text = orjson.dumps(np.ascontiguousarray(matrix), option=orjson.OPT_SERIALIZE_NUMPY)[2:-2]
    rows = text.split(b"],[")
    return rows if width == 1 or plan.delimiter == b"," else [row.replace(b",", plan.delimiter) for row in rows]


def _is_plain_label(value: object, delimiter: bytes) -> bool:
    return (
        type(value) is str
        and (value.isprintable() and bool(value) and value == value.strip())
        and ('"' not in value and delimiter.decode() not in value)
    )
