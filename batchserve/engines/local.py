"""Scoring processes on this host: spawned, limited in memory, niced, killed independently.

A slot is one process, one pipe and one thread that waits for it. Slots share nothing but the queue of calls, so a
process can be killed at any moment, in the middle of a message too, and only its own call is lost. The process pools of
maintained libraries share a pipe and a lock between their processes, and end other calls, or all, when one dies.
"""

import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import PriorityQueue
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

from batchserve.allowance import out_of_memory
from batchserve.engines.process import ProcessLimits, cause_of_end, start_process
from batchserve.errors import OutOfMemory, ScoringCrashed, ScoringTimeout, Unavailable

T = TypeVar("T")

_START = 60.0
"""Seconds in which a process imports what scoring needs."""


class LocalCall(Generic[T]):
    """A call in a scoring process; see `engines.Call`."""

    def __init__(self, message: bytes, timeout: float) -> None:
        """`message`: the pickled function and its arguments."""
        self.future: Future[T] = Future()
        self.message = message
        self.timeout = timeout
        self.seconds: float | None = None
        self._begun = 0.0
        self._lock = Lock()
        self._killed = self._has_begun = False
        self._process: BaseProcess | None = None

    def withdraw(self) -> None:
        """Kills the call if it has not begun."""
        with self._lock:
            if not self._has_begun:
                self._killed = True
                self.future.cancel()

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()  # its slot notices the end, and ends the future
            else:
                self.future.cancel()

    def begin(self, process: BaseProcess) -> bool:
        """Assigns the call to this process, which a kill then ends. False when the call was cancelled."""
        with self._lock:
            if self._killed or self.future.cancelled():
                self.future.cancel()
                self.future.set_running_or_notify_cancel()
                return False
            self._process, self._has_begun = process, True
            self._begun = time.monotonic()
            return True

    def detach(self) -> bool:
        """Detaches the call from its process. Returns whether it was killed before."""
        with self._lock:
            self._process = None
            return self._killed

    def end(self, outcome: Any, error: BaseException | None) -> None:
        if self._killed:
            self.future.cancel()
        if not self.future.set_running_or_notify_cancel():
            return  # killed, or cancelled by its waiter
        if self._has_begun:
            self.seconds = time.monotonic() - self._begun
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(outcome)


_Queue = PriorityQueue[tuple[bool, int, LocalCall[Any] | None]]
"""Queued calls by urgency (False comes first) and number."""


class LocalEngine:
    """Slots that take calls from one queue. A slot starts when all others are busy: `serve --no-worker` scores no
    chunks, and sequential clients need one process."""

    def __init__(self, processes: int, limits: ProcessLimits) -> None:
        self.capacity, self._limits = processes, limits
        self._queue: _Queue = PriorityQueue()
        self._number = count()
        self._lock = Lock()
        self._slots: list[_Slot] = []
        self._calls: set[LocalCall[Any]] = set()
        self._closed = False

    def start(self) -> None:
        from batchserve.scoring.chunks import warm_up  # here: it imports all that scoring needs

        for _ in range(self.capacity):
            self.submit(warm_up, timeout=_START)

    def submit(self, function: Callable[..., T], *args: Any, timeout: float, urgent: bool = False) -> LocalCall[T]:
        return self.submit_pickled(pickle.dumps((function, args)), timeout, urgent=urgent)

    def submit_pickled(self, message: bytes, timeout: float, *, urgent: bool) -> LocalCall[Any]:
        """The same for a pickled function and its arguments."""
        call: LocalCall[Any] = LocalCall(message, timeout)
        with self._lock:
            if self._closed:
                raise Unavailable("the server is stopping")
            self._calls.add(call)
            if len(self._slots) < min(len(self._calls), self.capacity):
                self._slots.append(_Slot(self._queue, self._limits))
            self._queue.put((not urgent, next(self._number), call))
        call.future.add_done_callback(lambda _: self._calls.discard(call))
        return call

    def close(self) -> None:
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.kill()
        for _ in self._slots:
            self._queue.put((False, next(self._number), None))
        for slot in self._slots:
            slot.thread.join()


class _Slot:
    """One process at a time, and the thread that sends it one call at a time."""

    def __init__(self, queue: "_Queue", limits: ProcessLimits) -> None:
        self._queue, self._limits = queue, limits
        self._process: BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self.thread = Thread(target=self._serve, name="scoring-slot", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while (call := self._queue.get()[2]) is not None:
            try:
                process, pipe = self._ready()
                if not call.begin(process):
                    continue
                outcome, error = _exchange(call, process, pipe)
                if isinstance(error, MemoryError):
                    error = out_of_memory("scoring", self._limits.allowance)
                # The state of the process is unknown, and a kill may still reach it.
                if call.detach() or isinstance(error, ScoringTimeout | ScoringCrashed | OutOfMemory):
                    self._retire()
            except Exception as unforeseen:  # noqa: BLE001 - no files or memory left, say: the call fails, the slot continues
                call.detach()
                self._retire()
                outcome, error = None, ScoringCrashed(f"no scoring process could be used ({unforeseen})")
                time.sleep(0.1)
            call.end(outcome, error)
        self._retire()

    def _ready(self) -> "tuple[BaseProcess, Connection[Any, Any]]":
        """A live process: one that died while idle is replaced."""
        if self._process is None or self._pipe is None or not self._process.is_alive():
            self._retire()
            self._process, self._pipe = start_process(self._limits)
        return self._process, self._pipe

    def _retire(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
        self._process = self._pipe = None


def _exchange(
    call: LocalCall[Any], process: BaseProcess, pipe: "Connection[Any, Any]"
) -> tuple[Any, BaseException | None]:
    """Sends a call to its process and waits for the outcome, or for the error that ends it."""
    try:
        pipe.send_bytes(call.message)
        if not wait([pipe, process.sentinel], call.timeout):
            return None, ScoringTimeout(f"scoring took longer than {call.timeout:g} s and was stopped")
        outcome, error = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from our own process
    except (EOFError, OSError):  # it died, before or in the middle of its answer
        process.join()
        return None, ScoringCrashed(f"the scoring process died ({cause_of_end(process.exitcode)})")
    return outcome, error
