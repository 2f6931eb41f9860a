"""The thread that keeps time, in each process with a worker or an API."""

import threading
import time
from collections.abc import Callable

from batchserve.errors import BatchserveError, ScheduleNotFound, Unavailable
from batchserve.logs import get_logger
from batchserve.recurring import Schedule, Tick
from batchserve.runtime import Runtime
from batchserve.schedules.claim import Actions
from batchserve.schedules.firing import Firing
from batchserve.timetable import schedules, ticks
from batchserve.worker.clock import Clock

__all__ = ["Scheduler"]

log = get_logger()

_LONGEST_PAUSE = 10.0
"""Seconds between two looks: a schedule that another process has created or changed is noticed after them."""
_RECHECK = 2.0
"""Seconds between two looks for the end of what a tick waits for."""
_PATIENCE = 5.0
"""Seconds of a look that ticks may take; they go on in their threads."""
_MOST = 100
"""Schedules, and ticks, of one look."""
_THREADS = 8
"""Ticks that run at the same time, so that a store that does not answer delays no other schedule."""


class Scheduler:
    """Plans due schedules and runs due ticks until it is stopped. Any number of schedulers may share a database."""

    def __init__(
        self, runtime: Runtime, actions: Actions, wake: Callable[[], None] = lambda: None, clock: Clock | None = None
    ) -> None:
        """`wake`: called when jobs were queued."""
        self.actions = actions
        self._database, self._settings = runtime.database, runtime.settings
        self._clock = clock or Clock(runtime.database)
        self.firing = Firing(runtime.database, runtime.settings, actions, self._clock, wake, runtime.metrics.count_tick)
        self._called, self._stopping = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._unreadable: set[str] = set()
        """IDs of schedules whose fault is in the log."""
        self._explained = 0
        """ID of the last tick whose wait was explained. The next look goes on behind it."""

    def look(self) -> None:
        """Signals a schedule that was created or changed. Safe from any thread, and cheap."""
        self._called.set()

    def stop(self) -> None:
        self._stopping.set()
        self._called.set()

    def run(self) -> None:
        """Runs until `stop`, then waits for its ticks within the grace time. Survives every error."""
        pause = 0.0
        while not self._stopping.is_set():
            self._called.clear()
            try:
                pause = self.turn()
            except Unavailable as error:
                pause = min(_LONGEST_PAUSE, max(1.0, 2 * pause))
                log.warning("Scheduler waits for the database", action="schedule_wait", detail=error.detail)
            except Exception:
                pause = _LONGEST_PAUSE
                log.exception("Scheduler continues after an error", action="schedule_error")
            if not self._stopping.is_set():
                self._clock.wait(self._called, pause)
        self._join(self._settings.grace)

    def turn(self) -> float:
        """Does what is due; returns the seconds until more may be."""
        self.firing.renew()
        with self._database.read() as connection:
            planned = schedules.due(connection, self._clock.moment(connection).wall, _MOST + len(self._unreadable))
        for schedule in planned:
            self._plan(schedule)
        with self._database.read() as connection:
            now = self._clock.moment(connection).wall
            # Those that cannot be read stay in the list, and must not fill it.
            due = ticks.due(connection, now, _MOST + len(self._unreadable))
            waiting = ticks.waiting(connection, now, _MOST, self._explained)
        self._start(due)
        self.firing.explain(waiting)
        waited = bool(waiting) or self._explained > 0
        self._explained = waiting[-1].id if len(waiting) == _MOST else 0
        self._join(min(_PATIENCE, self._settings.lease / 3))
        with self._database.read() as connection:
            now = self._clock.moment(connection).wall
            moments = schedules.next_moment(connection), ticks.next_moment(connection, now)
        pause = min([_LONGEST_PAUSE, *(moment - now for moment in moments if moment is not None)])
        if due or waited or pause <= 0:  # others may have become due, or what is due waits, or cannot be read
            pause = min(_RECHECK, pause) if pause > 0 else _RECHECK
        return min(pause, self._settings.lease / 3) if self._threads else pause

    def _plan(self, schedule: Schedule) -> None:
        """One that cannot be planned does not prevent others."""
        try:
            self.firing.plan(schedule)
        except Unavailable:
            raise
        except BatchserveError as error:
            if schedule.id not in self._unreadable:
                self._unreadable.add(schedule.id)
                log.error("Schedule cannot be planned", action="schedule_error", schedule=schedule.name,
                          tenant=schedule.tenant, detail=error.detail)  # fmt: skip

    def _start(self, due: list[Tick]) -> None:
        """Claims the due ticks, and runs each in a thread."""
        under_way = self.firing.under_way
        for tick in due:
            if tick.id in under_way or self._stopping.is_set() or len(self._threads) >= _THREADS:
                continue
            claimed = self._claim(tick)
            if claimed is not None:
                thread = threading.Thread(target=self._act, args=claimed, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _claim(self, tick: Tick) -> tuple[Schedule, Tick] | None:
        """See `Firing.claim`. A tick that cannot be read, or whose schedule cannot, does not prevent others."""
        try:
            return self.firing.claim(tick)
        except Unavailable:
            raise
        except ScheduleNotFound:  # deleted meanwhile, with its ticks
            return None
        except BatchserveError as error:
            if tick.schedule_id not in self._unreadable:
                self._unreadable.add(tick.schedule_id)
                log.error("Tick cannot be claimed", action="tick_error", tick=tick.id, detail=error.detail)
            return None

    def _act(self, schedule: Schedule, tick: Tick) -> None:
        try:
            self.firing.act(schedule, tick)
        except Unavailable as error:  # its claim lapses
            log.warning("Tick waits for the database", action="tick_wait", schedule=schedule.name, tick=tick.id,
                        detail=error.detail)  # fmt: skip
        except Exception:
            log.exception("Tick meets an unexpected error", action="tick_error", schedule=schedule.name, tick=tick.id)

    def _join(self, seconds: float) -> None:
        """Waits for the ticks that run, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
