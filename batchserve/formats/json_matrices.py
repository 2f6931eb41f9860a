"""Records of NDJSON as matrices of the numbers that a model takes, and a table of the other columns.

Records with the keys of the first one, in its order and with its spaces, are a CSV with a text before each field.
"""

import re
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from batchserve.domain import Chunk, Dialect, DType
from batchserve.formats.csv_table import read_kept
from batchserve.formats.json_rows import SPACE, Row
from batchserve.formats.json_table import columns_of, read_lines
from batchserve.formats.matrices import Layout, read_layout, with_flagged
from batchserve.formats.protocol import Block, Reading

__all__ = ["read_matrices"]

_FIELD = re.compile(rb'([{,][ \t]*"([^"\\\x00-\x1f]*)"[ \t]*:[ \t]*)("[^"\\\x00-\x1f]*"|[^",\s{}\[\]]+)')


def read_matrices(
    source: BinaryIO,
    sample: list[Row],
    types: Mapping[str, DType],
    chunk: Chunk,
    blocks: Sequence[Block],
    kept: Sequence[str],
) -> Reading | None:
    """The `blocks` of a chunk, and the columns that are `kept`: those of blocks as they are written. None where polars
    must read it: backslashes, nested values, lines that differ in form, many odd numbers."""
    numbers = {name: block.dtype for block in blocks for name in block.columns}
    schema = columns_of(sample, types)
    written = columns_of(sample, {}) if not numbers.keys().isdisjoint(kept) else {}
    rest = {name: written.get(name) if name in numbers else schema[name] for name in schema if name in set(kept)}
    plain = {name: dtype for name, dtype in rest.items() if dtype is not None}
    if len(plain) < len(rest):
        return None
    order: list[str] = []

    def layout_of(line: bytes) -> Layout | None:
        layout = _layout_of(line)
        if layout is None or not {*numbers, *rest} <= set(layout.names):
            return None
        order.extend(name for name in layout.names if name in rest)
        return layout

    texts = {name for name, dtype in plain.items() if dtype == "string"}
    fields = read_layout(source, chunk, layout_of, blocks, rest, texts)
    if fields is None or (written and _has_negative_zero(fields.kept)):
        return None
    frame = read_kept(fields.kept, Dialect(), order, plain, chunk.records)
    if frame is None:
        return None

    def read(lines: bytes, records: int) -> Reading:
        return read_lines(lines, Chunk(0, records, 0, len(lines)), schema, list(numbers))

    return with_flagged(Reading(frame, [], fields.matrices), fields, blocks, read)


def _has_negative_zero(kept: bytes) -> bool:
    """Whether a number may be written as -0, which is 0 in JSON and -0.0 in the CSV that the kept columns become."""
    return b"-0," in kept or b"-0\n" in kept


def _layout_of(line: bytes) -> Layout | None:
    """That of a record without nested values; None where its keys are not plain or not distinct."""
    names: list[str] = []
    before: list[bytes] = []
    at = 0
    for field in _FIELD.finditer(line):
        if field.start() != at:
            return None
        text, name, _ = field.groups()
        try:
            names.append(name.decode())
        except UnicodeDecodeError:
            return None
        before.append(text if text[:1] == b"{" else text[1:])
        at = field.end()
    after = line[at:].removesuffix(b"\n")
    if after.strip(SPACE) != b"}" or not names or len(set(names)) < len(names):
        return None
    return Layout(tuple(names), ",", before=tuple(before), after=after)
