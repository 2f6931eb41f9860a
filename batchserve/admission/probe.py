"""Infers inputs and outputs of a model from runs: declared shapes may be wrong, and some graphs mix records of a batch.

All runs here are of a few records; the caller bounds time and memory from outside.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import prod
from time import perf_counter
from typing import Any, Literal, cast

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto

from batchserve.admission import graph
from batchserve.admission.company import with_multiple
from batchserve.admission.domains import with_domains
from batchserve.admission.independence import ALONE, QUANTISED, close, influences, mixes_records, share_fixed
from batchserve.admission.missing import with_nullable
from batchserve.admission.output_roles import read_outputs
from batchserve.admission.preprocessing import COLUMN, with_images
from batchserve.admission.probe_inputs import Feed, feeds
from batchserve.admission.tuning import BATCHES, tune, tune_kernel
from batchserve.domain import Column, ColumnType, DType, InputTensor, OutputTensor, Signature
from batchserve.errors import ModelRefused, OutOfMemory, ScoringFailed
from batchserve.formats.schema import polars_type
from batchserve.inference.images import sample_image
from batchserve.inference.kernels import Arrays, Session
from batchserve.inference.outputs import ResultSchema, column_names
from batchserve.inference.session import open_session

__all__ = ["describe"]

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
FIXED_BATCHES = (4, 8, 16, 32, 64)
"""Guesses for the only number of records that a graph accepts."""

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

Mode = Literal["rows", "fixed", "whole"]


def describe(
    model: ModelProto, labels: Mapping[str, tuple[str, ...]], notes: list[str], *, tuned: bool = True
) -> tuple[bytes, Signature]:
    """The model's bytes, its outputs mended where they do not lie record by record, and its signature.

    `labels` holds the class labels of outputs that are known already. Raises ModelRefused when no run succeeds or
    the outputs do not follow the records, ScoringFailed when the model does not load, OutOfMemory.
    """
    metadata = _metadata(model)
    inputs = _inputs(model, metadata)
    _check_outputs(model)
    content = _serialize(model)
    started = perf_counter()
    session = open_session(content)
    feed, mode, batch, runs = _find_feed(session, model, inputs, metadata)
    least = influences(model)
    if (held := share_fixed(session, feed, inputs, least)) is not None:
        inputs, feed, shared = held
        notes.extend(shared)
        mode, batch, runs = _runs(session, feed, inputs)
    groups = _sequence_parts(model, runs)
    changed, mended_groups = _mend_outputs(model, runs)
    if changed:
        notes.extend(changed)
        groups |= mended_groups
        session.close()
        content = _serialize(model)
        session = open_session(content)
        mode, batch, runs = _runs(session, feed, inputs)
    _check_rows(runs)
    mode = _proved(session, feed, inputs, mode, batch, least)
    if mode == "whole":
        notes.append("The result of a record depends on the other records, so the input is scored in one run.")
    rows = _many(session, feed, mode, batch)
    task, outputs = read_outputs(model, metadata, rows, runs, groups, labels)
    outputs = tuple(replace(output, finite=metadata.get("finite", False)) for output in outputs)
    if any(None in tensor.shape[1:] for tensor in inputs):
        outputs = tuple(_with_open_sizes(output, model) for output in outputs)
    signature = _told_apart(Signature(inputs, outputs, task, mode, batch, notes=tuple(notes)))
    _check_names(signature)
    signature = with_nullable(signature, model, session, feed, metadata)
    signature = replace(signature, sample=_sample(signature, metadata, feed))
    if not tuned:
        return content, signature
    signature = tune(signature, content, session, feed, perf_counter() - started)
    signature = tune_kernel(signature, model, content, feed)
    session = open_session(content, signature.threads, signature.kernel)
    signature = with_multiple(signature, model, session, feed)
    session.close()
    return content, signature


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


# --- inputs ----------------------------------------------------------------------------------------------------------


def _inputs(model: ModelProto, metadata: Mapping[str, Any]) -> tuple[InputTensor, ...]:
    constants = {tensor.name for tensor in model.graph.initializer}
    entries = [entry for entry in model.graph.input if entry.name not in constants]
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
) -> tuple[Feed, Mode, int, dict[int, Arrays]]:
    """The first feed that the model accepts, and its outputs. Raises ModelRefused with the last reason when there is
    none."""
    reason: ScoringFailed | None = None
    for feed in feeds(model, inputs, metadata):
        try:
            return feed, *_runs(session, feed, inputs)
        except OutOfMemory:
            raise
        except ScoringFailed as error:
            reason = error
    detail = reason.detail if reason else "no input could be generated"
    raise ModelRefused(f"no run on sample records succeeds: {detail}")


def _runs(session: Session, feed: Feed, inputs: tuple[InputTensor, ...]) -> tuple[Mode, int, dict[int, Arrays]]:
    """The batching mode, its batch, and the outputs for 1, 2 and 3 records, or for a fixed number."""
    declared = {tensor.shape[0] for tensor in inputs if tensor.per_record and tensor.shape[0] is not None}
    if len(declared) > 1:
        raise ModelRefused(f"the inputs need different numbers of records: {sorted(declared)}")
    if declared:
        batch = declared.pop()
        return "fixed", batch, {batch: session.run(feed.first(batch))}
    runs: dict[int, Arrays] = {}
    failure: ScoringFailed | None = None
    for count in (1, 2, 3):
        try:
            runs[count] = session.run(feed.first(count))
        except OutOfMemory:
            raise
        except ScoringFailed as error:
            failure = error
    if len(runs) == 3:
        return "rows", BATCHES[0], runs
    if runs:
        batch = min(runs)
        return "fixed", batch, {batch: runs[batch]}
    for batch in FIXED_BATCHES:
        try:
            return "fixed", batch, {batch: session.run(feed.first(batch))}
        except ScoringFailed as error:
            failure = failure or error
    raise failure or ScoringFailed("no run succeeds")


def _proved(
    session: Session, feed: Feed, inputs: tuple[InputTensor, ...], mode: Mode, batch: int, least: float
) -> Mode:
    """The mode in which the input is cut only between records that do not influence each other. Raises ModelRefused
    where it would have to be cut elsewhere."""
    if mode == "rows":
        return "whole" if mixes_records(session, feed, inputs, least) else "rows"
    if batch > 1 and mixes_records(session, feed, inputs, least, batch):
        raise ModelRefused(
            f"the graph takes exactly {batch} records in a run, and the result of one depends on the others: export it "
            "with a free number of records, or for one record"
        )
    return mode


# --- outputs that do not lie record by record ------------------------------------------------------------------------


def _sequence_parts(model: ModelProto, runs: dict[int, Arrays]) -> dict[str, int]:
    """Targets of the outputs that were parts of a sequence."""
    names = next(iter(runs.values()))
    sequences = [output.name for output in model.graph.output if output.type.HasField("sequence_type")]
    return {
        name: int(name.removeprefix(f"{sequence}_"))
        for sequence in sequences
        for name in names
        if name.startswith(f"{sequence}_") and name.removeprefix(f"{sequence}_").isdecimal()
    }


def _mend_outputs(model: ModelProto, runs: dict[int, Arrays]) -> tuple[list[str], dict[str, int]]:
    """Rewrites outputs whose records are not on axis 0. Returns the changes made, and the targets of split outputs.

    scikit-learn's converters give [1, N] (discriminant analysis), [N * targets, 1] (networks) and
    [targets, N, classes] (forests with several targets).
    """
    done: list[str] = []
    groups: dict[str, int] = {}
    own = {output.name for output in model.graph.output}
    for name in [name for name in next(iter(runs.values())) if name in own]:
        arrays = {count: run[name] for count, run in runs.items()}
        if all(array.ndim and len(array) == count for count, array in arrays.items()):
            continue
        if len(runs) < 3:
            # One run alone tells only of a single value whose it is: of the one record, or of all.
            alone = all(array.size == 1 for array in arrays.values())
            if alone and 1 in runs:
                graph.reshape_output(model, name, [-1])
                done.append(f"Output {name!r} was reshaped to one row for each record.")
            elif alone and len(own) > 1:
                done.append(_left_out(model, name))
                own.remove(name)
            continue
        across = all(array.ndim > 1 and array.shape[1] == count for count, array in arrays.items())
        tall = arrays[1].size and all(array.size == count * arrays[1].size for count, array in arrays.items())
        if across and len(arrays[1]) > 1 and len(arrays[1]) == len(arrays[2]):
            parts = graph.split_output(model, name, len(arrays[1]))
            groups |= {part: index for index, part in enumerate(parts)}
            done.append(f"Output {name!r} has its records on axis 1 and was split into {len(parts)}.")
        elif tall and ((across and len(arrays[3]) == 1) or _in_order(arrays)):
            width = arrays[1].size
            graph.reshape_output(model, name, [-1] if width == 1 else [-1, width])
            done.append(f"Output {name!r} was reshaped to one row for each record.")
        elif len({array.shape for array in arrays.values()}) == 1 and len(own) > 1:
            done.append(_left_out(model, name))
            own.remove(name)
    return done, groups


def _left_out(model: ModelProto, name: str) -> str:
    graph.drop_output(model, name)
    return f"Output {name!r} is not per record and was dropped."


def _in_order(arrays: dict[int, np.ndarray]) -> bool:
    """Whether the values for one record come first among those for three."""
    width = arrays[1].size
    return close(arrays[1].reshape(-1), arrays[3].reshape(-1)[:width], ALONE, QUANTISED)


def _with_open_sizes(output: OutputTensor, model: ModelProto) -> OutputTensor:
    """The output of a model with free dimensions: a size that the graph does not fix came of the probe's guess."""
    declared = next((entry.type.tensor_type.shape.dim for entry in model.graph.output if entry.name == output.name), ())
    fixed = [size.dim_value for size in declared]
    if output.labels or len(output.shape) == 1:
        return output
    sizes = (
        size if axis < len(fixed) and fixed[axis] == size else None
        for axis, size in enumerate(output.shape[1:], start=1)
    )
    return replace(output, shape=(None, *sizes))


def _check_rows(runs: dict[int, Arrays]) -> None:
    for count, run in runs.items():
        for name, array in run.items():
            if array.ndim == 0 or len(array) != count:
                raise ModelRefused(
                    f"output {name!r} has shape {list(array.shape)} for {count} records: each record needs one row"
                )


def _many(session: Session, feed: Feed, mode: Mode, batch: int) -> Arrays:
    """Outputs for all examples, where the mode allows it; else for one run."""
    return session.run(feed.first(batch if mode == "fixed" else max(3, feed.examples())))


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
