"""Values of a column for a reader."""

from typing import Any

import polars as pl

__all__ = ["values_of"]


def values_of(column: pl.Series) -> list[Any]:
    """As Python objects; as texts where Python has none for some, such as for years beyond 9999."""
    try:
        return column.to_list()
    except (ValueError, OverflowError, pl.exceptions.PanicException):
        return column.cast(pl.String(), strict=False).to_list()
