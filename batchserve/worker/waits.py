"""The waits of a job for a storage that is full or does not respond."""

from contextlib import suppress

from structlog.typing import FilteringBoundLogger

from batchserve.db.connect import Database
from batchserve.errors import BatchserveError, InsufficientStorage, Unavailable
from batchserve.jobs import execution
from batchserve.storage.disk import outage_of
from batchserve.worker.active_job import ActiveJob
from batchserve.worker.clock import Clock

__all__ = ["Waits", "delay_of"]

_LONGEST = 6
"""Of the first pause: the longest one."""


def delay_of(error: BaseException) -> BatchserveError | None:
    """What a call has failed with if its job is to wait for the storage, and not to fail."""
    return error if isinstance(error, InsufficientStorage) else outage_of(error)


class Waits:
    """Pauses a job for some seconds, and each further time for longer, as often as it takes: an outage of the storage
    ends no job."""

    def __init__(
        self, database: Database, clock: Clock, job: ActiveJob, seconds: float, log: FilteringBoundLogger
    ) -> None:
        """`seconds`: of the first pause. `log`: for lines about the job."""
        self._database, self._clock, self._seconds = database, clock, seconds
        self._job_id, self._attempt, self._log = job.id, job.attempt, log
        self._until = 0.0
        self._number = 0
        """Of pauses since a call succeeded."""

    @property
    def is_paused(self) -> bool:
        return self._clock.monotonic() < self._until

    def pause(self, delay: BatchserveError) -> None:
        """Calls that fail during a pause do not prolong it. Raises LeaseLost."""
        if self.is_paused:
            return
        seconds = self._seconds * min(2**self._number, _LONGEST)
        self._number, self._until = self._number + 1, self._clock.monotonic() + seconds
        event = f"Job waits: the storage {'is full' if isinstance(delay, InsufficientStorage) else 'does not respond'}"
        self._log.warning(event, action="job_wait", seconds=seconds, detail=delay.detail)
        self._show(delay.code)

    def end(self) -> None:
        """A call has succeeded. Raises LeaseLost."""
        if self._number:
            self._log.info("Job continues: the storage responds", action="job_continue")
            self._number, self._until = 0, 0.0
            self._show(None)

    def _show(self, reason: str | None) -> None:
        """In the job's row, if the database can be written."""
        with suppress(InsufficientStorage, Unavailable), self._database.write() as connection:
            execution.wait_if_mine(connection, self._job_id, self._attempt, reason)
