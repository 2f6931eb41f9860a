"""Which values of an input its model does not answer: unknown categories, and numbers out of range."""

import base64
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import polars as pl

from batchserve.domain import Categories, Domain, DType, InputTensor
from batchserve.formats.schema import shorten
from batchserve.inference.faults import InvalidValue, RecordErrors

__all__ = ["dtype_to_read", "find_infinite", "find_outside", "find_outside_array", "pack", "unpack"]

_SHOWN = 5
"""So many known categories a message names."""
_MOST_BYTES = 1 << 26
"""Of all values of one column, unpacked: a model may be made to fill the memory."""


def pack(values: Sequence[str | float]) -> Categories:
    """The known values of a column: texts, or numbers."""
    packed = base64.b64encode(zlib.compress(json.dumps(list(values)).encode(), 9)).decode()
    return Categories(len(values), tuple(values[:_SHOWN]), packed)


@lru_cache(maxsize=256)
def unpack(packed: str) -> tuple[str | float, ...]:
    """All values of a `Categories.packed`. Raises ValueError."""
    unpacking = zlib.decompressobj()
    try:
        values = json.loads(unpacking.decompress(base64.b64decode(packed, validate=True), _MOST_BYTES))
    except zlib.error as error:
        raise ValueError(f"categories cannot be unpacked: {error}") from None
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise ValueError("categories must be a list of texts or numbers")
    return tuple(values)


@lru_cache(maxsize=256)
def _known(packed: str, kind: pl.DataType) -> pl.Series:
    return pl.Series(list(unpack(packed)), dtype=pl.Float64() if kind.is_float() else None, strict=False).cast(kind)


def find_outside(series: pl.Series, domain: Domain, name: str, faults: RecordErrors, place: str = "") -> None:
    """Adds a fault for each value outside of the domain. Missing values are not its concern. `name`: of the column in
    the input; `place`: of the values in each of its arrays, for messages."""
    if series.dtype == pl.String() and not domain.empty:
        empty = InvalidValue("missing-value", f"an empty text for {name!r}{place}, and the model needs a value")
        faults.add_each(_mask(series == ""), name, lambda _: empty)
    if series.dtype.is_numeric():
        _find_far(series, domain, name, faults, place)
    if domain.categories is not None:
        _find_unknown(series, domain.categories, name, faults, place)


def _find_unknown(series: pl.Series, categories: Categories, name: str, faults: RecordErrors, place: str) -> None:
    series = series.cast(pl.Int64()) if series.dtype == pl.Boolean() else series
    outside = series.is_not_null() & ~series.is_in(_known(categories.packed, series.dtype).implode())
    if series.dtype.is_float():
        outside &= series.is_not_nan()
    if not outside.any():
        return
    known = ", ".join(shorten(value) for value in categories.some)
    more = f" and {categories.count - len(categories.some):,} more" if categories.count > len(categories.some) else ""

    def unknown(record: int) -> InvalidValue:
        return InvalidValue(
            "unknown-category",
            f"{shorten(series[record])} is no category of {name!r}{place} that the model knows: it knows {known}{more}",
        )

    faults.add_each(_mask(outside), name, unknown)


def _find_far(series: pl.Series, domain: Domain, name: str, faults: RecordErrors, place: str) -> None:
    def far(outside: pl.Series, limits: str) -> None:
        faults.add_each(
            _mask(outside),
            name,
            lambda record: InvalidValue("out-of-range", f"expected {limits} for {name!r}{place}, got {series[record]}"),
        )

    if series.dtype.is_float() and not domain.infinite:
        far(series.is_infinite(), "a finite number")
    if series.dtype.is_float() and domain.whole:
        far(series.is_finite() & (series != series.round()), "a whole number")
    if domain.low is None and domain.high is None:
        return
    low, high = -np.inf if domain.low is None else domain.low, np.inf if domain.high is None else domain.high
    outside = (series < low) | (series > high)
    if series.dtype.is_float():
        outside &= series.is_finite()
    below, above = domain.low is not None, domain.high is not None
    limits = f"a number from {low:.15g} to {high:.15g}" if below and above else f"at least {low:.15g}"
    far(outside, limits if below else f"at most {high:.15g}")


def _mask(outside: pl.Series) -> np.ndarray:
    return outside.fill_null(value=False).to_numpy()


def find_infinite(tensor: InputTensor, matrix: np.ndarray, sources: Sequence[str], faults: RecordErrors) -> None:
    """The same for infinite values in all columns of an input at once. `sources`: their names."""
    if not tensor.domains or matrix.dtype.kind != "f" or not matrix.size or _surely_finite(matrix):
        return
    for domain, source, values in zip(tensor.domains, sources, matrix.reshape(len(matrix), -1).T, strict=False):
        if not domain.infinite:
            find_outside(pl.Series(np.ascontiguousarray(values)), Domain(infinite=False), source, faults)


def _surely_finite(matrix: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(matrix.sum()))  # in one pass; one value that is not makes the sum so


def find_outside_array(tensor: InputTensor, array: np.ndarray, name: str, faults: RecordErrors) -> None:
    """The same for an array [N] or [N, k] that fills an input as it is. `name`: that of the array, whose values the
    file gives none."""
    flat = array.reshape(len(array), -1) if array.size else array
    if not tensor.domains or not array.size or flat.shape[1] != len(tensor.domains):
        return
    if all(domain.is_plain for domain in tensor.domains) and (flat.dtype.kind != "f" or _surely_finite(flat)):
        return
    for index, (domain, values) in enumerate(zip(tensor.domains, flat.T, strict=True)):
        given = pl.Series(values.tolist() if values.dtype.kind in "UTO" else np.ascontiguousarray(values))
        if tensor.columns is not None:
            find_outside(given, domain, tensor.columns[index].name, faults)
        else:
            find_outside(given, domain, name, faults, f"[{index}]" if array.ndim > 1 else "")


def dtype_to_read(tensor: InputTensor, index: int) -> DType:
    """The type in which a column without a name is read: limits are compared before a value is rounded."""
    if tensor.dtype != "float32" or not tensor.domains or tensor.domains[index].is_plain:
        return tensor.dtype
    return "float64"
