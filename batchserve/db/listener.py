"""Receives the notifications of all processes from PostgreSQL."""

import select
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import psycopg

from batchserve.db.notifications import ALL, CHANNEL, Hear, Notification, parsed
from batchserve.logs import get_logger

__all__ = ["Listener"]

log = get_logger()

_TEST_EVERY = 10.0
"""Seconds without a notification after which the connection is tested."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two tries to connect."""


class Listener:
    """A connection and a thread. It connects again whenever the connection is lost, and then tells that anything may
    have happened meanwhile."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], hear: Hear) -> None:
        """`hear` is called from this thread."""
        self._connect, self._hear = connect, hear
        self._stop, self._stopped = socket.socketpair()
        self.is_live = False
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.send(b"x")
        self._thread.join()
        self._stop.close()
        self._stopped.close()

    def _run(self) -> None:
        pause = 0.0
        while not self._is_stopped_within(pause):
            try:
                with closing(self._connect()) as connection:
                    connection.execute(f"LISTEN {CHANNEL}".encode())
                    pause, self.is_live = 0.0, True
                    self._tell(ALL)
                    self._receive(connection)
            except psycopg.Error:
                if not pause:
                    log.warning("Notifications are not received: polling alone", action="listen_lost")
                pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, 2 * pause))
            finally:
                self.is_live = False

    def _receive(self, connection: psycopg.Connection[Any]) -> None:
        """Until this listener is closed. Raises psycopg.Error when the connection is lost."""
        while True:
            sources: list[Any] = [connection.pgconn.socket, self._stopped]
            ready, _, _ = select.select(sources, [], [], _TEST_EVERY)
            if self._stopped in ready:
                return
            if not ready:
                connection.execute(b"SELECT 1")
            for notification in connection.notifies(timeout=0):
                self._tell(parsed(notification.payload))

    def _tell(self, notification: Notification) -> None:
        try:
            self._hear(notification)
        except Exception:
            log.exception("A notification could not be handled", action="listen_error")

    def _is_stopped_within(self, seconds: float) -> bool:
        return bool(select.select([self._stopped], [], [], seconds)[0])
