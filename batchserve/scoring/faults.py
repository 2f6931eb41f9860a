"""What users' data makes libraries raise, as errors with a name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import polars as pl

from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.scoring.inputs import Input

P = ParamSpec("P")
R = TypeVar("R")

PANICS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What polars raises."""


def by_name(function: Callable[P, R]) -> Callable[P, R]:
    """Turns what polars raises over user data, panics too, into a named error: over a date outside the calendar,
    say."""

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except PANICS as error:
            raise _named(error) from error

    return named


@contextmanager
def of_input(input: Input) -> Iterator[None]:
    """Names the input in what is wrong with it, where it has an address: it may be one of thousands."""
    try:
        yield
    except (InvalidInput, SchemaMismatch) as error:
        if input.version is None:
            raise
        raise type(error)(f"{input.key}: {error.detail}", errors=error.errors) from error
    except PANICS as error:
        if input.version is None:
            raise
        raise InvalidInput(f"{input.key}: {_named(error).detail}") from error


def _named(error: BaseException) -> InvalidInput:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return InvalidInput(f"a value of the input can be neither read nor written: {reason[:200]}")
