"""Where chunks run. An engine calls pure functions of storage keys in processes that may be killed."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from batchserve.errors import InvalidOptions

if TYPE_CHECKING:  # scoring processes import this module, and have no use for pydantic
    from batchserve.settings import Settings

__all__ = ["Call", "Engine", "open_engine"]

T = TypeVar("T")


class Call(Protocol[T]):
    """A function call on its way. `future` ends with the value, or with a BatchserveError:

    ScoringCrashed (the process died), ScoringTimeout (it was killed), OutOfMemory, or what the function raised.
    """

    future: Future[T]

    def kill(self) -> None:
        """Ends the call now, with its process; other calls go on. Its future ends as cancelled."""
        ...


class Engine(Protocol):
    capacity: int
    """Calls that run at the same time."""
    interactive: int
    """Calls of clients that wait that run at the same time, beside those."""

    def submit(self, function: Callable[..., T], *args: Any, timeout: float, urgent: bool = False) -> Call[T]:
        """Calls a module-level function for a worker, in the order of the submissions; urgent ones before others."""
        ...

    def submit_interactive(self, function: Callable[..., T], *args: Any, timeout: float) -> Call[T]:
        """The same for a client that waits: never behind a worker's chunks."""
        ...

    def close(self) -> None:
        """Kills what runs and ends the processes."""
        ...


def open_engine(settings: "Settings") -> Engine:
    """The engine of the settings. Raises InvalidOptions for an address nobody serves."""
    if settings.engine != "local":
        raise InvalidOptions(f"BATCHSERVE_ENGINE is {settings.engine!r}; expected 'local'")
    from batchserve.engines.local import LocalEngine

    return LocalEngine(settings)
