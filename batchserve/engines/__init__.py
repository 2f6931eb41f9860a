"""Where chunks run. An engine calls pure functions of storage keys in processes that may be killed."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from batchserve.errors import InvalidOptions

if TYPE_CHECKING:  # scoring processes import this module, and have no use for pydantic
    from batchserve.settings import Settings

__all__ = ["Call", "Engine", "Interactive", "open_engine", "open_interactive"]

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
    """Where a worker has the chunks of its jobs scored, on this host or on others."""

    capacity: int
    """Calls that run at the same time."""

    def submit(self, function: Callable[..., T], *args: Any, timeout: float, urgent: bool = False) -> Call[T]:
        """Calls a module-level function, in the order of the submissions; urgent ones before others."""
        ...

    def close(self) -> None:
        """Kills what runs and ends the processes."""
        ...


class Interactive(Protocol):
    """Where the API has what a client waits for computed: on this host, and never behind a worker's chunks."""

    capacity: int
    """Calls that run at the same time."""

    def submit(self, function: Callable[..., T], *args: Any, timeout: float) -> Call[T]:
        """Calls a module-level function, in the order of the submissions."""
        ...

    def close(self) -> None:
        """Kills what runs and ends the processes."""
        ...


def open_engine(settings: "Settings") -> Engine:
    """The engine of the settings. Raises InvalidOptions for any address but that of a kind that there is."""
    if settings.engine != "local":
        raise InvalidOptions(f"BATCHSERVE_ENGINE is {settings.engine!r}; expected 'local'")
    from batchserve.engines.local import LocalEngine
    from batchserve.engines.process import scoring_limits

    return LocalEngine(settings.processes, scoring_limits(settings))


def open_interactive(settings: "Settings") -> Interactive:
    """Processes of this host, whatever engine scores the chunks."""
    from batchserve.engines.local import LocalEngine
    from batchserve.engines.process import interactive_limits

    return LocalEngine(_INTERACTIVE, interactive_limits(settings))


_INTERACTIVE = 3
"""Processes for clients that wait: two for one tenant, so that a model under admission does not block its other calls,
and one that it leaves to others."""
