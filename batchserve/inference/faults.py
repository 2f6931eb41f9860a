"""Errors of records that cannot be scored: the first one found for each."""

from collections.abc import Callable

import numpy as np

from batchserve.domain import RowError

__all__ = ["InvalidValue", "RecordErrors"]


class InvalidValue(Exception):
    """A value that cannot be scored: the code and the message of its row error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def row_error(self, record: int, column: str | None) -> RowError:
        return RowError(record, self.code, self.message, column)


class RecordErrors:
    """The errors of so many records."""

    def __init__(self, records: int) -> None:
        self.mask = np.zeros(records, bool)
        self._errors: dict[int, RowError] = {}

    def add(self, error: RowError) -> None:
        self.mask[error.record] = True
        self._errors.setdefault(error.record, error)

    def add_at(self, record: int, column: str, invalid: InvalidValue) -> None:
        self.add(invalid.row_error(record, column))

    def add_each(self, mask: np.ndarray, column: str, make: Callable[[int], InvalidValue]) -> None:
        """Adds an error for each record of the mask; `make` builds it."""
        for record in np.flatnonzero(mask & ~self.mask).tolist():
            self.add_at(record, column, make(record))

    def add_missing(self, mask: np.ndarray, column: str) -> None:
        invalid = InvalidValue("missing-value", f"no value for {column!r}, and the model needs one")
        self.add_each(mask, column, lambda _: invalid)

    def errors(self) -> list[RowError]:
        """The errors in record order."""
        return [self._errors[record] for record in sorted(self._errors)]
