"""The Ray engine on a host that scores: one actor, which holds the slots of a local engine.

All drivers share it, so that a host never has more processes than its settings say. What a call may take, how it is
killed and which one is first are therefore those of `engines.local`; the limits are those of this host's settings, and
so are credentials.
"""

import asyncio
import os
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import metadata
from threading import Lock, Thread

from batchserve.engines.local import LocalCall, LocalEngine
from batchserve.engines.process import ProcessLimits, answer_of, scoring_limits
from batchserve.secrets import take_from_files
from batchserve.settings import Settings
from batchserve.storage import open_storage

__all__ = ["ScoringHost", "deciding_facts"]

_ABSENT = 30.0
"""Seconds without a ping after which the calls of a driver are killed."""
_UNUSED = 30.0
"""Seconds without any driver after which the actor ends."""
_DECIDING = ("batchserve", "numpy", "onnxruntime", "polars", "numba", "ray")
"""The libraries that decide the bytes of a result."""


def deciding_facts(settings: Settings) -> dict[str, str]:
    """What must be equal on all hosts, so that a result does not depend on where its chunks were scored."""
    found = {
        "Python": platform.python_version(),
        "BATCHSERVE_PROVIDERS": settings.providers,
        "BATCHSERVE_IMAGE_PIXELS": str(settings.image_pixels),
    }
    for name in _DECIDING:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@dataclass(slots=True)
class _Driver:
    """A process that dispatches calls, as this host knows it."""

    seen: float
    calls: dict[int, LocalCall[object]] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    """Calls whose kill came before them."""


class ScoringHost:
    """The actor. Methods are those of one driver each, which is named first; they run in one event loop."""

    def __init__(self, cpus: int) -> None:
        """`cpus`: those of this host that Ray knows, which may be fewer than it has."""
        _forget_main()
        take_from_files(os.environ)
        settings = Settings()
        self._facts = deciding_facts(settings)
        self._processes = settings.processes if "processes" in settings.model_fields_set else max(1, cpus)
        self._engine = LocalEngine(self._processes, _limits_here(settings, max(1, cpus // self._processes)))
        self._drivers: dict[str, _Driver] = {}
        self._lock = Lock()
        self._used = time.monotonic()
        Thread(target=self._look_after, name="look-after", daemon=True).start()

    async def about(self, driver: str) -> tuple[int, dict[str, str]]:
        """The number of scoring processes, and what decides the bytes of their results."""
        await self.ping(driver)
        return self._processes, self._facts

    async def reads(self, storage: str, key: str) -> str:
        """Why this host cannot read an object; empty when it can."""

        def read() -> None:
            with open_storage(storage).open(key) as source:
                source.read()

        try:
            await asyncio.to_thread(read)
        except Exception as error:  # noqa: BLE001 - told to the driver, whatever it is
            return f"{type(error).__name__}: {error}"
        return ""

    async def ping(self, driver: str) -> int:
        """The driver lives. Returns the number of calls here of all others."""
        with self._lock:
            self._driver(driver)
            return sum(len(state.calls) for name, state in self._drivers.items() if name != driver)

    async def run(self, driver: str, number: int, message: bytes, seconds: float, urgent: bool) -> bytes | None:
        """The pickled outcome and error of a call; None when it was killed."""
        with self._lock:
            state = self._driver(driver)
            if number in state.killed:
                return None
            call: LocalCall[object] = self._engine.submit_pickled(message, seconds, urgent=urgent)
            state.calls[number] = call
        outcome, error = None, None
        try:
            outcome = await asyncio.wrap_future(call.future)
        except asyncio.CancelledError:
            return None
        except Exception as raised:  # noqa: BLE001 - sent to the driver
            error = raised
        finally:
            with self._lock:
                state.calls.pop(number, None)
        return answer_of(outcome, error)

    async def kill(self, driver: str, numbers: list[int]) -> None:
        """Kills calls of a driver, also those that have not arrived yet."""
        with self._lock:
            state = self._driver(driver)
            calls = [state.calls[number] for number in numbers if number in state.calls]
            state.killed.update(set(numbers) - set(state.calls))
        for call in calls:
            call.kill()

    async def withdraw(self, driver: str, number: int) -> None:
        """Kills a call that has not begun: its driver has found an idle host for it."""
        with self._lock:
            call = self._driver(driver).calls.get(number)
        if call is not None:
            call.withdraw()

    async def leave(self, driver: str) -> None:
        """The driver ends, and so do its calls."""
        self._drop(driver)

    def _driver(self, driver: str) -> _Driver:
        """Call it with the lock."""
        self._used = time.monotonic()
        state = self._drivers.setdefault(driver, _Driver(self._used))
        state.seen = self._used
        return state

    def _drop(self, driver: str) -> None:
        with self._lock:
            state = self._drivers.pop(driver, None)
            calls = list(state.calls.values()) if state is not None else []
        for call in calls:
            call.kill()

    def _look_after(self) -> None:
        """Ends the calls of lost drivers, and this process when no driver is left."""
        while True:
            time.sleep(1.0)
            now = time.monotonic()
            with self._lock:
                absent = [name for name, state in self._drivers.items() if now - state.seen > _ABSENT]
                is_unused = not self._drivers and now - self._used > _UNUSED
            for driver in absent:
                self._drop(driver)
            if is_unused:
                os._exit(0)  # its scoring processes end with it


def _limits_here(settings: Settings, threads: int) -> ProcessLimits:
    """The limits of a scoring process of this host. Ray raises the niceness of its processes; that of scoring processes
    is the one of the settings, or Ray's where it is higher."""
    limits = scoring_limits(settings)
    allowance = replace(limits.allowance, threads=threads)
    return replace(limits, nice=max(0, limits.nice - os.nice(0)), allowance=allowance)


def _forget_main() -> None:
    """Spawned processes import the main module of their parent: here that is Ray's, which would start a worker."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # this process unpickles errors and answers, no more
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__
