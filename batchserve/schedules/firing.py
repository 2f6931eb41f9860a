"""Plans, claims and runs ticks for one process.

Each step is a transaction, and whatever is killed between two of them leaves a state from which any process goes on:
a due schedule is planned, a planned tick is claimed, and a claim that lapses is claimed again.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection

from batchserve.db.connect import Database
from batchserve.errors import BatchserveError, InvalidOptions, LeaseLost
from batchserve.logs import get_logger
from batchserve.recurring import Overlap, Schedule, Tick, TickState
from batchserve.schedules.claim import Actions, Claim, is_passing, reason
from batchserve.schedules.definition import request_of
from batchserve.schedules.planning import Plan, plan_of
from batchserve.settings import Settings
from batchserve.timetable import schedules, ticks
from batchserve.worker.clock import Clock

__all__ = ["Firing"]

log = get_logger()

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 300.0
"""Seconds between two tries of a tick."""
_MOST_PENDING = 1000
"""Ticks of a schedule that wait for each other; others are skipped."""
_EVENTS = {
    TickState.QUEUED: ("Tick has run", "tick_run"),
    TickState.SKIPPED: ("Tick is skipped", "tick_skip"),
    TickState.FAILED: ("Tick has failed", "tick_fail"),
}
"""What the log says of the ends of ticks."""


class Firing:
    """Safe from any thread."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        actions: Actions,
        clock: Clock,
        wake: Callable[[], None],
        ended: Callable[[str], None],
    ) -> None:
        """`wake`: called when jobs were queued. `ended`: with the state of each tick that ends here."""
        self._database, self._settings, self._clock = database, settings, clock
        self._actions, self._wake, self._ended = actions, wake, ended
        self._lock = threading.Lock()
        self._held: dict[int, Tick] = {}
        """The ticks that run in this process, by their IDs."""

    # --- planning ---

    def plan(self, schedule: Schedule) -> None:
        """Writes the due ticks of a schedule and its next time, in one transaction; nothing when another process has
        done so. Raises InvalidOptions when the schedule cannot be read."""
        with self._database.read() as connection:
            now = self._clock.moment(connection).wall
        plan = plan_of(schedule, now, self._settings.schedule_grace)
        with self._database.write() as connection:
            if schedules.advance_if_unchanged(connection, schedule, plan.next_at, now):
                self._write(connection, schedule, plan, now)

    def plan_due(self, connection: Connection, schedule: Schedule, now: float) -> None:
        """Writes the due ticks of a schedule that this transaction changes: it sets another next time, and nothing else
        would plan them."""
        if schedule.next_at is None or schedule.next_at > now:
            return
        try:
            plan = plan_of(schedule, now, self._settings.schedule_grace)
        except InvalidOptions:  # what cannot be read has no ticks, and may be changed
            return
        self._write(connection, schedule, plan, now)

    def _write(self, connection: Connection, schedule: Schedule, plan: Plan, now: float) -> None:
        known = ticks.known_times(connection, schedule, [planned.at for planned in plan.ticks])
        room = _MOST_PENDING - ticks.count_pending(connection, schedule)
        for planned in plan.ticks:
            if planned.at in known:
                continue
            skipped = planned.skipped
            if skipped is None and room <= 0:
                skipped = reason("overlap", f"{_MOST_PENDING:,} earlier ticks are pending")
            room -= skipped is None
            ticks.add(connection, schedule, planned.at, now, late=planned.late, skipped=skipped)
            if skipped is not None:
                self._ended(TickState.SKIPPED)
                log.warning("Tick is skipped", action="tick_skip", schedule=schedule.name, tenant=schedule.tenant,
                            at=planned.at, detail=skipped["message"])  # fmt: skip

    # --- claims ---

    def claim(self, tick: Tick) -> tuple[Schedule, Tick] | None:
        """Claims a due tick, to be run by `act`. None: it waits for an earlier one, is skipped, or another one has it.
        Raises ScheduleNotFound and UnreadableRow."""
        with self._database.read() as connection:
            schedule, blocker = schedules.get(connection, tick.schedule_id), ticks.blocker_of(connection, tick)
        if blocker is not None and _may_wait(schedule, tick):
            self._show(tick, reason("overlap", blocker))
            return None
        with self._database.write() as connection:
            claimed = self._claimed(connection, schedule, tick)
        return None if claimed is None else (schedule, claimed)

    def _claimed(self, connection: Connection, schedule: Schedule, tick: Tick) -> Tick | None:
        now = self._clock.moment(connection).wall
        blocker = ticks.blocker_of(connection, tick)  # again, as this transaction sees it
        if blocker is None:
            ticks.settle_before(connection, tick)
            return ticks.claim_if_pending(connection, tick, now, now + self._settings.lease)
        if not _may_wait(schedule, tick) and ticks.end_if_pending(connection, tick, now, reason("overlap", blocker)):
            self._ended(TickState.SKIPPED)
            self._log("Tick is skipped", "tick_skip", schedule, tick, detail=blocker)
        return None

    def explain(self, waiting: Sequence[Tick]) -> None:
        """Shows for what each of these ticks waits."""
        with self._database.read() as connection:
            blockers = [ticks.blocker_of(connection, tick) for tick in waiting]
        for tick, blocker in zip(waiting, blockers, strict=True):
            if blocker is not None:
                self._show(tick, reason("overlap", blocker))

    def _show(self, tick: Tick, why: Mapping[str, Any]) -> None:
        if tick.error != why:  # rarely: each commit invalidates caches
            with self._database.write() as connection:
                ticks.note_reason(connection, tick, why)

    def begin_run(self, connection: Connection, schedule: Schedule, at: float | None) -> Tick:
        """A run on request, for `act` once the transaction is committed. `at`: the time whose dates its request has;
        None: now. Raises ScheduleNotFound when it was deleted meanwhile."""
        now = self._clock.moment(connection).wall
        number = schedules.number_of_run(connection, schedule)
        return ticks.add_run(connection, schedule, number, now if at is None else at, now, now + self._settings.lease)

    @property
    def under_way(self) -> frozenset[int]:
        """IDs of the ticks that run in this process."""
        with self._lock:
            return frozenset(self._held)

    def renew(self) -> None:
        """Prolongs the claims of these ticks. To be called more often than claims lapse."""
        with self._lock:
            held = list(self._held.values())
        if held:
            with self._database.write() as connection:
                ticks.renew_if_mine(connection, held, self._clock.moment(connection).wall + self._settings.lease)

    # --- what a tick does ---

    def act(self, schedule: Schedule, tick: Tick) -> None:
        """Queues the jobs of a tick that this process has claimed. Raises Unavailable when the database does not
        respond: then the tick is tried again when its claim has lapsed."""
        with self._lock:
            self._held[tick.id] = tick
        try:
            self._act(schedule, Claim(self._database, self._clock, tick, self._settings.lease))
        except LeaseLost:
            self._log("Tick belongs to another process now", "tick_lost", schedule, tick)
        finally:
            with self._lock:
                self._held.pop(tick.id, None)

    def _act(self, schedule: Schedule, claim: Claim) -> None:
        tick = claim.tick
        try:
            request = request_of(schedule, tick.at)
            self._actions[schedule.action].run(schedule.tenant, request, claim)
        except LeaseLost:
            raise
        except ValidationError as error:
            self._end(schedule, claim, _named(error))
        except BatchserveError as error:
            self._end(schedule, claim, error)
        except Exception as error:
            log.exception("Tick meets an unexpected error", action="tick_error", schedule=schedule.name)
            told = f"an unexpected error ({type(error).__name__}); the log of the server has the details"
            self._end(schedule, claim, BatchserveError(told))
        else:
            self._wake()
            self._tell(schedule, claim)

    def _tell(self, schedule: Schedule, claim: Claim) -> None:
        """Counts and logs the end that the tick was given."""
        state = claim.state or TickState.QUEUED
        self._ended(state)
        event, action = _EVENTS[state]
        if claim.error is None:
            self._log(event, action, schedule, claim.tick)
        else:
            code, detail = claim.error.get("code"), claim.error.get("message")
            self._log(event, action, schedule, claim.tick, code=code, detail=detail)

    def _end(self, schedule: Schedule, claim: Claim, error: BatchserveError) -> None:
        """Has the tick tried again later, if the error may pass within the grace; else ends it. Of one that has queued
        some of its jobs, the error says what it has not."""
        tick, told = claim.tick, error.to_json()
        with self._database.read() as connection:
            passed = self._clock.moment(connection).wall - tick.created_at
            now = ticks.get(connection, tick.id)
        is_partial = now is not None and now.jobs > 0
        if is_partial:
            self._wake()
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(tick.attempt - 1, 10))
        if is_passing(error) and 0 <= passed + pause <= self._settings.schedule_grace:
            claim.postpone(pause, told)
            self._log("Tick is tried again", "tick_wait", schedule, tick, code=error.code, detail=error.detail)
        else:
            claim.end(TickState.QUEUED if is_partial else TickState.FAILED, told)
            self._tell(schedule, claim)

    def _log(self, event: str, action: str, schedule: Schedule, tick: Tick, **facts: Any) -> None:
        say = log.info if action in ("tick_run", "tick_lost") else log.warning
        say(event, action=action, schedule=schedule.name, tenant=schedule.tenant, tick=tick.id, at=tick.at, **facts)


def _may_wait(schedule: Schedule, tick: Tick) -> bool:
    """Whether a tick waits for earlier ones, and is not skipped: those that are caught up run one after another."""
    return tick.late or schedule.overlap is Overlap.QUEUE


def _named(error: ValidationError) -> InvalidOptions:
    """A request that this release does not take, in one sentence."""
    faults = [f"{'.'.join(map(str, ('request', *one['loc'])))}: {one['msg']}" for one in error.errors()]
    return InvalidOptions("; ".join(faults))
