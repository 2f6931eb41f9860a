"""The worker in the table of workers that are alive, which only the metrics read: no job depends on it."""

from batchserve.errors import InsufficientStorage, Unavailable
from batchserve.jobs import workers
from batchserve.logs import get_logger
from batchserve.runtime import Runtime
from batchserve.worker.clock import Clock

__all__ = ["Presence"]

log = get_logger()


class Presence:
    """Announces a worker with each heartbeat. Survives every error."""

    def __init__(self, runtime: Runtime, clock: Clock, name: str) -> None:
        self._runtime, self._clock, self._name = runtime, clock, name
        self._is_known = False

    def announce(self) -> None:
        """The worker counts as alive for as long as a lease lasts."""
        processes, lease = self._runtime.engine.capacity, self._runtime.settings.lease
        try:
            with self._runtime.database.write() as connection:
                now = self._clock.moment(connection)
                if not self._is_known:
                    workers.forget_lost(connection, now)
                workers.announce(connection, self._name, processes, lease, now)
            self._is_known = True
        except (Unavailable, InsufficientStorage):  # the next heartbeat does it
            self._is_known = False
        except Exception:
            log.exception("Worker could not be announced", action="worker_error", worker=self._name)

    def leave(self) -> None:
        """The worker stops. Where the database did not respond, its row lapses."""
        if not self._is_known:
            return
        try:
            with self._runtime.database.write() as connection:
                workers.leave(connection, self._name)
        except (Unavailable, InsufficientStorage):
            return
        except Exception:
            log.exception("Worker could not be removed", action="worker_error", worker=self._name)
