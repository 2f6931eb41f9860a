"""Scoring processes whose pipes the event loop itself writes and reads: a call waits for no thread.

The loop waits for no process. What a pipe does not take at once stays in a buffer, an answer is gathered as it comes,
and starts and ends of processes are waited for in threads. A process may die, stall or stop reading in the middle of a
message: only its own call is lost.
"""

import asyncio
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from batchserve.allowance import out_of_memory
from batchserve.engines.process import ProcessLimits, cause_of_end, start_process
from batchserve.errors import ScoringCrashed, ScoringTimeout, Unavailable

__all__ = ["InteractiveProcesses"]

T = TypeVar("T")

_LONG = 2**18
"""Bytes of an answer that is unpickled in a thread."""
_PAUSE = 0.1
"""Seconds until the next try after a process could not be started."""
_LAST_WORDS = 1.0
"""Seconds in which a process whose pipe has ended may end by itself, with an exit code of its own."""


class InteractiveProcesses:
    """See `engines.Interactive`. A process starts when all others are busy: sequential clients need one."""

    def __init__(self, processes: int, limits: ProcessLimits) -> None:
        self.capacity, self._limits = processes, limits
        self._slots = asyncio.Semaphore(processes)
        self._idle: list[_Process] = []
        """The one used last is at the end, and is used next."""
        self._alive: set[_Process] = set()
        self._ending: set[asyncio.Task[str]] = set()
        self._closed = False

    async def run(self, function: Callable[..., T], *args: Any, seconds: float) -> T:
        message = pickle.dumps((function, args))
        async with self._slots:
            process = await self._ready()
            try:
                outcome, error = await process.exchange(message, seconds)
            except _Ended:
                cause = await asyncio.shield(self._end(process))
                raise ScoringCrashed(f"the scoring process died ({cause})") from None
            except BaseException:  # the call took too long, or was cancelled: its process still works on it
                self._kill(process)
                raise
            if isinstance(error, MemoryError):  # the state of the process is unknown
                self._kill(process)
                raise out_of_memory("scoring", self._limits.allowance)
            self._idle.append(process)
        if error is not None:
            raise error
        return cast(T, outcome)

    def close(self) -> None:
        self._closed = True
        for process in self._alive:
            process.kill()
        for process in self._alive:
            process.join()

    async def _ready(self) -> "_Process":
        """An idle process, or a new one. Raises Unavailable after `close`, and ScoringCrashed when none can be
        started."""
        while self._idle and not self._closed:
            process = self._idle.pop()
            if process.is_open:
                return process
            self._kill(process)  # it died while idle
        starting = asyncio.ensure_future(self._start())
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._idle.append(await starting)  # for the next call: a start cannot be cancelled
            raise

    async def _start(self) -> "_Process":
        try:
            child, pipe = await asyncio.to_thread(start_process, self._limits)
            with pipe:
                process = _Process(child, socket.socket(fileno=os.dup(pipe.fileno())))
            self._alive.add(process)
            try:
                await process.connect()
            except BaseException:
                self._kill(process)
                raise
        except Exception as unforeseen:  # no files or memory left, say
            await asyncio.sleep(_PAUSE)
            raise ScoringCrashed(f"no scoring process could be used ({unforeseen})") from unforeseen
        if self._closed:
            self._kill(process)
            raise Unavailable("the server is stopping")
        return process

    def _kill(self, process: "_Process") -> None:
        process.kill()
        self._end(process)

    def _end(self, process: "_Process") -> "asyncio.Task[str]":
        """Waits in a thread for the end of a process, and gives its cause."""

        async def ended() -> str:
            cause = await asyncio.to_thread(process.join)
            self._alive.discard(process)
            return cause

        task = asyncio.ensure_future(ended())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task


class _Ended(Exception):
    """The pipe of a process has ended."""


class _Process(asyncio.Protocol):
    """A process that answers one call at a time, and its pipe. Messages are framed as `multiprocessing` does it."""

    def __init__(self, child: BaseProcess, pipe: socket.socket) -> None:
        self._child, self._pipe = child, pipe
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[memoryview] | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    async def connect(self) -> None:
        self._pipe.setblocking(False)
        await self._loop.connect_accepted_socket(lambda: self, self._pipe)

    async def exchange(self, message: bytes, seconds: float) -> tuple[Any, BaseException | None]:
        """Sends a call, and waits for its outcome or error. Raises ScoringTimeout, ScoringCrashed for an answer that
        cannot be read, and _Ended: then the process is of no more use."""
        self._answer = self._loop.create_future()
        timer = self._loop.call_later(seconds, self._expire, seconds)
        try:
            self._send(message)
            answer = await self._answer
        finally:
            timer.cancel()
            self._answer = None
        try:
            if len(answer) >= _LONG:
                return await asyncio.to_thread(_outcome, answer)
            return _outcome(answer)
        except Exception as damaged:
            raise ScoringCrashed(f"the answer of a scoring process cannot be read ({damaged})") from damaged

    def kill(self) -> None:
        """Ends the process, and its call as cancelled. Does not wait."""
        self._child.kill()
        if self._transport is not None:
            self._transport.abort()
        if self._answer is not None:
            self._answer.cancel()

    def join(self) -> str:
        """Waits until the process has ended, and returns the cause. Call it in a thread."""
        self._child.join(_LAST_WORDS)
        if self._child.is_alive():  # it has closed its pipe, and does not end
            self._child.kill()
            self._child.join()
        return cause_of_end(self._child.exitcode)

    def _send(self, message: bytes) -> None:
        if self._transport is None:
            raise _Ended
        size = len(message)
        header = size.to_bytes(4) if size < 2**31 else b"\xff\xff\xff\xff" + size.to_bytes(8)
        for part in (header + message,) if size < _LONG else (header, message):
            sent = 0
            if not self._transport.get_write_buffer_size():
                with suppress(BlockingIOError, BrokenPipeError):  # at once: uvloop would serve others first
                    sent = self._pipe.send(part)
            if sent < len(part):
                self._transport.write(part[sent:])

    def _expire(self, seconds: float) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ScoringTimeout(f"scoring took longer than {seconds:g} s and was stopped"))

    # --- called by the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        start, size = 4, int.from_bytes(self._received[:4], signed=True)
        if size == -1:
            start, size = 12, int.from_bytes(self._received[4:12])
        if len(self._received) < start + size or len(self._received) < start:
            return
        answer = memoryview(self._received)[start:]
        self._received = bytearray()
        if self._answer is None or len(answer) != size:
            self.kill()  # no call waits for this: its answers would be those of others
        elif not self._answer.done():
            self._answer.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - a broken pipe is an ended one
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(_Ended())


def _outcome(answer: memoryview) -> tuple[Any, BaseException | None]:
    outcome, error = pickle.loads(answer)  # noqa: S301 - from our own process
    return outcome, error
