"""Matches an input with a model under the options of a job: which columns fill it, and which pass through to the
result."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import BinaryIO, Protocol

import numpy as np
import polars as pl

from batchserve.domain import INPUT_FILE, Chunk, Dialect, DType, ModelVersion, Options, Signature
from batchserve.errors import InvalidInput, InvalidOptions, SchemaMismatch
from batchserve.formats import RESULT_FORMATS
from batchserve.formats.frames import SAMPLE
from batchserve.formats.matrices import FEWEST_BYTES, READABLE
from batchserve.formats.protocol import Block, Format, Header, MatrixReader, Reading, Records, Tensors
from batchserve.formats.schema import holds_bytes, polars_type, with_points
from batchserve.formats.tensors import empty, frame_of
from batchserve.inference.arrays import holds_arrays
from batchserve.inference.binding import Binding, arrays_of_records, bind, bind_arrays, columns_of, positions
from batchserve.inference.inputs import (
    Inputs,
    build_inputs,
    check_types,
    is_plain,
    several_values,
    shared_inputs,
)
from batchserve.inference.outputs import ResultSchema

__all__ = ["Match", "match_input", "require_folders", "with_names"]


class ReadRecords(Protocol):
    """Gives records by the types and the names of their columns: the rest of `Format.read`."""

    def __call__(self, types: Mapping[str, DType], columns: Sequence[str] | None, /) -> Reading: ...


@dataclass(frozen=True, slots=True)
class Match:
    """The match of an input's columns with a model, under the options of a job."""

    header: Header
    sample: Callable[[], Records]
    """The sample of the header, read once."""
    signature: Signature
    """The model's signature without the inputs that the options set."""
    shared: Tensors
    """Inputs set by the options, one value each for all records."""
    options: Options
    binding: Binding
    passed: tuple[str, ...]
    """The columns or arrays that pass through to the result, in file order, the key first."""
    result: Callable[[], ResultSchema]
    """The columns that the model adds, built once. Raises InvalidOptions."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about types and the provider, once for a job."""
        wide = [name for name, kind in self.header.columns.items() if kind == pl.Float64()]
        rounded = [name for name in wide if self.binding.types.get(name) == "float32"]
        notes = [f"float64 columns were rounded to the model's float32: {', '.join(rounded)}"] if rounded else []
        return (*notes, *self.signature.scored_on)

    def kind(self, name: str) -> pl.DataType:
        """The type of a passed-through column or array; in a file without types, that of its first values."""
        if self.header.arrays:
            return frame_of({name: empty(self.header.arrays[name])})[name].dtype
        if name in self.binding.types:
            return polars_type(self.binding.types[name])
        records = self.sample()
        assert isinstance(records, pl.DataFrame), "what has columns is a table"
        return self.header.columns[name] or records[name].dtype

    def own_types(self, family: str) -> tuple[str, ...]:
        """The passed-through columns that come in the types of the input, a file of a family of formats, and not in
        those of the model."""
        if self.header.arrays:
            return ()
        written = self.binding.used if self._is_as_written(family) else ()
        return tuple(name for name in self.passed if name in written or name not in self.binding.types)

    def check(self) -> None:
        """Raises SchemaMismatch when the types or first values of the input do not fit."""
        binding = self.binding if self.header.columns else None
        check_types(self.signature, binding, self.header.columns, self._own(self.sample()), self.header.decimal)

    def require_writable(self) -> None:
        """Raises InvalidOptions for a `top_k` that the model does not support, a result that its format cannot hold, or
        a column to partition it by whose values name no folders; SchemaMismatch for a passed column that the format
        cannot hold, or that has the name of an added one."""
        columns = self.result().columns
        if self.options.input_file and INPUT_FILE in self.passed:
            there = f"an array {INPUT_FILE!r}" if self.header.arrays else f"a column {INPUT_FILE!r}"
            message = f"the input has {there}, which input_file adds: leave input_file out, or rename it"
            raise SchemaMismatch(message, errors=[{"column": INPUT_FILE, "message": message}])
        self._require_partitionable(columns)
        format = RESULT_FORMATS[self.options.format]
        if format.holds == "table":
            return
        for name in self.passed:
            kind = self.kind(name)
            number = kind.is_numeric() or isinstance(kind, pl.Boolean | pl.Null)
            if self.header.arrays and format.holds == "arrays":
                continue
            if not number and (format.holds == "array" or kind.is_nested() or isinstance(kind, pl.Binary)):
                what = f"{format.name} cannot hold column {name!r}, which is {kind}"
                message = f"{what}: request parquet, or passthrough=none"
                raise SchemaMismatch(message, errors=[{"column": name, "message": message}])
        if format.holds == "arrays":
            return
        if pl.String() in columns.values():
            raise InvalidOptions("this model gives text, which npy cannot hold: request csv, jsonl, parquet or arrow")
        if any(kind.is_nested() for kind in columns.values()) and len(columns) + len(self.passed) > 1:
            raise InvalidOptions("npy holds one array, and this result has several: request npz, parquet or arrow")

    def _require_partitionable(self, columns: Mapping[str, pl.DataType]) -> None:
        target = self.options.target
        if target is None or target.partition_by is None:
            return
        name = target.partition_by
        for passed in self.passed:
            if name == (f"input_{passed}" if passed in columns else passed):
                require_folders(name, self.kind(passed))
        if name in columns:
            require_folders(name, columns[name])

    def read(self, format: Format, source: BinaryIO, chunk: Chunk, *, matrices: bool = True) -> tuple[Reading, Records]:
        """The records of a chunk in the types of the model, and their passed-through columns or arrays. With equal
        input and output formats, values pass through as written, not as the model rounds them. `matrices`: whether
        numbers may come as matrices.
        """
        needed = self._needed()
        if matrices and isinstance(format, MatrixReader) and chunk.stop - chunk.start >= FEWEST_BYTES:
            blocks = tuple(self._blocks(format))
            inside = {name for block in blocks for name in block.columns}
            kept = [name for name in needed if name in self.passed or name not in inside]
            reading = format.read_matrices(source, chunk, self.binding.types, needed, blocks, kept)
        else:
            reading = format.read(source, chunk, self.binding.types, needed or None)
        return self._with_passed(reading, chunk, format.family, partial(format.read, source, chunk))

    def read_by(self, read: ReadRecords, chunk: Chunk, family: str) -> tuple[Reading, Records]:
        """The same of records that `read` gives, from files of a family of formats."""
        reading = read(self.binding.types, self._needed() or None)
        return self._with_passed(reading, chunk, family, read)

    def _needed(self) -> list[str]:
        there = self.header.columns or self.header.arrays
        return [name for name in there if name in self.passed or name in self.binding.used]

    def _with_passed(self, reading: Reading, chunk: Chunk, family: str, read: ReadRecords) -> tuple[Reading, Records]:
        if isinstance(reading.records, dict):
            passed_arrays = {name: reading.records[name] for name in self.passed}
            return replace(reading, records=self._own(reading.records)), passed_arrays
        passed = dict.fromkeys(self.passed, reading.records)
        both = [name for name in self.passed if name in self.binding.used]
        if both and not reading.matrices and self._is_as_written(family):
            passed |= dict.fromkeys(both, self._written(read, chunk, both))
        return reading, pl.DataFrame([records[name] for name, records in passed.items()])

    def _is_as_written(self, family: str) -> bool:
        """Whether what passes through comes as it is written, not as the model takes it."""
        return family == RESULT_FORMATS[self.options.format].family

    def _blocks(self, format: Format) -> Iterator[Block]:
        """The inputs that matrices of numbers fill, as they are in the file."""
        binding = self.binding
        takers = Counter(chain.from_iterable(binding.sources.values()))
        typed = set() if self._is_as_written(format.family) else set(self.passed)
        typed |= {self.options.key} if self.options.key is not None else set()
        for tensor in self.signature.inputs:
            sources = binding.sources[tensor.name]
            if tensor.name in binding.arrays or not is_plain(tensor) or tensor.dtype not in READABLE:
                continue
            dtypes = {column.dtype for column in columns_of(tensor, sources)} | {binding.types[s] for s in sources}
            if dtypes == {tensor.dtype} and all(takers[s] == 1 for s in sources) and typed.isdisjoint(sources):
                yield Block(tensor.name, sources, tensor.dtype)

    def _written(self, read: ReadRecords, chunk: Chunk, columns: Sequence[str]) -> pl.DataFrame:
        records: Records = {}
        if chunk.first_record == 0 and chunk.records <= SAMPLE:  # the sample may be all records: it is as written, too
            records = self.sample()
        if not isinstance(records, pl.DataFrame) or records.height != chunk.records:
            records = read({}, columns).records
        assert isinstance(records, pl.DataFrame)
        return records

    def require_shared(self, inputs: Inputs) -> None:
        """Raises SchemaMismatch where a column or array of one value for all records differs from the sample's: so one
        value counts, however the input is cut into chunks."""
        names = [tensor.name for tensor in self.signature.inputs if not tensor.per_record]
        if not names:
            return
        sample, failed, _ = build_inputs(self.signature, self.binding, self._numbers(self._own(self.sample())))
        for name in names if not failed.all() else ():
            first, given = np.asarray(sample[name]), np.asarray(inputs[name])
            if ((first != given) & ((first == first) | (given == given))).any():  # NaN is unequal to itself
                raise several_values(name)

    def _numbers(self, sample: Records) -> Records:
        """A sample with decimal points in columns of numbers."""
        if self.header.decimal != "," or not isinstance(sample, pl.DataFrame):
            return sample
        numbers = (name for name, dtype in self.binding.types.items() if dtype != "string")
        return sample.with_columns(with_points(sample[name]) for name in numbers if sample[name].dtype == pl.String())

    def _own(self, records: Records) -> Records:
        """Arrays by the names of the inputs that they fill."""
        if isinstance(records, pl.DataFrame):
            return records
        return {name: records[source] for name, source in self.binding.arrays.items()}


def require_folders(column: str, kind: pl.DataType) -> None:
    """Raises InvalidOptions where the values of a column of a result cannot be names of folders."""
    if kind.is_nested() or isinstance(kind, pl.Binary):
        raise InvalidOptions(f"partition_by: {column!r} is {kind}; expected a column of texts, numbers or times")


def with_names(dialect: Dialect, model: ModelVersion, options: Options) -> Dialect:
    """The dialect with the model's names for columns that have none, and for the arrays that hold the records."""
    columns = positions(model.signature, options.inputs or ())
    return replace(dialect, columns=columns, arrays=arrays_of_records(model.signature, options.columns))


def match_input(header: Header, model: ModelVersion, options: Options) -> Match:
    """Raises SchemaMismatch for missing columns of the model or the options."""
    names = list(header.columns or header.arrays)
    if not names and isinstance(header.sample, pl.DataFrame):
        raise InvalidInput("the input has no records, so its columns are unknown; expected one record or more")
    shared = shared_inputs(model.signature, options.inputs or {})
    own = tuple(tensor for tensor in model.signature.inputs if tensor.name not in shared)
    signature = replace(model.signature, inputs=own) if shared else model.signature
    sample = cache(lambda: header.sample)
    result = cache(lambda: ResultSchema(signature, options.top_k))

    def values(name: str) -> pl.Series:
        records = sample()
        assert isinstance(records, pl.DataFrame), "what has columns is a table"
        return records[name]

    def holds(name: str) -> bool:
        return holds_arrays(header.columns[name], partial(values, name))

    def files(name: str) -> bool:
        return holds_bytes(header.columns[name])

    if header.arrays:
        binding = bind_arrays(signature, header.arrays, options.columns)
        records = [name for name, array in header.arrays.items() if name and array.per_record and name not in shared]
        passed = _passed(records, [name for name in records if name not in binding.used], binding, options)
    else:
        binding = bind(signature, names, options.columns, holds, files)
        images = {binding.sources[tensor.name][0] for tensor in signature.inputs if tensor.image}
        passed = _passed(names, [name for name in names if name not in images], binding, options)
    return Match(header, sample, signature, shared, options, binding, passed, result)


def _passed(names: Sequence[str], every: Sequence[str], binding: Binding, options: Options) -> tuple[str, ...]:
    """Which of the columns or arrays pass through; `every`: by passthrough=all. Raises SchemaMismatch."""
    _require_columns(names, options)
    match options.passthrough:
        case "all":
            passed = list(every)
        case "none":
            passed = []
        case "unused":
            passed = [name for name in names if name not in binding.used]
        case chosen:
            passed = [name for name in names if name in chosen]
    if options.key is not None:
        passed = [options.key, *(name for name in passed if name != options.key)]
    return tuple(passed)


def _require_columns(names: Sequence[str], options: Options) -> None:
    wanted = set(options.passthrough) if isinstance(options.passthrough, tuple) else set()
    wanted |= {options.key} if options.key is not None else set()
    if unknown := sorted(wanted - set(names)):
        there = f"it has {', '.join(map(repr, names))}" if names else "its array has no name and no columns"
        raise SchemaMismatch(
            f"the input has no column {', '.join(map(repr, unknown))}; {there}",
            errors=[
                {"column": name, "message": "requested in passthrough or key, not in the input"} for name in unknown
            ],
        )
