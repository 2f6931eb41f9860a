"""Writers for stores that take an object in parts, while it is written."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue

from batchserve.storage import Occupied, Stored

__all__ = ["StreamedWriter"]

Data = bytes | bytearray | memoryview
Put = Callable[[bytes | bytearray | Iterator[Data], int], None]
"""Stores an object, durable and visible when it returns: its bytes, or its parts as they come. Parts that end with an
error leave nothing."""


class _Abandoned(Exception):
    """The writer is left without a commit."""


class StreamedWriter:
    """Up to one part is held and stored by the commit; from then on a thread sends parts while further ones are
    written. Memory is bounded: who writes faster than the store takes it, waits.
    """

    def __init__(self, put: Put, part: int, ahead: int) -> None:
        """`part`: bytes of a part. `ahead`: parts that are sent at a time."""
        self._put, self._part = put, part
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._held = bytearray()
        self._queue: Queue[Data | None] = Queue(max(1, ahead // 2))
        self._sender: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_over = False

    def write(self, data: bytes | memoryview) -> None:
        """Raises what the store has raised meanwhile."""
        self._hash.update(data)
        self._bytes += len(data)
        if isinstance(data, bytes) and not self._held and len(data) >= self._part:
            self._send(data)  # nobody changes it: no copy
            return
        self._held += data
        if len(self._held) >= self._part:
            held, self._held = self._held, bytearray()
            self._send(held)

    def commit(self) -> Stored:
        stored = Stored(self._bytes, self._hash.hexdigest())
        try:
            self._finish()
        except FileExistsError as error:
            raise Occupied(stored) from error
        return stored

    def _finish(self) -> None:
        if self._sender is None:
            self._put(self._held, self._part)
        else:
            if self._held:
                self._send(self._held)
            self._offer(None)
            self._sender.join()
            if self._error is not None:
                raise self._error
        self._is_over = True

    def abandon(self) -> None:
        """Discards what was not committed. Waits for nothing: an event loop may call it, and the store may be away."""
        self._is_over = True
        with suppress(Full):  # then the sender does not wait for a part, and finds that it is over with the next one
            self._queue.put_nowait(None)

    def _send(self, part: Data) -> None:
        if self._sender is None:
            self._sender = threading.Thread(target=self._run, name="upload", daemon=True)
            self._sender.start()
        self._offer(part)

    def _offer(self, part: Data | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(part, timeout=0.5)
            except Full:
                continue
            return

    def _run(self) -> None:
        try:
            self._put(self._parts(), self._part)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that writes
            self._error = error
        while self._error is not None and not self._is_over:  # who waits for space in the queue finds the error
            try:
                self._queue.get(timeout=0.1)
            except Empty:
                return

    def _parts(self) -> Iterator[Data]:
        while (part := self._queue.get()) is not None:
            if self._is_over:
                raise _Abandoned
            yield part
        if self._is_over:
            raise _Abandoned
