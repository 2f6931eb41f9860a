"""A few plain records, as most online requests have: objects of numbers, texts and truth values, for a model that takes
numbers by name. Those of several requests are scored in one run, without a table.

Only what certainly gives the answer of the road for all others, to the byte, is plain; anything else is not, and is
left to that road. What is plain follows what `formats.json_table` does with a few records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import orjson

from batchserve.domain import InputTensor, Options, OutputTensor, Signature
from batchserve.formats.protocol import Tensors
from batchserve.formats.records import MAX_COLUMNS
from batchserve.formats.schema import numpy_type
from batchserve.inference.answers import without_answer
from batchserve.inference.kernels import Session
from batchserve.inference.outputs import ResultSchema, column_names
from batchserve.inference.run import run, varies

__all__ = ["MOST_BYTES", "Answered", "Plan", "parsed", "parsed_lines", "plan_of", "score_plain", "values_of"]

MOST_BYTES = 64 * 2**10
"""Of the body of a request with a few records."""
_MOST_RECORDS = 100
"""The records that determine the types of columns, all of which are here then."""
_EXACT = 2**53
"""Up to here float64 holds each integer, so that it is rounded to float32 once."""
_INT64 = range(-(2**63), 2**63)
_LARGE = 2.0**63
"""From here on a float may be an integer that orjson has rounded."""
_WRITTEN = {
    *("float32", "float64", "bool", "string"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}
"""Types whose values orjson writes as they are."""

Row = dict[str, Any]
MakeRoom = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Plan:
    """How records fill the inputs of a model and what it adds to them; made once for a version and its options."""

    signature: Signature
    names: tuple[str, ...]
    """The columns of all inputs, in their order."""
    columns: tuple[tuple[OutputTensor, tuple[str, ...]], ...]
    """The outputs, and the columns of each."""
    added: frozenset[str]
    """All those columns."""

    def inputs(self, matrix: np.ndarray) -> Tensors:
        """The inputs of the model from the values of `names`, a row for each record."""
        inputs: Tensors = {}
        stop = 0
        for tensor in self.signature.inputs:
            start, stop = stop, stop + len(tensor.columns or ())
            part = matrix if len(self.names) == stop - start else np.ascontiguousarray(matrix[:, start:stop])
            inputs[tensor.name] = part[:, 0] if len(tensor.shape) == 1 else part
        return inputs

    def outputs(self, arrays: Tensors) -> dict[str, Sequence[Any]] | None:
        """The values of each added column; None: an array is not of the type that its signature promises."""
        added: dict[str, Sequence[Any]] = {}
        for output, names in self.columns:
            array = arrays[output.name]
            if array.ndim > 2 or array.dtype != numpy_type(output.dtype):
                return None
            matrix = array[:, np.newaxis] if array.ndim == 1 else array
            if matrix.shape[1] < len(names):
                return None
            for index, name in enumerate(names):
                values = matrix[:, index]
                # numpy's float32 is written with the digits of its precision.
                added[name] = list(values) if output.dtype == "float32" else values.tolist()
            if output.dtype == "string" and not all(type(value) is str for name in names for value in added[name]):
                return None
        return added


def plan_of(signature: Signature, options: Options) -> Plan | None:
    """The plan of a model under the options of a request; None: its requests are never plain."""
    known = _plans.get(id(signature))
    if known is None or known[0] is not signature:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        known = _plans[id(signature)] = signature, _planned(signature)
    is_default = options.top_k is None and not options.columns and not options.inputs
    return known[1] if is_default else None


_plans: dict[int, tuple[Signature, Plan | None]] = {}
"""By the identity of a signature, which is kept so that no other one gets it. Signatures cannot be hashed."""
_MOST_PLANS = 256


def _planned(signature: Signature) -> Plan | None:
    is_cut = signature.mode == "rows" and not varies(signature)
    if not is_cut or not signature.inputs or not all(map(_takes_numbers, signature.inputs)):
        return None
    names = tuple(column.name for column in signature.columns)
    columns = tuple((output, tuple(column_names(signature, output))) for output in signature.outputs)
    added = list(chain.from_iterable(names for _, names in columns))
    is_written = all(output.dtype in _WRITTEN for output in signature.outputs)
    if ResultSchema(signature).lists or len(set(added)) < len(added) or not is_written:
        return None
    return Plan(signature, names, columns, frozenset(added))


def _takes_numbers(tensor: InputTensor) -> bool:
    return (
        (tensor.dtype == "float32" and tensor.per_record and tensor.image is None and len(tensor.shape) < 3)
        and (bool(tensor.columns) and all(column.dtype == "float32" for column in tensor.columns or ()))
        and all(domain.is_plain for domain in tensor.domains)
    )


# Records


def parsed(body: bytes, format: str, most: int) -> list[Row] | None:
    """The records of a JSON or NDJSON body, at most so many; None: they are not plain."""
    if len(body) > MOST_BYTES or (format != "json" and (format != "jsonl" or b"\n" in body.strip(b" \t\r\n"))):
        return None
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    records = found if type(found) is list else [found]
    return records if _are_plain(records, body, most) else None


def parsed_lines(content: bytes) -> list[Row] | None:
    """The records of a whole NDJSON; None: they are not plain."""
    try:
        records = [orjson.loads(line) for line in content.removesuffix(b"\n").split(b"\n", _MOST_RECORDS)]
    except orjson.JSONDecodeError:
        return None
    return records if _are_plain(records, content, _MOST_RECORDS) else None


def _are_plain(records: list[Any], body: bytes, most: int) -> bool:
    """Whether these are plain records, all with the same keys. Their numbers become those that a table would hold."""
    if not 0 < len(records) <= min(most, _MOST_RECORDS) or not all(type(record) is dict for record in records):
        return False
    names = records[0].keys()
    if len(names) > MAX_COLUMNS or not all(name.strip() for name in names):
        return False
    if any(record.keys() != names for record in records):
        return False
    # A colon more belongs to a text, or to a key that a record has twice.
    if body.count(b":") != len(names) * len(records):
        return False
    values = [value for record in records for value in record.values()]
    if set(map(type, values)) == {float}:  # as most are
        return bool(max(map(abs, values)) < _LARGE)
    return all(_fit_for_column(records, name) for name in list(names))


def _fit_for_column(records: list[Row], name: str) -> bool:
    """Whether the values come back as they are. Integers among other numbers become numbers with a point."""
    values = [record[name] for record in records]
    kinds = set(map(type, values))
    kinds.discard(NoneType)
    if not kinds <= {bool, int, float, str}:
        return False
    if float in kinds and any(type(value) is float and abs(value) >= _LARGE for value in values):
        return False
    if kinds == {int, float}:
        if any(type(value) is int and abs(value) > _EXACT for value in values):
            return False
        for record, value in zip(records, values, strict=True):
            record[name] = None if value is None else float(value)
        return True
    return len(kinds) < 2 and (int not in kinds or all(value is None or value in _INT64 for value in values))


# Scoring


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers to several requests."""

    bodies: list[bytes | None]
    """For each, its records with the outputs as a JSON array; None: the other road must be taken."""
    milliseconds: float
    """Time in the model, of them all."""


def score_plain(session: Session, plan: Plan, requests: list[list[Row] | None], make_room: MakeRoom) -> Answered:
    """Scores the records of several requests in one run; None is a request that is not plain. `make_room`: see `run`.

    Raises ScoringFailed when the model fails."""
    values = [values_of(plan, records) if records else None for records in requests]
    rows = list(chain.from_iterable(found for found in values if found is not None))
    if not rows:
        return Answered([None] * len(requests), 0.0)
    inputs = plan.inputs(np.array(rows, np.float32))
    ran = run(session, plan.signature, {**inputs}, len(rows), make_room)
    added = plan.outputs(ran.outputs)
    none = np.zeros(len(rows), bool)
    lost = {error.record for error in chain(ran.errors, without_answer(plan.signature, ran.outputs, none))}
    bodies: list[bytes | None] = []
    stop = 0
    for records, found in zip(requests, values, strict=True):
        start, stop = stop, stop + len(found or ())
        if records is None or found is None or added is None or not lost.isdisjoint(range(start, stop)):
            bodies.append(None)
        else:
            bodies.append(_written(records, {name: column[start:stop] for name, column in added.items()}))
    return Answered(bodies, 1000 * ran.seconds)


def values_of(plan: Plan, records: list[Row]) -> list[list[float]] | None:
    """The values of each record for the model; None: it lacks some, or has others than numbers."""
    if not plan.added.isdisjoint(records[0]) or not all(name in records[0] for name in plan.names):
        return None
    rows = [[record[name] for name in plan.names] for record in records]
    values = list(chain.from_iterable(rows))
    return rows if set(map(type, values)) == {float} or all(map(_is_number, values)) else None


def _is_number(value: object) -> bool:
    """Whether the value is a number that is rounded to float32 once."""
    return type(value) is float or (type(value) is int and -_EXACT <= value <= _EXACT)


def _written(records: list[Row], added: dict[str, Sequence[Any]]) -> bytes:
    """The records, all with the keys of the first one in its order, and the added columns."""
    first = records[0]
    rows = [{**dict.fromkeys(first), **record} for record in records]
    for name, values in added.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)
