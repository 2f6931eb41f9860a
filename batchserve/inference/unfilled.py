"""The refusals of inputs that do not fill a model: what the model takes, and what the input has instead."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from batchserve.domain import Column, InputTensor, Signature
from batchserve.errors import SchemaMismatch
from batchserve.formats.protocol import ArrayType

__all__ = [
    "Table",
    "dtype_text",
    "hint",
    "listed",
    "shape_text",
    "too_few_columns",
    "unfilled_by_arrays",
    "unfilled_by_table",
    "wanted_array",
]

_LISTED = 20
"""Most names in a message."""
_LISTS = "a column of lists (Parquet, Arrow, NDJSON, JSON; in a CSV as JSON text)"


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of an input."""

    columns: Sequence[str]
    holds_arrays: Callable[[str], bool] = lambda _: False
    holds_bytes: Callable[[str], bool] = lambda _: False


def unfilled_by_table(
    signature: Signature, missing: Sequence[Column], lacking: Sequence[InputTensor], found: Mapping[str, str],
    others: Sequence[str] | None, table: Table,
) -> SchemaMismatch:  # fmt: skip
    """Of a table that has no column for the columns `missing` or the arrays `lacking`. `found`: model column -> column;
    `others`: the columns that fill nothing, None where that is open."""
    images = [tensor for tensor in signature.inputs if tensor.image and tensor.columns and tensor.columns[0] in missing]
    plain = [column for column in missing if column.dtype != "image"]
    sentences: list[str] = []
    errors: list[dict[str, Any]] = []
    extra: dict[str, int] = {}
    if plain:
        sentence, extra = _missing_columns(signature, plain, found, others)
        sentences.append(sentence)
        errors += [_missing(column, table.columns) for column in plain]
    if lacking:
        alone = len(signature.inputs) == 1
        sentences.append(
            _lacking(lacking[0], table, alone=alone) if len(lacking) == 1 else _all_lacking(lacking, table)
        )
        errors += [_fault(tensor.name, wanted_array(tensor), "no column holds it") for tensor in lacking]
    for tensor in images:
        name = tensor.columns[0].name if tensor.columns else tensor.name
        sentences.append(_without_image(tensor, name, table))
        errors.append(
            _fault(name, "image", f"no column is known to hold one{hint(name, table.columns)}; {_HOW_IMAGES}")
        )
    return SchemaMismatch(". ".join([*sentences[:1], *map(_capital, sentences[1:])]), errors=errors, **extra)


def too_few_columns(tensors: Sequence[InputTensor], wanted: int | None, table: Table, *, alone: bool) -> SchemaMismatch:
    """Of a table whose columns, by their count, do not fill inputs without column names. `wanted`: how many do; None:
    any number. `alone`: whether the model has no other inputs."""
    columns = table.columns
    if wanted is None:
        return SchemaMismatch(
            _all_lacking(tensors, table),
            errors=[_fault(tensor.name, wanted_array(tensor), "no column holds it") for tensor in tensors],
        )
    takes = ", ".join(f"{tensor.name!r} {wanted_array(tensor)}" for tensor in tensors if len(tensor.shape) > 1)
    arrays = f", or give each record an array: {takes}. {_ways(tensors, alone=alone)}" if takes else ""
    return SchemaMismatch(
        f"the model takes {wanted} columns that have no names, and the input has {len(columns)} to fill them: "
        f"{listed(columns)}. Pass columns with the {wanted} to take, in order{arrays}",
        expected=wanted,
        got=len(columns),
    )


def unfilled_by_arrays(signature: Signature, lacking: Sequence[str], arrays: Mapping[str, ArrayType]) -> SchemaMismatch:
    """Of arrays that lack those of some inputs."""
    wanted = [tensor.name for tensor in signature.inputs]
    takes = ", ".join(f"{tensor.name!r} ({_tensor_text(tensor)})" for tensor in signature.inputs[:_LISTED])
    has = ", ".join(f"{name!r} ({_array_text(array)})" for name, array in list(arrays.items())[:_LISTED])
    several = "s" if len(wanted) > 1 else ""
    if "" in arrays:
        got, way = f"one array without a name ({_array_text(arrays[''])})", "Send an npz that holds them by these names"
    else:
        got = f"the array{'s' if len(arrays) > 1 else ''} {has}: none is known to be that of {listed(lacking)}"
        way = f'Pass columns, as in {{"{lacking[0]}": "..."}}, to name it'
    return SchemaMismatch(
        f"the model takes the array{several} {takes}, and the input has {got}. {way}",
        errors=[_fault(name, _tensor_text(tensor), "no array of the input is known to be it")
                for name in lacking for tensor in signature.inputs if tensor.name == name],
        expected=wanted,
        got=[name or "one array without a name" for name in arrays],
    )  # fmt: skip


# --- parts of messages -----------------------------------------------------------------------------------------------

_HOW_IMAGES = "an image comes as a file, or as bytes, base64 or a data URI in a column"


def _fault(name: str, expected: str, message: str) -> dict[str, Any]:
    return {"column": name, "expected": expected, "message": f"expected {expected}: {message}"}


def _missing(column: Column, columns: Sequence[str]) -> dict[str, Any]:
    message = f"the model takes this column and the input has none of that name{hint(column.name, columns)}"
    return {"column": column.name, "expected": column.dtype, "message": message}


def _missing_columns(
    signature: Signature, missing: Sequence[Column], found: Mapping[str, str], others: Sequence[str] | None
) -> tuple[str, dict[str, int]]:
    wanted = len({*found, *(column.name for column in missing)})
    unused = f"; the model does not take its {listed(others)}. Pass columns to map them" if others else ""
    for_all = {tensor.name for tensor in signature.inputs if not tensor.per_record}
    shared = [column.name for column in missing if column.name in for_all]
    sentence = (
        f"the model takes {wanted} column{'s' if wanted > 1 else ''}, of which the input has {len(found)}: it lacks "
        f"{listed([column.name for column in missing])}{unused}"
        f"{f'. The option inputs gives values that all records share, as {listed(shared)} may be' if shared else ''}"
    )
    return sentence, {"expected": wanted, "got": len(found)}


def _lacking(tensor: InputTensor, table: Table, *, alone: bool) -> str:
    pictures = [name for name in table.columns if table.holds_bytes(name)]
    if pictures and not any(map(table.holds_arrays, table.columns)):
        given = (
            f"the input has files or bytes ({listed(pictures)}): of a graph of images, the metadata batchserve.image "
            "says how an image fills it"
        )
    else:
        given = _given(table)
    return (
        f"input {tensor.name!r} takes {wanted_array(tensor)} from each record. {_capital(given)}. "
        f"{_ways([tensor], alone=alone)}, or "
        f'pass columns, as in {{"{tensor.name}": "..."}}, to name the column'
    )


def _all_lacking(tensors: Sequence[InputTensor], table: Table) -> str:
    takes = ", ".join(f"{tensor.name!r} {wanted_array(tensor)}" for tensor in tensors)
    return f"the model takes arrays from each record: {takes}. {_given(table)}. {_ways(tensors, alone=False)}"


def _without_image(tensor: InputTensor, name: str, table: Table) -> str:
    return (
        f"input {tensor.name!r} takes an image from each record. The input has {listed(table.columns)}. Send files of "
        f"images, a zip of them, a column {name!r} of bytes, base64 or data URIs, or an array (npy, npz) of uint8 "
        f'[N, height, width, 3], or pass columns, as in {{"{name}": "..."}}, to name the column'
    )


def _given(table: Table) -> str:
    """What a table has instead of arrays under the names of inputs."""
    held = [name for name in table.columns if table.holds_arrays(name)]
    return f"The input has {listed(table.columns)}, of which {listed(held) if held else 'none'} " + (
        "hold arrays" if len(held) > 1 else "holds arrays"
    )


def _ways(tensors: Sequence[InputTensor], *, alone: bool) -> str:
    """`alone`: whether the model has no other input."""
    names = listed([tensor.name for tensor in tensors])
    if len(tensors) > 1:
        return f"Send them in an npz as {names}, or each in {_LISTS} of its name"
    files = "an npy or npz file" if alone else "an npz file with all arrays of the model"
    return f"Send it in {files}, or in {_LISTS} named {names}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _tensor_text(tensor: InputTensor) -> str:
    return f"{tensor.dtype} {shape_text((None, *tensor.shape[1:]) if tensor.per_record else tensor.shape)}"


def _array_text(array: ArrayType) -> str:
    return f"{dtype_text(array.dtype)} {shape_text(array.shape)}"


def dtype_text(dtype: np.dtype[Any]) -> str:
    """The type of an array as those of inputs are written."""
    return "string" if dtype.kind in "SUT" else dtype.name


def wanted_array(tensor: InputTensor) -> str:
    """The array that an input takes from each record."""
    return f"an array {shape_text(tensor.shape[1:])} of {tensor.dtype}"


def hint(name: str, columns: Iterable[str]) -> str:
    """Columns of similar names, in parentheses; nothing where there are none."""
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
