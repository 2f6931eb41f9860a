"""Which columns of a file fill which inputs of a model."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain

from batchserve.domain import Column, DType, InputTensor, Signature
from batchserve.errors import InvalidOptions, SchemaMismatch
from batchserve.inference.domains import dtype_to_read

__all__ = ["Binding", "bind", "columns_of", "listed", "positions", "shape_text"]

_LISTED = 20
"""Most names in a message."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Which columns of a file fill which inputs of a model: the columns of each input, in its order."""

    sources: dict[str, tuple[str, ...]]
    types: dict[str, DType]
    """File column -> the dtype to read it as. Images and arrays are read in the file's type: bytes, lists or text."""

    arrays: dict[str, str] = field(default_factory=dict)
    """Input -> the column that fills it with an array from each record; also in `sources`."""

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

    Named inputs take their columns by name; spaces and signs count as underscores where that is unambiguous. An input
    without names for its columns takes one column that `holds_arrays`: the one with its name, or the only one. Images
    come from the column with their name, from the only one that `holds_bytes`, or from the only one left. What is left
    over fills the other inputs without names, in file order, when the count is right. `rename` is the option `columns`:
    a list names the columns to take, in order; a mapping says {model column: file column}.

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
    named = _find_named(signature, columns, mapping, holds_bytes)
    left = [column for column in columns if column not in named.values()]
    arrays = _find_arrays(signature, left, mapping, holds_arrays)
    return _join(signature, named, arrays, [column for column in left if column not in arrays.values()])


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


def _join(signature: Signature, named: dict[str, str], arrays: dict[str, str], left: Sequence[str]) -> Binding:
    unnamed = [tensor for tensor in signature.inputs if tensor.columns is None and tensor.name not in arrays]
    shares = _share_out(unnamed, left)
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
                f"columns: there is no {source!r} in the input{_hint(source, columns)}; it has {listed(columns)}",
                errors=[{"column": source, "message": "is not in the input"}],
            )


def _chosen(names: Sequence[str], columns: Sequence[str]) -> Sequence[str]:
    absent = [name for name in names if name not in columns]
    if absent:
        raise SchemaMismatch(
            f"columns: there is no {listed(absent)} in the input; it has {listed(columns)}",
            errors=[{"column": name, "message": f"is not in the input{_hint(name, columns)}"} for name in absent],
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidOptions(f"columns: {listed(twice)} appears more than once")
    return names


def _find_named(
    signature: Signature, columns: Sequence[str], mapping: Mapping[str, str], holds_bytes: Callable[[str], bool]
) -> dict[str, str]:
    """Model column -> file column, for all columns that have names."""
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
        likely = [name for name in left if holds_bytes(name)] or left
        if len(likely) == 1:
            found[missing.pop().name] = likely[0]
    if missing:
        raise _missing_columns(signature, missing, found, columns)
    return found


def _of_arrays(signature: Signature) -> list[InputTensor]:
    """The inputs that one column with arrays can fill."""
    return [tensor for tensor in signature.inputs if tensor.columns is None and len(tensor.shape) > 1]


def _find_arrays(
    signature: Signature, columns: Sequence[str], mapping: Mapping[str, str], holds_arrays: Callable[[str], bool]
) -> dict[str, str]:
    """Input -> the file column whose arrays fill it. Raises SchemaMismatch for an input that no other column could
    fill."""
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
    for tensor in lacking:
        # Next to arrays, any number of scalar columns would fill an input of any length by accident.
        if len(tensor.shape) > 2 or (found and tensor.per_record and tensor.shape[1] is None):
            raise SchemaMismatch(
                f"input {tensor.name!r} takes an array {shape_text(tensor.shape[1:])} from each record, and no column "
                f"has its name and holds arrays; the input has {listed(columns)}. Pass columns, as in "
                f'{{"{tensor.name}": "..."}}, to name one, or send an npy or npz file',
                errors=[{"column": tensor.name, "message": "the model takes a column of arrays"}],
            )
    return found


def _may_be_alone(tensor: InputTensor, columns: int) -> bool:
    """Whether the only column with arrays fills this input: not where as many columns fill it one value each, nor where
    a text like "[a]" may be plain text."""
    return len(tensor.shape) > 2 or (tensor.dtype != "string" and _width(tensor) != columns)


def _missing_columns(
    signature: Signature, missing: Sequence[Column], found: Mapping[str, str], columns: Sequence[str]
) -> SchemaMismatch:
    errors = []
    for column in missing:
        message = f"the model takes this column and the input has none of that name{_hint(column.name, columns)}"
        if column.dtype == "image":
            message += "; an image comes as a file, or as bytes, base64 or a data URI in a column"
        errors.append({"column": column.name, "expected": column.dtype, "message": message})
    wanted = len({*found, *(column.name for column in missing)})
    others = [name for name in columns if name not in found.values()]
    unused = f"; the model does not take its {listed(others)}. Pass columns to map them"
    for_all = {tensor.name for tensor in signature.inputs if not tensor.per_record}
    shared = [column.name for column in missing if column.name in for_all]
    return SchemaMismatch(
        f"the model takes {wanted} column{'s' if wanted > 1 else ''}, of which the input has {len(found)}: it lacks "
        f"{listed([column.name for column in missing])}{unused if others else ''}"
        f"{f'. The option inputs gives values that all records share, as {listed(shared)} may be' if shared else ''}",
        errors=errors,
        expected=wanted,
        got=len(found),
    )


def _share_out(tensors: Sequence[InputTensor], columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns, divided in file order among the inputs."""
    widths = [_width(tensor) for tensor in tensors]
    if len(tensors) == 1 and widths[0] is None and columns:
        return {tensors[0].name: tuple(columns)}
    wanted = sum(width or 1 for width in widths)
    if wanted != len(columns) and tensors:
        raise SchemaMismatch(
            f"the model takes {wanted} columns that have no names, and the input has {len(columns)} to fill them: "
            f"{listed(columns)}. Pass columns with the {wanted} to take, in order",
            expected=wanted,
            got=len(columns),
        )
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
    return re.sub(r"\W", "_", name)


def _hint(name: str, columns: Iterable[str]) -> str:
    lower = {column.lower(): column for column in columns}
    close = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.7)]
    return f" (close: {listed(close)})" if close else ""


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first of many."""
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{shown}{more}" if names else "no columns"


def shape_text(shape: Iterable[int | None]) -> str:
    """A shape for a message; a free dimension is N."""
    return f"[{', '.join('N' if size is None else str(size) for size in shape)}]"
