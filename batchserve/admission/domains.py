"""What a graph says of the values of its columns: `batchserve.domains`, written by the conversion."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batchserve.domain import Categories, Domain, InputTensor
from batchserve.errors import ModelRefused
from batchserve.inference.domains import dtype_to_read, pack, unpack

__all__ = ["known_missing", "with_domains", "written"]

MAX_PACKED = 16 * 2**20
"""Characters of the categories of one column; 100,000 texts of 20 letters take about a megabyte."""


def written(domain: Domain, *, missing: bool) -> dict[str, Any]:
    """A domain as it stands in the metadata, without what is usual. `missing`: whether a value may be missing."""
    entry: dict[str, Any] = {"missing": missing}
    entry |= {name: False for name in ("infinite", "empty") if not getattr(domain, name)}
    entry |= {"whole": True} if domain.whole else {}
    entry |= {name: limit for name in ("low", "high") if (limit := getattr(domain, name)) is not None}
    if domain.categories is not None:
        entry["categories"] = domain.categories.packed
    return entry


def with_domains(inputs: tuple[InputTensor, ...], metadata: Mapping[str, Any]) -> tuple[InputTensor, ...]:
    """The inputs with the domains of their columns. Raises ModelRefused for entries that do not fit them."""
    given = metadata.get("domains", {})
    unknown = sorted(set(given) - {tensor.name for tensor in inputs})
    if unknown:
        raise ModelRefused(f"batchserve.domains: the graph has no input {unknown[0]!r}")
    return tuple(_with_domains(tensor, given[tensor.name]) if tensor.name in given else tensor for tensor in inputs)


def _with_domains(tensor: InputTensor, entries: Any) -> InputTensor:
    tensor = replace(tensor, domains=_domains(tensor, entries))
    if tensor.columns is None:
        return tensor
    read = [
        column.dtype if column.dtype == "bool" else dtype_to_read(tensor, i) for i, column in enumerate(tensor.columns)
    ]
    columns = zip(tensor.columns, read, strict=True)
    return replace(tensor, columns=tuple(replace(column, dtype=dtype) for column, dtype in columns))


def known_missing(metadata: Mapping[str, Any], tensor: InputTensor) -> list[bool] | None:
    """For each column of an input whether a value may be missing, where the conversion has found that out."""
    entries = metadata.get("domains", {}).get(tensor.name)
    return None if entries is None else [bool(entry["missing"]) for entry in entries]


def _domains(tensor: InputTensor, entries: Any) -> tuple[Domain, ...]:
    width = len(tensor.columns) if tensor.columns is not None else tensor.shape[1] if len(tensor.shape) == 2 else 1
    if not isinstance(entries, list) or len(entries) != width or not tensor.per_record or tensor.image is not None:
        raise ModelRefused(f"batchserve.domains: input {tensor.name!r} needs a list of {width} objects")
    try:
        return tuple(_domain(entry) for entry in entries)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelRefused(f"batchserve.domains of {tensor.name!r} cannot be read: {error!r}") from error


def _domain(entry: Mapping[str, Any]) -> Domain:
    if not isinstance(entry["missing"], bool):
        raise TypeError("missing must be a boolean")
    low, high = (float(entry[name]) if name in entry else None for name in ("low", "high"))
    categories = _categories(entry["categories"]) if "categories" in entry else None
    flags = {name: bool(entry[name]) for name in ("infinite", "empty", "whole") if name in entry}
    return Domain(**flags, low=low, high=high, categories=categories)


def _categories(packed: str) -> Categories:
    if len(packed) > MAX_PACKED:
        raise ValueError(f"categories of more than {MAX_PACKED:,} characters")
    return pack(unpack(packed))
