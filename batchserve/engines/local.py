"""Scoring processes on this host: spawned, limited in memory, niced, killed without harming each other."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Lock
from typing import Any, Generic, TypeVar

import pebble

from batchserve.errors import OutOfMemory, ScoringCrashed, ScoringTimeout
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
        return error


class LocalEngine:
    """Two pools of processes: one for the chunks of jobs, one for clients that wait for an answer."""

    def __init__(self, settings: Settings) -> None:
        self.capacity = settings.processes
        self._settings = settings
        self._lock = Lock()
        self._pools: dict[str, pebble.ProcessPool] = {}

    def submit(self, function: Callable[..., T], *args: Any, timeout: float) -> LocalCall[T]:
        return self._submit("batch", self.capacity, self._settings.process_nice, function, args, timeout)

    def submit_interactive(self, function: Callable[..., T], *args: Any, timeout: float) -> LocalCall[T]:
        return self._submit("interactive", 2, 0, function, args, timeout)

    def close(self) -> None:
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.stop()
        for pool in pools:
            pool.join()

    def _submit(
        self, name: str, processes: int, nice: int, function: Callable[..., T], args: Any, timeout: float
    ) -> LocalCall[T]:
        with self._lock:  # processes start with the first call: `serve --no-worker` never starts the batch pool
            if name not in self._pools:
                self._pools[name] = pebble.ProcessPool(
                    max_workers=processes,
                    initializer=_prepare_process,
                    initargs=(self._settings.process_memory, nice),
                    context=multiprocessing.get_context("spawn"),
                )
            raw: Any = self._pools[name].schedule(function, args=args, timeout=timeout)
        return LocalCall(raw, timeout)


def _prepare_process(memory: int, nice: int) -> None:
    """Makes this process a scoring process. Runs before polars and onnxruntime are imported: they read it then."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(nice)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A server that was killed takes its scoring processes along: nobody would ever read what they score."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _cause(exitcode: int | None) -> str:
    if exitcode is None:
        return "for an unknown cause"
    if exitcode < 0:
        return f"by signal {signal.Signals(-exitcode).name}"
    return f"with exit code {exitcode}"
