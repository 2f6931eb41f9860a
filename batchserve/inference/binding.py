"""Which columns of a file fill which inputs of a model."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from batchserve.domain import Column, DType, InputTensor, Signature
from batchserve.errors import InvalidOptions, SchemaMismatch
from batchserve.formats.protocol import ArrayType
from batchserve.inference.domains import dtype_to_read
from batchserve.inference.unfilled import Table, hint, listed, too_few_columns, unfilled_by_arrays, unfilled_by_table

__all__ = ["Binding", "arrays_of_records", "bind", "bind_arrays", "columns_of", "positions"]


@dataclass(frozen=True, slots=True)
class Binding:
    """Which columns or arrays of a file fill which inputs of a model: the columns of each input, in its order."""

    sources: dict[str, tuple[str, ...]]
    types: dict[str, DType]
    """File column -> the dtype to read it as. Images and arrays are read in the file's type: bytes, lists or text."""

    arrays: dict[str, str] = field(default_factory=dict)
    """Input -> the column that fills it with an array from each record, or the array of an npz (npy: ""). Also in
    `sources`."""

    @property
    def used(self) -> tuple[str, ...]:
        """The file columns that the model consumes."""
        return tuple(dict.fromkeys(chain.from_iterable(self.sources.values())))


def bind(
    signature: Signature,
    columns: Sequence[str],
    rename: Mapping[str, str] | Sequence[str] | None = None,
    holds_arrays: Callable[[str], bool] = lambda _: False,
    holds_bytes: Callable[[str], bool] = lambda _: False,
) -> Binding:
    """How the columns of a table fill the inputs.

    Named inputs take their columns by name; where that is unambiguous, blanks around a name do not count, and spaces
    and signs within it count as underscores. An input without names for its columns takes one column that
    `holds_arrays`: the one with its name, or the only one. Images come from the column with their name, from the only
    one that `holds_bytes`, or from the only one left. What is left over fills the other inputs without names, in file
    order, when the count is right. `rename` is the option `columns`: a list names the columns to take, in order; a
    mapping says {model column: file column}.

    Raises SchemaMismatch when the columns do not fit, and InvalidOptions when `rename` does not suit the model.
    """
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise SchemaMismatch(
            f"column names must differ: {listed(twice)} appears more than once",
            errors=[{"column": name, "message": "the name appears more than once"} for name in twice],
        )
    mapping: Mapping[str, str] = rename if isinstance(rename, Mapping) else {}
    _check_mapping(signature, mapping, columns)
    if rename is not None and not isinstance(rename, Mapping):
        columns = _chosen(rename, columns)
        if len(columns) == 1 and len(signature.columns) == 1:
            # One requested and one required column need no name.
            mapping = {signature.columns[0].name: columns[0]}
    table = Table(columns, holds_arrays, holds_bytes)
    named, missing = _find_named(signature, table, mapping)
    left = [column for column in columns if column not in named.values()]
    arrays, lacking = _find_arrays(signature, left, mapping, holds_arrays)
    left = [column for column in left if column not in arrays.values()]
    if missing or lacking:
        unnamed = [tensor for tensor in signature.inputs if tensor.columns is None and tensor.name not in arrays]
        if len(left) < sum(_width(tensor) or 1 for tensor in unnamed):
            lacking = [tensor for tensor in unnamed if len(tensor.shape) > 1]
        raise unfilled_by_table(signature, missing, lacking, named, None if unnamed else left, table)
    return _join(signature, named, arrays, Table(left, holds_arrays, holds_bytes))


def bind_arrays(
    signature: Signature,
    arrays: Mapping[str, ArrayType],
    rename: Mapping[str, str] | Sequence[str] | None = None,
) -> Binding:
    """How the arrays of an npz or npy fill the inputs: by name; the last input by the only array that is left, or the
    only one left with its number of axes. `rename` is the option `columns`: a list names the arrays to take, in the
    order of the inputs; a mapping says {input: array}. An array without a name (npy) fills the only input.

    Raises SchemaMismatch when an input has no array, and InvalidOptions when `rename` does not suit the model.
    """
    found = {tensor.name: tensor.name for tensor in signature.inputs if tensor.name in arrays}
    if "" in arrays:
        rename = None
    if isinstance(rename, Mapping):
        _check_mapping_of_arrays(signature, rename, arrays)
        found |= rename
    elif rename is not None:
        arrays = {name: arrays[name] for name in _chosen(rename, list(arrays))}
        found = _in_order(signature, list(arrays))
    lacking = [tensor for tensor in signature.inputs if tensor.name not in found]
    if len(lacking) == 1:
        left = [name for name in arrays if name not in found.values()]
        if len(left) > 1:
            axes = len(lacking[0].shape)
            left = [name for name in left if axes > 1 and len(arrays[name].shape) == axes]
        if len(left) == 1:
            found[lacking.pop().name] = left[0]
    if lacking:
        raise unfilled_by_arrays(signature, [tensor.name for tensor in lacking], arrays)
    return Binding({name: (source,) for name, source in found.items()}, {}, found)


def arrays_of_records(signature: Signature, rename: Mapping[str, str] | Sequence[str] | None) -> tuple[str, ...]:
    """The names that the arrays of an npz have which fill the inputs record by record."""
    if rename is not None and not isinstance(rename, Mapping):
        return tuple(rename)
    renamed = rename or {}
    return tuple(renamed.get(tensor.name, tensor.name) for tensor in signature.inputs if tensor.per_record)


def _check_mapping_of_arrays(signature: Signature, mapping: Mapping[str, str], arrays: Mapping[str, ArrayType]) -> None:
    inputs = [tensor.name for tensor in signature.inputs]
    for name, source in mapping.items():
        if name not in inputs:
            raise InvalidOptions(f"columns: the model has no input {name!r} for an array; it takes {listed(inputs)}")
        if source not in arrays:
            raise SchemaMismatch(
                f"columns: there is no {source!r} in the input{hint(source, arrays)}; it has {listed(list(arrays))}",
                errors=[{"column": source, "message": "is not in the input"}],
            )


def _in_order(signature: Signature, names: Sequence[str]) -> dict[str, str]:
    """Input -> array: by name where the names are those of the inputs, else in order."""
    inputs = [tensor.name for tensor in signature.inputs]
    if set(inputs) <= set(names):
        return dict(zip(inputs, inputs, strict=True))
    return dict(zip(inputs, names, strict=False))


def positions(signature: Signature, given: Collection[str] = ()) -> tuple[str, ...]:
    """Names for the columns of a table that has none, in the order of the inputs but those that are `given` already.

    A column that fills two inputs appears once. () for a model that takes any number of columns.
    """
    names: list[str] = []
    for tensor in signature.inputs:
        width = _width(tensor)
        if tensor.name in given:
            continue
        if tensor.columns is not None:
            names += [column.name for column in tensor.columns]
        elif width is None:
            return ()
        else:
            names += [f"{tensor.name}_{index}" for index in range(width)] if width > 1 else [tensor.name]
    return tuple(dict.fromkeys(names))


def _join(signature: Signature, named: dict[str, str], arrays: dict[str, str], left: Table) -> Binding:
    unnamed = [tensor for tensor in signature.inputs if tensor.columns is None and tensor.name not in arrays]
    shares = _share_out(unnamed, left, alone=len(unnamed) == len(signature.inputs))
    sources: dict[str, tuple[str, ...]] = {}
    types: dict[str, DType] = {}
    for tensor in signature.inputs:
        if tensor.name in arrays:
            sources[tensor.name] = (arrays[tensor.name],)
            continue
        if tensor.columns is None:
            sources[tensor.name] = shares[tensor.name]
        else:
            sources[tensor.name] = tuple(named[column.name] for column in tensor.columns)
        for column, source in zip(columns_of(tensor, sources[tensor.name]), sources[tensor.name], strict=True):
            if column.dtype != "image":
                types.setdefault(source, column.dtype)
    return Binding(sources, types, arrays)


def _check_mapping(signature: Signature, mapping: Mapping[str, str], columns: Sequence[str]) -> None:
    wanted = [*(column.name for column in signature.columns), *(tensor.name for tensor in _of_arrays(signature))]
    for name, source in mapping.items():
        if name not in wanted:
            unnamed = "its columns have no names, so pass a list"
            there = f"it takes {listed(wanted)}" if signature.columns else unnamed
            raise InvalidOptions(f"columns: the model has no column {name!r}; {there}")
        if source not in columns:
            raise SchemaMismatch(
                f"columns: there is no {source!r} in the input{hint(source, columns)}; it has {listed(columns)}",
                errors=[{"column": source, "message": "is not in the input"}],
            )


def _chosen(names: Sequence[str], columns: Sequence[str]) -> Sequence[str]:
    absent = [name for name in names if name not in columns]
    if absent:
        raise SchemaMismatch(
            f"columns: there is no {listed(absent)} in the input; it has {listed(columns)}",
            errors=[{"column": name, "message": f"is not in the input{hint(name, columns)}"} for name in absent],
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidOptions(f"columns: {listed(twice)} appears more than once")
    return names


def _find_named(signature: Signature, table: Table, mapping: Mapping[str, str]) -> tuple[dict[str, str], list[Column]]:
    """Model column -> file column, for the columns that have names; and those that no column fills."""
    columns = table.columns
    plain = Counter(_plain(column.name) for column in signature.columns)
    alike: dict[str, list[str]] = {}
    for name in columns:
        alike.setdefault(_plain(name), []).append(name)
    found: dict[str, str] = {}
    missing: list[Column] = []
    for column in signature.columns:
        candidates = alike.get(_plain(column.name), [])
        if column.name in mapping:
            found[column.name] = mapping[column.name]
        elif column.name in columns:
            found[column.name] = column.name
        elif len(candidates) == 1 and plain[_plain(column.name)] == 1:
            found[column.name] = candidates[0]
        else:
            missing.append(column)
    if [column.dtype for column in missing] == ["image"]:
        left = [name for name in columns if name not in found.values()]
        likely = [name for name in left if table.holds_bytes(name)] or left
        if len(likely) == 1:
            found[missing.pop().name] = likely[0]
    return found, missing


def _of_arrays(signature: Signature) -> list[InputTensor]:
    """The inputs that one column with arrays can fill."""
    return [tensor for tensor in signature.inputs if tensor.columns is None and len(tensor.shape) > 1]


def _find_arrays(
    signature: Signature, columns: Sequence[str], mapping: Mapping[str, str], holds_arrays: Callable[[str], bool]
) -> tuple[dict[str, str], list[InputTensor]]:
    """Input -> the file column whose arrays fill it; and the inputs that no other column could fill."""
    tensors = _of_arrays(signature)
    found: dict[str, str] = {}
    for tensor in tensors:
        name = mapping.get(tensor.name, tensor.name)
        if tensor.name in mapping or (name in columns and (len(tensor.shape) > 2 or holds_arrays(name))):
            found[tensor.name] = name
    lacking = [tensor for tensor in tensors if tensor.name not in found]
    left = [name for name in columns if name not in found.values()]
    if len(lacking) == 1 and _may_be_alone(lacking[0], len(left)):
        left = [name for name in left if holds_arrays(name)]
        if len(left) == 1:
            found[lacking.pop().name] = left[0]
    # Next to arrays, any number of scalar columns would fill an input of any length by accident.
    return found, [
        tensor
        for tensor in lacking
        if len(tensor.shape) > 2 or (found and tensor.per_record and tensor.shape[1] is None)
    ]


def _may_be_alone(tensor: InputTensor, columns: int) -> bool:
    """Whether the only column with arrays fills this input: not where as many columns fill it one value each, nor where
    a text like "[a]" may be plain text."""
    return len(tensor.shape) > 2 or (tensor.dtype != "string" and _width(tensor) != columns)


def _share_out(tensors: Sequence[InputTensor], table: Table, *, alone: bool) -> dict[str, tuple[str, ...]]:
    """The columns, divided in file order among the inputs."""
    columns = table.columns
    widths = [_width(tensor) for tensor in tensors]
    if len(tensors) == 1 and widths[0] is None and columns:
        return {tensors[0].name: tuple(columns)}
    wanted = sum(width or 1 for width in widths)
    if wanted != len(columns) and tensors:
        raise too_few_columns(tensors, None if None in widths else wanted, table, alone=alone)
    shares: dict[str, tuple[str, ...]] = {}
    start = 0
    for tensor, width in zip(tensors, widths, strict=True):
        stop = start + (width or 1)
        shares[tensor.name] = tuple(columns[start:stop])
        start = stop
    return shares


def _width(tensor: InputTensor) -> int | None:
    """How many columns fill the input; None: any number."""
    return tensor.shape[1] if len(tensor.shape) == 2 and tensor.per_record else 1


def columns_of(tensor: InputTensor, sources: Sequence[str]) -> tuple[Column, ...]:
    """The type of each column of the input, under the model's name or, without one, the file's."""
    if tensor.columns is not None:
        return tensor.columns
    return tuple(Column(source, dtype_to_read(tensor, index), tensor.nullable) for index, source in enumerate(sources))


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name.strip())
