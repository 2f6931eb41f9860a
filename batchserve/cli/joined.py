"""The transport of responses: a head goes with its body."""

import asyncio

__all__ = ["Joined"]

_MOST = 64 * 1024
"""Bytes that are joined at most."""


class Joined:
    """A transport that joins what is written in one turn of the event loop: a head is sent with its body, in one call
    of the system and for one wake-up of the client."""

    __slots__ = ("_flushing", "_loop", "_pending", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pending = b""
        self._flushing: asyncio.Handle | None = None

    def write(self, data: bytes) -> None:
        if len(self._pending) + len(data) > _MOST:
            self.flush()
            self._transport.write(data)
        elif self._pending:
            self._pending += data
        elif data:
            self._pending = data
            self._flushing = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
            pending, self._pending = self._pending, b""
            if not self._transport.is_closing():  # its client may have left in this turn
                self._transport.write(pending)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()
