"""Scoring processes on this host: spawned, limited in memory, niced, killed without harming each other."""

import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from threading import Lock
from typing import Any, Generic, TypeVar

import pebble

from batchserve.errors import OutOfMemory, ScoringCrashed, ScoringTimeout, Unavailable
from batchserve.settings import Settings

T = TypeVar("T")


class LocalCall(Generic[T]):
    """A call in a scoring process; see `engines.Call`."""

    def __init__(self, raw: "pebble.ProcessFuture[T]", timeout: float) -> None:
        self.future: Future[T] = Future()
        self._raw = raw
        self._timeout = timeout
        raw.add_done_callback(self._end)

    def kill(self) -> None:
        self._raw.cancel()

    def _end(self, raw: "Future[T]") -> None:
        if raw.cancelled():
            self.future.cancel()
        if not self.future.set_running_or_notify_cancel():
            return  # killed, or whoever waited has left
        try:
            self.future.set_result(raw.result())
        except (Exception, pebble.ProcessExpired) as error:  # noqa: BLE001 - handed on to whoever waits
            self.future.set_exception(self._named(error))

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, FutureTimeout):
            return ScoringTimeout(f"scoring took longer than {self._timeout:g} s and was stopped")
        if isinstance(error, MemoryError):
            return OutOfMemory("scoring needed more memory than BATCHSERVE_PROCESS_MEMORY allows")
        if isinstance(error, pebble.ProcessExpired):
            return ScoringCrashed(f"the scoring process died ({_cause(error.exitcode)})")
        if isinstance(error, BrokenProcessPool):
            return ScoringCrashed("the scoring processes were started anew, because one of them was lost")
        return error


class LocalEngine:
    """Two pools of processes: one for the chunks of jobs, one for clients that wait for an answer."""

    def __init__(self, settings: Settings) -> None:
        self.capacity = settings.processes
        self._settings = settings
        self._lock = Lock()
        self._pools: dict[str, pebble.ProcessPool] = {}
        self._calls: set[LocalCall[Any]] = set()
        self._closed = False

    def submit(self, function: Callable[..., T], *args: Any, timeout: float) -> LocalCall[T]:
        return self._submit("batch", self.capacity, self._settings.process_nice, function, args, timeout)

    def submit_interactive(self, function: Callable[..., T], *args: Any, timeout: float) -> LocalCall[T]:
        return self._submit("interactive", 2, 0, function, args, timeout)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pools, calls = list(self._pools.values()), list(self._calls)
        for call in calls:  # the pool would leave those that wait without an end
            call.kill()
        for pool in pools:
            pool.stop()
        for pool in pools:
            pool.join()

    def _submit(
        self, name: str, processes: int, nice: int, function: Callable[..., T], args: Any, timeout: float
    ) -> LocalCall[T]:
        with self._lock:
            if self._closed:
                raise Unavailable("the server is stopping")
            try:
                raw = self._pool(name, processes, nice).schedule(_run, args=(function, args), timeout=timeout)
            except RuntimeError:  # pebble gives a pool up when a process dies that has nothing to do
                self._pools.pop(name).join()
                raw = self._pool(name, processes, nice).schedule(_run, args=(function, args), timeout=timeout)
            call: LocalCall[Any] = LocalCall(raw, timeout)
            self._calls.add(call)
        call.future.add_done_callback(lambda _: self._calls.discard(call))
        return call

    def _pool(self, name: str, processes: int, nice: int) -> pebble.ProcessPool:
        # Processes start with the first call: `serve --no-worker` never starts the batch pool.
        if name not in self._pools:
            self._pools[name] = pebble.ProcessPool(
                max_workers=processes,
                initializer=_prepare_process,
                initargs=(self._settings.process_memory, nice),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pools[name]


def _run(function: Callable[..., T], args: Any) -> T:
    try:
        return function(*args)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        except Exception:  # noqa: BLE001 - one that can not travel would end the whole pool
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def _prepare_process(memory: int, nice: int) -> None:
    """Makes this process a scoring process. Runs before polars and onnxruntime are imported: they read it then."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(nice)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A server that was killed takes its scoring processes along: nobody would ever read what they score."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _cause(exitcode: int | None) -> str:
    if exitcode is None:
        return "for an unknown cause"
    if exitcode < 0:
        return f"by signal {signal.Signals(-exitcode).name}"
    return f"with exit code {exitcode}"
