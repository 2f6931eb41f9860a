"""Functions that numba compiles, which is optional: only modules that import it use this one. A module of compiled
functions compiles them when it is imported, once for a machine.
"""

from collections.abc import Callable
from typing import TypeVar

from numba import njit, types
from numba.core.dispatcher import Dispatcher
from numba.core.typing.templates import Signature

__all__ = ["compiled", "read_only", "written"]

F = TypeVar("F", bound=Callable[..., object])


def read_only(dtype: types.Type, axes: int = 1) -> types.Array:
    """An array that is only read: what was read from a file cannot be written, and a copy of it would take time."""
    return types.Array(dtype, axes, "C", readonly=True)


def written(dtype: types.Type, axes: int = 1) -> types.Array:
    return types.Array(dtype, axes, "C")


def compiled(signature: Signature) -> "Callable[[F], Dispatcher[F]]":
    """Compiles a function when it is defined, and keeps the machine code beside its source or in the user's cache."""

    def compile_function(function: F) -> "Dispatcher[F]":
        try:
            return njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except (RuntimeError, OSError):  # neither folder is writable: every process compiles separately
            return njit(signature, nogil=True, error_model="numpy")(function)

    return compile_function
