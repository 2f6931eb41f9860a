"""Housekeeping: applies retention and sweeps, in a separate thread."""

import threading

from sqlalchemy import Connection

from batchserve import clock as clocks
from batchserve.jobs import totals
from batchserve.logs import get_logger
from batchserve.runtime import Runtime
from batchserve.upkeep.retention import expire, forget
from batchserve.upkeep.staging import sweep_staging
from batchserve.upkeep.sweep import sweep
from batchserve.worker.clock import Clock

__all__ = ["Housekeeper"]

log = get_logger()

_LONGEST_PAUSE = 3600.0


class Housekeeper:
    def __init__(self, runtime: Runtime, clock: Clock) -> None:
        self._database, self._storage, self._settings = runtime.database, runtime.storage, runtime.settings
        self._clock = clock

    def run(self, ended: threading.Event) -> None:
        """Runs at the start and then hourly."""
        pause = min(_LONGEST_PAUSE, max(self._settings.sweep_age, self._settings.poll))
        while True:
            try:
                self.tidy()
            except Exception:
                log.exception("Sweep has failed; it will run again", action="sweep_error")
            if self._clock.wait(ended, pause):
                return

    def tidy(self) -> None:
        """Applies retention, removes leftovers of crashes, and sums up what removed jobs have counted for."""
        database, storage, settings = self._database, self._storage, self._settings
        now, settled = database.write_freeing(self._settled)
        expired = expire(database, storage, settings, now, settled)
        if expired.total:
            log.info("Expired bytes are removed", action="expire", jobs=expired.jobs, inputs=expired.inputs)
        # Recently written bytes may be dated by a clock that was set since.
        swept = sweep(database, storage, settings.sweep_age, now) if settled >= settings.sweep_age else None
        if swept is not None and swept.total:
            log.info("Orphaned bytes are removed", action="sweep", objects=swept.total)
        if dropped := sweep_staging(database, settings, now):
            log.info("Staging tables are removed", action="sweep_staging", tables=dropped)
        if forgotten := forget(database, settings, now, settled):
            log.info("Expired jobs are forgotten", action="forget", jobs=forgotten)
        while database.write_freeing(totals.fold):
            pass

    def _settled(self, connection: Connection) -> tuple[float, float]:
        """The wall clock, and the seconds for which it is trusted."""
        now = self._clock.moment(connection)
        return now.wall, clocks.settled_for(connection, now)
