"""What users' data makes libraries raise, as errors with a name."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import polars as pl

from batchserve.errors import InvalidInput

P = ParamSpec("P")
R = TypeVar("R")


def by_name(function: Callable[P, R]) -> Callable[P, R]:
    """Turns what polars raises over user data, panics too, into a named error: over a date outside the calendar,
    say."""

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InvalidInput(f"a value of the input can be neither read nor written: {reason[:200]}") from error

    return named
