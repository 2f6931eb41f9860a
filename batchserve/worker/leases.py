"""Leases: renewed by a dedicated thread, so that a slow commit never loses a job."""

import threading
from collections.abc import Callable, Iterable

from batchserve.db.connect import Database
from batchserve.errors import LeaseLost, Unavailable
from batchserve.jobs import execution
from batchserve.settings import Settings
from batchserve.worker.clock import Clock
from batchserve.worker.job_run import JobRun
from batchserve.worker.presence import Presence

__all__ = ["LeaseKeeper"]


class LeaseKeeper:
    def __init__(
        self,
        database: Database,
        settings: Settings,
        clock: Clock,
        presence: Presence,
        held: Callable[[], Iterable[JobRun]],
        lost: Callable[[JobRun], None],
        failed: Callable[[], None],
    ) -> None:
        """`held`: the runs whose leases are renewed. `lost` is called, from this thread, for one whose lease another
        attempt has; `failed` when the database does not respond."""
        self._database, self._settings, self._clock, self._presence = database, settings, clock, presence
        self._held, self._lost, self._failed = held, lost, failed

    def run(self, ended: threading.Event) -> None:
        """Renews the leases, and announces the worker, with each heartbeat."""
        self._presence.announce()
        while not self._clock.wait(ended, self._settings.heartbeat):
            self.renew()
            self._presence.announce()
        self._presence.leave()

    def renew(self) -> None:
        """Renews each lease, in a separate transaction. Survives every error."""
        for run in self._held():
            try:
                with self._database.write() as connection:
                    now = self._clock.moment(connection)
                    execution.renew_lease_if_mine(connection, run.id, run.attempt, self._settings.lease, now)
            except LeaseLost:
                self._lost(run)
            except Unavailable:
                self._failed()
                run.log.warning("Lease could not be renewed", action="lease_unavailable")
            except Exception:  # such as a full disk: this thread must outlive the worker
                run.log.exception("Lease could not be renewed", action="lease_error")
