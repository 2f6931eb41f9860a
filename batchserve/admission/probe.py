"""Infers inputs and outputs of a model from runs: declared shapes may be wrong, and some graphs mix records of a batch.

All runs here are of a few records; the caller bounds time and memory from outside.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import product
from math import inf, prod
from time import perf_counter
from typing import Any, cast

from onnx import ModelProto, TensorProto, ValueInfoProto

from batchserve.admission import graph
from batchserve.admission.batching import Batching, find_batching, gives_parts, proved_mode, run_many
from batchserve.admission.domains import with_domains
from batchserve.admission.independence import influences, share_fixed
from batchserve.admission.memory import known_need
from batchserve.admission.missing import with_nullable
from batchserve.admission.output_roles import read_outputs
from batchserve.admission.output_rows import (
    check_rows,
    list_outputs,
    mend_outputs,
    probe_sizes,
    sequence_parts,
    with_open_sizes,
)
from batchserve.admission.preprocessing import COLUMN, with_images
from batchserve.admission.probe_inputs import Feed, feeds
from batchserve.admission.providers import with_parity
from batchserve.admission.record_axes import RecordAxis, find_record_axes, put_records_first
from batchserve.admission.run_sizes import with_multiple
from batchserve.admission.tuning import tune, tune_kernel
from batchserve.domain import AdmissionStep, Column, ColumnType, DType, InputTensor, OutputTensor, Signature
from batchserve.errors import ModelRefused, OutOfMemory, ScoringFailed
from batchserve.formats.schema import polars_type
from batchserve.inference.images import sample_image
from batchserve.inference.kernels import Session
from batchserve.inference.outputs import ResultSchema, column_names
from batchserve.inference.session import open_session

__all__ = ["Tell", "describe"]

Tell = Callable[[AdmissionStep], None]
"""Is called as a step of an admission begins."""

DTYPES: dict[int, DType] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT8: "int8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64",
    TensorProto.BOOL: "bool",
    TensorProto.STRING: "string",
}
MAX_VALUES = 2**40
"""Of an input whose sizes are declared: so many no array holds."""
MAX_AXES = 60
"""Of an input: numpy has 64 at most, and some are put in front."""

_METADATA: dict[str, type[list[Any]] | type[dict[str, Any]] | type[str] | type[bool]] = {
    "columns": list,
    "labels": list,
    "targets": list,
    "sample": list,
    "image": dict,
    "task": str,
    "domains": dict,
    "finite": bool,
    "method": str,
}
"""The metadata under `batchserve.*` that is used here, with its JSON type."""


def describe(
    model: ModelProto,
    labels: Mapping[str, tuple[str, ...]],
    notes: list[str],
    tell: Tell,
    *,
    tuned: bool,
    provider: str,
) -> tuple[bytes, Signature]:
    """The model's bytes, its outputs mended where they do not lie record by record, and its signature, by runs on an
    execution provider.

    `labels` holds the class labels of outputs that are known already. Raises ModelRefused when no run succeeds or
    the outputs do not follow the records, ScoringFailed when the model does not load, OutOfMemory.
    """
    metadata = _metadata(model)
    _check_outputs(model)
    moved = _records_first(model, metadata, provider)
    notes.extend(moved)
    inputs = _inputs(model, metadata)
    content = _serialize(model)
    started = perf_counter()
    session = open_session(content, provider=provider)
    feed, batching = _find_feed(session, model, inputs, metadata)
    if (held := share_fixed(session, feed, inputs, influences(model))) is not None:
        inputs, feed, shared = held
        notes.extend(shared)
        batching = find_batching(session, feed, inputs)
    if gives_parts(session, model, feed, batching):
        batching = find_batching(session, feed, inputs, most=1)
        notes.append("The graph gives several rows for some records, so they are scored one at a time.")
    notes.extend(_shortage(batching, model))
    groups = sequence_parts(model, batching)
    sizes = probe_sizes(session, model, feed, inputs, batching)
    changed, mended_groups = mend_outputs(model, inputs, batching, sizes, moved=bool(moved))
    if changed:
        notes.extend(changed)
        groups |= mended_groups
        session.close()
        content = _serialize(model)
        session = open_session(content, provider=provider)
        batching = find_batching(session, feed, inputs, 1 if batching.one_at_a_time else 3)
        sizes = probe_sizes(session, model, feed, inputs, batching)
    check_rows(batching)
    mode, reasons = proved_mode(session, model, feed, inputs, batching)
    notes.extend(reasons)
    rows = run_many(session, feed, mode, batching.batch)
    task, outputs = read_outputs(model, metadata, rows, sizes, groups, labels, list_outputs(model, sizes))
    outputs = tuple(replace(output, finite=metadata.get("finite", False)) for output in outputs)
    outputs = with_open_sizes(outputs, model, inputs, sizes)
    signature = _told_apart(Signature(inputs, outputs, task, mode, batching.batch, notes=tuple(notes)))
    _check_names(signature)
    signature = with_nullable(signature, model, session, feed, metadata)
    signature = replace(signature, sample=_sample(signature, metadata, feed), provider=provider)
    signature = with_parity(signature, session, content, feed)
    if not tuned:
        return content, signature
    tell(AdmissionStep.MEASURE)
    return content, _measured(signature, model, content, session, feed, perf_counter() - started)


def _shortage(batching: Batching, model: ModelProto) -> list[str]:
    """A note about memory, if only one record at a time has enough."""
    if batching.shortage is None:
        return []
    few = f"Records are scored one at a time: with two or three in a run {batching.shortage.detail}."
    return [few + known_need(model)]


def _measured(
    signature: Signature, model: ModelProto, content: bytes, session: Session, feed: Feed, seconds: float
) -> Signature:
    """With what makes it fast. `seconds`: how long admission has taken."""
    signature = tune(signature, content, session, feed, seconds)
    signature = tune_kernel(signature, model, content, feed)
    session = open_session(content, signature.threads, signature.kernel, signature.provider)
    signature = with_multiple(signature, model, session, feed)
    session.close()
    return signature


def _serialize(model: ModelProto) -> bytes:
    try:
        return model.SerializeToString()
    except ValueError as error:
        raise ModelRefused("the model is larger than 2 GiB") from error


def _metadata(model: ModelProto) -> dict[str, Any]:
    """The `batchserve.*` entries, decoded. Raises ModelRefused for an invalid one."""
    entries: dict[str, Any] = {}
    for entry in model.metadata_props:
        key = entry.key.removeprefix("batchserve.")
        if entry.key == key or key not in _METADATA:
            continue
        try:
            value = json.loads(entry.value)
        except (ValueError, RecursionError) as error:
            raise ModelRefused(f"{entry.key} is not JSON: {error}") from error
        if not _is_text(value):
            raise ModelRefused(f"{entry.key} holds a lone surrogate")
        if value is not None and not isinstance(value, _METADATA[key]):
            raise ModelRefused(f"{entry.key} must be a {_METADATA[key].__name__}, got {type(value).__name__}")
        if value is not None:
            entries[key] = value
    return entries


def _is_text(value: Any) -> bool:
    """Whether all texts in a value of JSON are such as UTF-8 can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


# --- records ---------------------------------------------------------------------------------------------------------


def _records_first(model: ModelProto, metadata: Mapping[str, Any], provider: str) -> list[str]:
    """Puts the axis of the records first in all inputs, where it is another one; and says so."""
    described = {str(entry.get("input")) for entry in metadata.get("columns", ()) if isinstance(entry, dict)}
    described |= {str(metadata["image"].get("input"))} if "image" in metadata else set()
    axes = find_record_axes(model, described)
    if not all(found.sure for found in axes) and not _are_records(model, axes, metadata, provider):
        return []
    return put_records_first(model, axes)


def _are_records(model: ModelProto, axes: Collection[RecordAxis], metadata: Mapping[str, Any], provider: str) -> bool:
    """Whether what lies along these axes does not influence each other, as records must not."""
    moved = ModelProto()
    moved.CopyFrom(model)
    put_records_first(moved, axes)
    inputs = _inputs(moved, metadata)
    session = open_session(_serialize(moved), provider=provider)
    try:
        feed, batching = _find_feed(session, moved, inputs, metadata)
        mend_outputs(moved, inputs, batching, probe_sizes(session, moved, feed, inputs, batching), moved=True)
        session.close()
        session = open_session(_serialize(moved), provider=provider)
        batching = find_batching(session, feed, inputs)
        check_rows(batching)
        return proved_mode(session, moved, feed, inputs, batching)[0] != "whole"
    except OutOfMemory:
        raise
    except (ModelRefused, ScoringFailed):
        return False
    finally:
        session.close()


# --- inputs ----------------------------------------------------------------------------------------------------------


def _inputs(model: ModelProto, metadata: Mapping[str, Any]) -> tuple[InputTensor, ...]:
    entries = graph.inputs(model)
    shapes = {entry.name: _declared_shape(entry) for entry in entries}
    free = any(shape and shape[0] is None for shape in shapes.values())
    named = _named_columns(metadata)
    inputs = tuple(_input(entry, shapes[entry.name], free, named.get(entry.name)) for entry in entries)
    inputs = with_images(inputs, metadata["image"]) if "image" in metadata else inputs
    return with_domains(inputs, metadata)


def _input(entry: ValueInfoProto, shape: tuple[int | None, ...], free: bool, named: list[Column] | None) -> InputTensor:
    dtype = _dtype(entry)
    # Beside inputs whose first dimension is open, one with a fixed [1] is not about single records.
    per_record = bool(shape) and not (free and shape == (1,))
    width = shape[1] if len(shape) == 2 else 1
    if named is not None:
        if len(shape) > 2 or width not in (None, len(named)):
            raise ModelRefused(
                f"batchserve.columns names {len(named)} columns for input {entry.name!r} of shape {list(shape)}"
            )
        columns = tuple(replace(column, dtype=_column_dtype(column.dtype, dtype)) for column in named)
        return InputTensor(entry.name, dtype, (*shape[:1], len(named)) if len(shape) == 2 else shape, columns)
    alone = len(shape) < 2 or (len(shape) == 2 and width == 1) or not per_record
    return InputTensor(entry.name, dtype, shape, (Column(entry.name, dtype),) if alone else None, per_record)


def _declared_shape(entry: ValueInfoProto) -> tuple[int | None, ...]:
    kind = entry.type.tensor_type
    if not entry.type.HasField("tensor_type"):
        raise ModelRefused(f"input {entry.name!r} {_kind(entry)}: only tensors are accepted")
    if not kind.HasField("shape"):
        raise ModelRefused(f"input {entry.name!r} has no declared shape: export the model with its shapes")
    shape = tuple(size.dim_value if size.dim_value > 0 else None for size in kind.shape.dim)
    if len(shape) > MAX_AXES:
        raise ModelRefused(f"input {entry.name!r} has {len(shape)} axes, and at most {MAX_AXES} are taken")
    if prod(size or 1 for size in shape) > MAX_VALUES:
        raise ModelRefused(f"input {entry.name!r} has the shape {list(shape)}: more than {MAX_VALUES} values")
    return shape


def _dtype(entry: ValueInfoProto) -> DType:
    kind = entry.type.tensor_type.elem_type
    if kind not in DTYPES:
        raise ModelRefused(f"input {entry.name!r} has elements of {_element(kind)}, which is not supported")
    return DTYPES[kind]


def _check_outputs(model: ModelProto) -> None:
    """Raises ModelRefused for an output declared with a type that no result holds. ONNX Runtime knows those that are
    not declared."""
    for entry in model.graph.output:
        kind = entry.type.WhichOneof("value")
        holder = entry.type.sequence_type.elem_type if kind == "sequence_type" else entry.type
        if kind is None or (kind == "tensor_type" and not holder.tensor_type.elem_type):
            continue
        if not holder.HasField("tensor_type"):
            raise ModelRefused(f"output {entry.name!r} {_kind(entry)}: only tensors and their sequences are supported")
        element = holder.tensor_type.elem_type
        if element not in DTYPES:
            raise ModelRefused(f"output {entry.name!r} has elements of {_element(element)}, which is not supported")


def _kind(entry: ValueInfoProto) -> str:
    kind = entry.type.WhichOneof("value")
    return f"is a value of {kind}" if kind else "has no type"


def _element(kind: int) -> str:
    if kind in TensorProto.DataType.values():
        return TensorProto.DataType.Name(cast("TensorProto.DataType", kind)) if kind else "no type"
    return f"type {kind}, which is not an ONNX type"


def _column_dtype(wanted: ColumnType, tensor: DType) -> ColumnType:
    """A matrix takes numbers as its own type; only booleans are written differently in a file."""
    return wanted if wanted == "bool" or tensor == "string" else tensor


def _named_columns(metadata: Mapping[str, Any]) -> dict[str, list[Column]]:
    columns: dict[str, list[Column]] = {}
    try:
        for entry in metadata.get("columns", ()):
            dtype = cast("DType", entry["dtype"])
            polars_type(dtype)
            if not str(entry["name"]).strip():
                raise ModelRefused("batchserve.columns: a column has an empty name")
            column = Column(str(entry["name"]), dtype, bool(entry.get("nullable", False)))
            columns.setdefault(entry["input"], []).append(column)
    except (KeyError, TypeError) as error:
        raise ModelRefused(f"batchserve.columns must be a list of name, dtype and input: {error!r}") from error
    return columns


# --- valid inputs to run on ------------------------------------------------------------------------------------------


def _find_feed(
    session: Session, model: ModelProto, inputs: tuple[InputTensor, ...], metadata: Mapping[str, Any]
) -> tuple[Feed, Batching]:
    """The first feed that the model accepts, and its outputs; if one needs too much memory, smaller ones are tried.
    Raises ModelRefused with the last reason when there is none, and OutOfMemory."""
    reason: ScoringFailed | None = None
    shortage: OutOfMemory | None = None
    most: float = inf
    for feed in feeds(model, inputs, metadata):
        if feed.bytes_per_record() >= most:
            continue
        try:
            return feed, find_batching(session, feed, inputs)
        except OutOfMemory as error:
            shortage, most = error, feed.bytes_per_record()
        except ScoringFailed as error:
            reason = error
    if shortage is not None:
        raise shortage
    detail = reason.detail if reason else "no input could be generated"
    raise ModelRefused(f"no run on sample records succeeds: {detail}")


# --- outputs --------------------------------------------------------------------------------------------------------


def _told_apart(signature: Signature) -> Signature:
    """With the names of outputs in their columns, where these would be those of another output as well."""
    used = Counter(name for output in signature.outputs for name in set(column_names(signature, output)))

    def named(output: OutputTensor) -> OutputTensor:
        if all(used[name] == 1 for name in column_names(signature, output)):
            return output
        return replace(output, group=f"{output.group}_{output.name}" if output.group else output.name)

    return replace(signature, outputs=tuple(named(output) for output in signature.outputs))


def _check_names(signature: Signature) -> None:
    total = sum(len(ResultSchema(replace(signature, outputs=(output,))).columns) for output in signature.outputs)
    if total != len(ResultSchema(signature).columns):
        raise ModelRefused(
            f"two outputs would give columns of the same name: {[output.name for output in signature.outputs]}"
        )


# --- sample -----------------------------------------------------------------------------------------------


def _sample(signature: Signature, metadata: Mapping[str, Any], feed: Feed) -> tuple[dict[str, Any], ...]:
    """The records that came with the model, or two that were made up, by column name."""
    recorded = metadata.get("sample")
    if recorded and all(isinstance(record, dict) for record in recorded):
        return tuple(recorded[:8])
    if any(tensor.columns is None for tensor in signature.inputs):
        return ()
    records: list[dict[str, Any]] = [{}, {}]
    for index, tensor in product(range(2), signature.inputs):
        if tensor.image is not None:
            records[index][COLUMN] = sample_image(tensor, shade=64 * (index + 1))
            continue
        array = feed.arrays[tensor.name][index : index + 1] if tensor.per_record else feed.shared[tensor.name]
        for column, value in zip(tensor.columns or (), array.reshape(-1).tolist(), strict=True):
            records[index][column.name] = round(value, 4) if isinstance(value, float) else value
    return tuple(records)
