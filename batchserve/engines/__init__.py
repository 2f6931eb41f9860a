"""Where chunks run. An engine calls pure functions of storage keys in processes that may be killed."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from batchserve.errors import InvalidOptions

if TYPE_CHECKING:  # scoring processes import this module, and do not need pydantic
    from batchserve.settings import Settings

__all__ = ["Call", "Engine", "Interactive", "open_engine", "open_interactive"]

T = TypeVar("T")


class Call(Protocol[T]):
    """A submitted function call. `future` completes with the value, or with a BatchserveError:

    ScoringCrashed (the process died), ScoringTimeout (it was killed), OutOfMemory, or what the function raised.
    """

    future: Future[T]
    seconds: float | None
    """How long its process has worked, of a call that has ended and was not killed."""

    def kill(self) -> None:
        """Ends the call and its process immediately; other calls continue. Its future ends as cancelled."""
        ...


class Engine(Protocol):
    """Scores the chunks of a worker's jobs, on this host or on others."""

    @property
    def capacity(self) -> int:
        """Calls that run at the same time. It may change while calls run, and be 0: then submitted calls wait."""
        ...

    def start(self) -> None:
        """Prepares for calls, so that the first ones need not wait for it. A worker calls it once, before the others.

        Raises InvalidOptions or Unavailable when no call could ever run.
        """
        ...

    def submit(self, function: Callable[..., T], *args: Any, timeout: float, urgent: bool = False) -> Call[T]:
        """Calls a module-level function, in the order of submission; urgent calls first."""
        ...

    def close(self) -> None:
        """Kills running calls and ends the processes."""
        ...


class Interactive(Protocol):
    """Runs the calls that a client waits for: on this host, and never queued behind a worker's chunks. For one event
    loop, which writes to the processes and watches them itself: a hop to a thread would take five times as long."""

    capacity: int
    """Calls that run at the same time."""

    async def run(self, function: Callable[..., T], *args: Any, seconds: float) -> T:
        """The value of a module-level function; calls start in the order of submission. Cancelling a call kills its
        process; other calls continue. Raises what the function raises, ScoringCrashed (the process died),
        ScoringTimeout (it was killed after `seconds`), OutOfMemory, and Unavailable after `close`.
        """
        ...

    def close(self) -> None:
        """Kills running calls and ends the processes."""
        ...


def open_engine(settings: "Settings") -> Engine:
    """The engine of the settings. Raises InvalidOptions for an unknown kind."""
    if settings.engine.startswith("ray://"):
        from batchserve.engines.ray import RayEngine

        return RayEngine(settings)
    if settings.engine != "local":
        raise InvalidOptions(f"BATCHSERVE_ENGINE is {settings.engine!r}; expected 'local' or 'ray://HOST:PORT'")
    from batchserve.engines.local import LocalEngine
    from batchserve.engines.process import scoring_limits

    return LocalEngine(settings.processes, scoring_limits(settings))


def open_interactive(settings: "Settings") -> Interactive:
    """Processes of this host, independent of the engine for chunks."""
    from batchserve.engines.interactive import InteractiveProcesses
    from batchserve.engines.process import interactive_limits

    return InteractiveProcesses(_INTERACTIVE, interactive_limits(settings))


_INTERACTIVE = 3
"""Number of interactive processes: two for one tenant, so that an admission does not block its other calls, and one
that it leaves to others."""
