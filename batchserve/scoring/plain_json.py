"""A small NDJSON or JSON of plain records: read into the inputs of a model, and written with its outputs, without a
table.

What is plain is decided as for online requests; all else is left to the road for all inputs, which gives the same
result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from batchserve.domain import Chunk, ModelVersion, Options, Signature
from batchserve.formats.json_rows import SPACE
from batchserve.formats.protocol import Header, Tensors
from batchserve.inference.answers import without_answer
from batchserve.scoring import plain_records
from batchserve.scoring.plain import ModelUse, match_by_names

__all__ = ["PlainJson", "read_json"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlainJson:
    """See `plain.Plain`."""

    plan: plain_records.Plan
    chunk: Chunk
    inputs: Tensors
    passed: Sequence[Row]
    """What passes through of each record."""
    is_array: bool
    """Whether the result is JSON."""

    @property
    def signature(self) -> Signature:
        return self.plan.signature

    @property
    def shared(self) -> Tensors:
        return {}

    def write(self, outputs: Tensors) -> bytes | None:
        failed = np.zeros(self.chunk.records, bool)
        added = self.plan.outputs(outputs)
        if added is None or any(without_answer(self.signature, outputs, failed)):
            return None
        rows = zip(*added.values(), strict=True)
        lines = [
            orjson.dumps(passed | dict(zip(added, values, strict=True)), option=orjson.OPT_SERIALIZE_NUMPY)
            for passed, values in zip(self.passed, rows, strict=True)
        ]
        return b"[%b]\n" % b",\n".join(lines) if self.is_array else b"%b\n" % b"\n".join(lines)


def read_json(content: bytes, format: str, model: ModelVersion, options: Options) -> PlainJson | None:
    """The records of an NDJSON or JSON; None: they are not plain."""
    plan = plain_records.plan_of(model.signature, options) if options.format in ("jsonl", "json") else None
    found = None if plan is None else _found(content, format)
    values = None if plan is None or found is None else plain_records.values_of(plan, found[0])
    if plan is None or found is None or values is None:
        return None
    records, chunk = found
    passed = _passed(tuple(records[0]), ModelUse(model, options))
    if passed is None:
        return None
    inputs = plan.inputs(np.array(values, np.float32))
    rows = [{name: record[name] for name in passed} for record in records]
    return PlainJson(plan, chunk, inputs, rows, options.format == "json")


def _found(content: bytes, format: str) -> tuple[list[Row], Chunk] | None:
    """Plain records, and their chunk."""
    start, stop = 0, len(content)
    if format == "jsonl":
        records = plain_records.parsed_lines(content)
    else:
        records = plain_records.parsed(content, format, stop)
        start = stop - len(content.lstrip(SPACE))
        if records and content[start : start + 1] == b"[":
            start, stop = start + 1, content.rindex(b"]")
    return (records, Chunk(0, len(records), start, stop)) if records else None


@lru_cache(maxsize=256)
def _passed(names: tuple[str, ...], use: ModelUse) -> tuple[str, ...] | None:
    """Which of the keys pass through; None: it depends on their values."""
    match = match_by_names(Header(dict.fromkeys(names), dict), use)
    return None if match is None else match.passed
