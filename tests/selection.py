"""Which cases of a crossing run with the default tests; the others are slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_first(values: Iterable[Any], quick: int) -> list[Any]:
    """So many of the first cases run by default. A tuple is a case of several arguments."""
    return [_case(value, is_quick=number < quick) for number, value in enumerate(values)]


def quick_of(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases in `quick`, which must exist, run by default. A tuple is a case of several arguments."""
    values = list(values)
    assert all(value in values for value in quick), "a case that is to run by default is not there"
    return [_case(value, is_quick=value in quick) for value in values]


def _case(value: Any, *, is_quick: bool) -> Any:
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=[] if is_quick else [pytest.mark.slow])
