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
"""Seconds of a look that ticks may take, and wait for a thread; they go on in their threads."""
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
        self._free = threading.Semaphore(_THREADS)
        """One for each thread that may be started."""
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
        """Does what is due; returns the seconds until more may be: 0, if there was more than a look takes."""
        deadline = time.monotonic() + min(_PATIENCE, self._settings.lease / 3)
        self.firing.renew()
        most = _MOST + len(self._unreadable)  # those that cannot be read stay in the lists, and must not fill them
        with self._database.read() as connection:
            planned = schedules.due(connection, self._clock.moment(connection).wall, most)
        read = [self._plan(schedule) for schedule in planned]
        with self._database.read() as connection:
            now = self._clock.moment(connection).wall
            due = ticks.due(connection, now, most)
            waiting = ticks.waiting(connection, now, _MOST, self._explained)
        is_more = self._start(due, most, deadline) or (len(planned) >= most and any(read))
        self.firing.explain(waiting)
        waited = bool(waiting) or self._explained > 0
        self._explained = waiting[-1].id if len(waiting) == _MOST else 0
        self._join(0.0 if is_more else deadline - time.monotonic())
        if is_more:
            return 0.0
        with self._database.read() as connection:
            now = self._clock.moment(connection).wall
            moments = schedules.next_moment(connection), ticks.next_moment(connection, now)
        pause = min([_LONGEST_PAUSE, *(moment - now for moment in moments if moment is not None)])
        if due or waited or pause <= 0:  # others may have become due, or what is due waits, or cannot be read
            pause = min(_RECHECK, pause) if pause > 0 else _RECHECK
        return min(pause, self._settings.lease / 3) if self._threads else pause

    def _plan(self, schedule: Schedule) -> bool:
        """False: it cannot be planned. That does not prevent others."""
        try:
            self.firing.plan(schedule)
        except Unavailable:
            raise
        except BatchserveError as error:
            if schedule.id not in self._unreadable:
                self._unreadable.add(schedule.id)
                log.error("Schedule cannot be planned", action="schedule_error", schedule=schedule.name,
                          tenant=schedule.tenant, detail=error.detail)  # fmt: skip
            return False
        return True

    def _start(self, due: list[Tick], most: int, deadline: float) -> bool:
        """Claims the due ticks, and runs each in a thread, as soon as one is free. Returns whether the next look is to
        come at once: no thread was free until the deadline, or there are more ticks than these."""
        under_way, read = self.firing.under_way, False
        for tick in due:
            if tick.id in under_way or self._stopping.is_set():
                continue
            if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return True
            started = False
            try:
                claimed, is_read = self._claim(tick)
                read = read or is_read
                if claimed is not None:
                    thread = threading.Thread(target=self._act, args=claimed, daemon=True)
                    thread.start()
                    started = True
                    self._threads.append(thread)
            finally:
                if not started:
                    self._free.release()
        return read and len(due) >= most

    def _claim(self, tick: Tick) -> tuple[tuple[Schedule, Tick] | None, bool]:
        """See `Firing.claim`; and whether the tick and its schedule can be read. One that cannot does not prevent
        others."""
        try:
            return self.firing.claim(tick), True
        except Unavailable:
            raise
        except ScheduleNotFound:  # deleted meanwhile, with its ticks
            return None, True
        except BatchserveError as error:
            if tick.schedule_id not in self._unreadable:
                self._unreadable.add(tick.schedule_id)
                log.error("Tick cannot be claimed", action="tick_error", tick=tick.id, detail=error.detail)
            return None, False

    def _act(self, schedule: Schedule, tick: Tick) -> None:
        try:
            self.firing.act(schedule, tick)
        except Unavailable as error:  # its claim lapses
            log.warning("Tick waits for the database", action="tick_wait", schedule=schedule.name, tick=tick.id,
                        detail=error.detail)  # fmt: skip
        except Exception:
            log.exception("Tick meets an unexpected error", action="tick_error", schedule=schedule.name, tick=tick.id)
        finally:
            self._free.release()

    def _join(self, seconds: float) -> None:
        """Waits for the ticks that run, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
