"""Schedulers over a real database, with a clock that the test moves: when ticks are due, that each fires once, and what
becomes of those that were missed, overlap, fail or are killed."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from exposed import values_of
from sqlalchemy import Connection, delete, func, select, text, update
from structlog.testing import capture_logs
from uuid_utils import uuid7
from waiting import until

from batchserve import rows
from batchserve.db import closed, tables
from batchserve.db.connect import Database, Moment
from batchserve.domain import JobState, StoredInput
from batchserve.errors import (
    Conflict,
    InvalidInput,
    LeaseLost,
    QuotaExceeded,
    ScheduleNotFound,
    TooManyRequests,
    Unavailable,
)
from batchserve.jobs import requests
from batchserve.metrics import Metrics
from batchserve.recurring import ActionKind, CatchUp, Overlap, Schedule, Tick, TickState
from batchserve.schedules import firing as firing_module
from batchserve.schedules import planning
from batchserve.schedules.claim import Claim
from batchserve.schedules.definition import Definition
from batchserve.schedules.scheduler import Scheduler
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.timetable import schedules, ticks
from batchserve.upkeep.inspection import find_unreadable, inspect_jobs, mend_unreadable
from batchserve.upkeep.retention import forget
from batchserve.worker.clock import Clock

ZURICH = ZoneInfo("Europe/Zurich")
HOUR, DAY = 3600.0, 86400.0
SETTINGS = Settings(lease=30.0, schedule_grace=900.0)


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def shown(moment: float) -> str:
    return datetime.fromtimestamp(moment, ZURICH).isoformat()


class MovedClock(Clock):
    """A clock that stands still until the test sets it."""

    def __init__(self, database: Database, now: float) -> None:
        super().__init__(database)
        self.now = now

    def moment(self, connection: Connection) -> Moment:  # noqa: ARG002 - that of the database is not asked
        return Moment(self.now, self.now, "moved")

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self.now += seconds
        return event.is_set()


class Killed(BaseException):
    """The process ends here: nothing that follows runs."""


@dataclass
class Recorded:
    """An action that creates a job without inputs, in the transaction that ends the tick, as that of jobs does."""

    database: Database
    requests: list[dict[str, Any]] = field(default_factory=list)
    problem: Exception | None = None
    killed_before: bool = False
    killed_within: bool = False
    killed_after: bool = False

    def check(self, tenant: str, request: Mapping[str, Any]) -> None:
        pass

    def run(self, tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        if self.problem is not None:
            raise self.problem
        if self.killed_before:
            raise Killed
        with self.database.write() as connection:
            job_id = str(uuid7())
            requests.create(connection, job_id, [StoredInput("inputs/none", "csv")], None, 1.0, tenant)
            connection.execute(update(tables.jobs).where(tables.jobs.c.id == job_id).values(state=JobState.QUEUED))
            claim.queued(connection, [job_id])
            if self.killed_within:
                raise Killed
        self.requests.append(dict(request))
        if self.killed_after:
            raise Killed


@dataclass
class Runtime:
    """What a scheduler needs of one."""

    database: Database
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)


class Site:
    """A database with a scheduler whose clock and actions the test controls."""

    def __init__(self, database: Database, now: str = "2026-11-30T12:00:00+01:00", **settings: Any) -> None:
        self.database = database
        self.settings = SETTINGS.model_copy(update=settings)
        self.clock = MovedClock(database, at(now))
        self.action, self.metrics = Recorded(database), Metrics()
        self.scheduler = self.another(self.action)

    def another(self, action: Recorded | None = None, database: Database | None = None) -> Scheduler:
        """A scheduler of another process, with the same clock."""
        used = database or self.database
        actions = dict.fromkeys(ActionKind, action or Recorded(used))
        runtime: Any = Runtime(used, self.settings, self.metrics)
        return Scheduler(runtime, actions, clock=self.clock)

    def create(self, cron: str = "0 2 * * *", tenant: str = "default", **fields: Any) -> Schedule:
        values: dict[str, Any] = {
            "name": "nightly",
            "cron": cron,
            "time_zone": "Europe/Zurich",
            "action": ActionKind.JOB,
            "request": {"url": "in/{date}"},
            "catch_up": CatchUp.LAST,
            "catch_up_limit": 100,
            "overlap": Overlap.SKIP,
            **fields,
        }
        made = Definition(**values).schedule(tenant, self.clock.now)
        with self.database.write() as connection:
            schedules.create(connection, made)
        return made

    def until(self, moment: str, turns: int = 1) -> list[Tick]:
        """The history, oldest first, after turns at that time."""
        self.clock.now = at(moment)
        for _ in range(turns):
            self.scheduler.turn()
        return self.history()

    def history(self) -> list[Tick]:
        with self.database.read() as connection:
            query = select(*(tables.ticks.c[name] for name in Tick.__dataclass_fields__)).order_by(tables.ticks.c.id)

            return [rows.tick(row) for row in connection.execute(query).mappings()]

    def jobs(self) -> int:
        with self.database.read() as connection:
            return connection.scalar(select(func.count()).select_from(tables.jobs)) or 0

    def end_jobs(self) -> None:
        with self.database.write() as connection:
            connection.execute(update(tables.jobs).values(state=JobState.FAILED))

    def current(self, schedule: Schedule) -> Schedule:
        with self.database.read() as connection:
            return schedules.get(connection, schedule.id)


@pytest.fixture
def site(database: Database) -> Site:
    return Site(database)


def told(history: Sequence[Tick]) -> list[tuple[str, str]]:
    return [(shown(tick.at), tick.state.value) for tick in history]


def codes(history: Sequence[Tick]) -> list[str | None]:
    return [None if tick.error is None else tick.error["code"] for tick in history]


# --- due ticks -------------------------------------------------------------------------------------------------------


def test_a_tick_queues_a_job_at_its_time_with_its_date(site: Site) -> None:
    site.create(request={"url": "in/{date-1d}/*.csv", "night": "{schedule}"})
    assert site.until("2026-12-01T01:59:59+01:00") == []
    history = site.until("2026-12-01T02:00:00+01:00")
    assert told(history) == [("2026-12-01T02:00:00+01:00", "queued")]
    assert site.action.requests == [{"url": "in/2026-11-30/*.csv", "night": "nightly"}]
    assert (history[0].jobs, history[0].attempt, history[0].late, history[0].on_request) == (1, 1, False, False)
    with site.database.read() as connection:
        [(job_id, state)] = ticks.jobs_of(connection, [history[0].id])[history[0].id].first
        assert state == "queued"
        assert connection.scalar(select(tables.jobs.c.tenant).where(tables.jobs.c.id == job_id)) == "default"


def test_a_tick_fires_once_however_often_is_looked(site: Site) -> None:
    site.create()
    site.until("2026-12-01T02:00:00+01:00", turns=5)
    site.until("2026-12-01T02:10:00+01:00", turns=5)
    assert (len(site.history()), site.jobs()) == (1, 1)


def test_a_late_look_within_the_grace_is_on_time_and_has_the_date_of_the_tick(site: Site) -> None:
    site.create("59 23 * * *", catch_up=CatchUp.NONE)
    history = site.until("2026-12-01T00:13:00+01:00")
    assert told(history) == [("2026-11-30T23:59:00+01:00", "queued")]
    assert site.action.requests == [{"url": "in/2026-11-30"}]
    assert not history[0].late


def test_the_thread_sleeps_until_the_next_tick_or_for_ten_seconds(site: Site) -> None:
    assert site.scheduler.turn() == 10.0
    site.create()
    assert site.scheduler.turn() == 10.0
    site.clock.now = at("2026-12-01T01:59:57+01:00")
    assert site.scheduler.turn() == pytest.approx(3.0)
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    assert site.scheduler.turn() <= 2.0


def test_the_thread_runs_until_it_is_stopped_and_survives_errors(database: Database) -> None:
    site = Site(database, "2026-12-01T01:59:00+01:00")
    site.create()
    failures = iter([Unavailable("away"), RuntimeError("odd")])
    turn = site.scheduler.turn

    def failing() -> float:
        if (failure := next(failures, None)) is not None:
            raise failure
        pause = turn()
        if site.history():
            site.scheduler.stop()
        return pause

    site.scheduler.turn = failing  # type: ignore[method-assign]
    thread = threading.Thread(target=site.scheduler.run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert told(site.history()) == [("2026-12-01T02:00:00+01:00", "queued")]


class StoppedClock(MovedClock):
    """A clock that no wait moves."""

    def wait(self, event: threading.Event, seconds: float) -> bool:  # noqa: ARG002 - no time passes
        return event.wait(60)


def test_a_look_is_made_at_once_when_it_is_called_for(site: Site) -> None:
    site.clock = StoppedClock(site.database, site.clock.now)
    site.scheduler = site.another(site.action)
    thread = threading.Thread(target=site.scheduler.run)
    thread.start()
    site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.look()
    until(lambda: site.jobs() == 1)
    site.scheduler.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert told(site.history()) == [("2026-12-01T02:00:00+01:00", "queued")]


# --- the days on which clocks are set --------------------------------------------------------------------------------


def run_through(site: Site, begin: str, end: str, step: float = 900.0) -> list[str]:
    """The times of the ticks of a while, at a scheduler that looks every quarter of an hour."""
    site.clock.now = at(begin)
    site.scheduler.turn()
    while site.clock.now < at(end):
        site.clock.now += step
        site.scheduler.turn()
        site.end_jobs()
    return [shown(tick.at) for tick in site.history() if tick.state is TickState.QUEUED]


def test_a_skipped_time_runs_once_at_the_end_of_the_gap(database: Database) -> None:
    site = Site(database, "2026-03-29T00:00:00+01:00")
    site.create("30 2 * * *", request={"url": "{date}"})
    assert run_through(site, "2026-03-29T00:00:00+01:00", "2026-03-30T03:00:00+02:00") == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
    ]
    assert site.action.requests == [{"url": "2026-03-29"}, {"url": "2026-03-30"}]


def test_a_repeated_time_runs_once_the_first_time(database: Database) -> None:
    site = Site(database, "2026-10-24T12:00:00+02:00")
    site.create("30 2 * * *")
    assert run_through(site, "2026-10-25T00:00:00+02:00", "2026-10-26T03:00:00+01:00") == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
    ]


def test_an_hourly_schedule_runs_in_both_hours(database: Database) -> None:
    site = Site(database, "2026-10-25T01:00:00+02:00")
    site.create("30 * * * *")
    assert run_through(site, "2026-10-25T01:00:00+02:00", "2026-10-25T03:45:00+01:00") == [
        "2026-10-25T01:30:00+02:00",
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-25T03:30:00+01:00",
    ]


def test_a_server_that_starts_in_the_repeated_hour_does_not_run_the_time_again(database: Database) -> None:
    site = Site(database, "2026-10-24T12:00:00+02:00")
    site.create("30 2 * * *")
    site.until("2026-10-25T02:30:00+02:00")
    site.scheduler = site.another(site.action)
    history = site.until("2026-10-25T02:30:00+01:00", turns=3)
    assert told(history) == [("2026-10-25T02:30:00+02:00", "queued")]


# --- several schedulers ----------------------------------------------------------------------------------------------


def test_of_schedulers_that_look_at_the_same_time_one_fires(database: Database, database_url: str) -> None:
    site = Site(database)
    for number in range(3):
        site.create("*/5 * * * *", name=f"s{number}", overlap=Overlap.QUEUE)
    own = [Database(database_url) for _ in range(4)]
    others = [site.another(Recorded(one), one) for one in own]
    try:
        for number in range(1, 9):
            site.clock.now = at("2026-11-30T12:00:00+01:00") + 300 * number
            barrier = threading.Barrier(len(others))
            failures: list[BaseException] = []

            def look(scheduler: Scheduler, together: threading.Barrier, failed: list[BaseException]) -> None:
                try:
                    together.wait(30)
                    for _ in range(3):
                        scheduler.turn()
                except BaseException as error:  # noqa: BLE001 - shown by the assertion
                    failed.append(error)

            threads = [threading.Thread(target=look, args=(one, barrier, failures)) for one in others]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert failures == []
            site.end_jobs()
    finally:
        for one in own:
            one.close()
    history = site.history()
    assert len(history) == 24
    assert {tick.state for tick in history} == {TickState.QUEUED}
    assert len({(tick.schedule_id, tick.at) for tick in history}) == 24
    assert site.jobs() == 24


def test_a_tick_that_another_process_has_planned_is_not_planned_again(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    site.another().firing.plan(schedule)  # as it was read before
    assert len(site.history()) == 1


def test_a_tick_that_another_process_has_claimed_is_not_claimed_again(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    [tick] = site.history()
    assert site.scheduler.firing.claim(tick) is not None
    assert site.another().firing.claim(tick) is None


# --- kills at every step ---------------------------------------------------------------------------------------------


def killed(act: Callable[[], object]) -> None:
    """Runs a step of a process that ends within it."""
    with pytest.raises(Killed):
        act()


def once_more(site: Site) -> list[Tick]:
    """The history after another process has gone on, once the claim of the killed one has lapsed."""
    site.scheduler = site.another(site.action)
    site.scheduler.turn()
    site.clock.now += site.settings.lease + 1
    site.scheduler.turn()
    site.scheduler.turn()
    return site.history()


def test_a_kill_before_the_commit_of_a_plan_loses_and_doubles_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")

    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ticks, "add", dies)
        killed(lambda: site.scheduler.firing.plan(schedule))
    assert site.history() == []
    assert told(once_more(site)) == [("2026-12-01T02:00:00+01:00", "queued")]
    assert site.jobs() == 1


def test_a_kill_after_the_plan_loses_and_doubles_nothing(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    assert told(once_more(site)) == [("2026-12-01T02:00:00+01:00", "queued")]
    assert site.jobs() == 1


@pytest.mark.parametrize("step", ["killed_before", "killed_within", "killed_after"])
def test_a_kill_of_a_claimed_tick_loses_and_doubles_nothing(site: Site, step: str) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    [tick] = site.history()
    setattr(site.action, step, True)
    claimed = site.scheduler.firing.claim(tick)
    assert claimed is not None
    killed(lambda: site.scheduler.firing.act(*claimed))
    assert site.jobs() == (1 if step == "killed_after" else 0)
    setattr(site.action, step, False)
    history = once_more(site)
    assert told(history) == [("2026-12-01T02:00:00+01:00", "queued")]
    assert history[0].attempt == (1 if step == "killed_after" else 2)
    assert site.jobs() == 1


def test_a_process_that_was_paused_beyond_its_claim_queues_nothing(site: Site) -> None:
    """Both work on the tick: the second has claimed it after the first was silent for the length of a lease."""
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    [tick] = site.history()
    first = site.scheduler.firing.claim(tick)
    assert first is not None
    site.clock.now += site.settings.lease + 1
    other = site.another()
    other.turn()
    assert site.jobs() == 1
    site.scheduler.firing.act(*first)
    assert site.jobs() == 1
    assert [(one.state, one.attempt) for one in site.history()] == [(TickState.QUEUED, 2)]


def test_a_claim_is_prolonged_while_its_tick_runs(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    going_on, begun = threading.Event(), threading.Event()
    run = site.action.run

    def slow(tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        begun.set()
        assert going_on.wait(60)
        run(tenant, request, claim)

    site.action.run = slow  # type: ignore[method-assign]
    site.scheduler.firing.plan(schedule)
    [tick] = site.history()
    claimed = site.scheduler.firing.claim(tick)
    assert claimed is not None
    thread = threading.Thread(target=site.scheduler.firing.act, args=claimed)
    thread.start()
    assert begun.wait(60)
    other = site.another()
    try:
        for _ in range(10):
            site.clock.now += 0.6 * site.settings.lease
            site.scheduler.firing.renew()
            other.turn()
        assert site.jobs() == 0
    finally:
        going_on.set()
        thread.join(60)
    assert [(one.state, one.attempt) for one in site.history()] == [(TickState.QUEUED, 1)]
    assert site.jobs() == 1


def test_a_tick_that_hangs_delays_no_other_schedule(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchserve.schedules.scheduler._PATIENCE", 0.05)
    site.create(name="hangs")
    site.create(name="goes-on")
    going_on = threading.Event()
    run = site.action.run

    def hanging(tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        if claim.tick.id == 1:
            assert going_on.wait(60)
        run(tenant, request, claim)

    site.action.run = hanging  # type: ignore[method-assign]
    site.until("2026-12-01T02:00:00+01:00")
    try:
        until(lambda: sorted(tick.state for tick in site.history()) == [TickState.PENDING, TickState.QUEUED])
    finally:
        going_on.set()
    site.scheduler._join(60)  # noqa: SLF001 - the thread of the tick
    assert {tick.state for tick in site.history()} == {TickState.QUEUED}


def test_more_ticks_than_threads_follow_each_other_without_a_pause(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchserve.schedules.scheduler._PATIENCE", 0.2)
    monkeypatch.setattr("batchserve.schedules.scheduler._MOST", 12)
    going_on, run = threading.Event(), site.action.run

    def hanging(tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        if claim.tick.id == 1:
            assert going_on.wait(60)
        run(tenant, request, claim)

    site.action.run = hanging  # type: ignore[method-assign]
    for number in range(30):
        site.create(name=f"s{number}")
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    try:
        while site.scheduler.turn() == 0:
            pass
        until(lambda: [tick.state for tick in site.history()].count(TickState.QUEUED) == 29)
    finally:
        going_on.set()
    site.scheduler._join(60)  # noqa: SLF001 - the thread of the tick
    assert {tick.state for tick in site.history()} == {TickState.QUEUED}


# --- missed ticks ----------------------------------------------------------------------------------------------------


def test_the_newest_missed_tick_is_caught_up_with_its_own_date(site: Site) -> None:
    site.create()
    history = site.until("2026-12-04T09:00:00+01:00", turns=2)
    assert told(history) == [
        ("2026-12-03T02:00:00+01:00", "skipped"),
        ("2026-12-04T02:00:00+01:00", "queued"),
    ]
    assert site.action.requests == [{"url": "in/2026-12-04"}]
    assert history[1].late
    assert history[0].error == {
        "code": "missed",
        "message": "3 ticks up to 2026-12-03T02:00:00+01:00 were missed: no server or worker ran then, and catch-up is "
        "last",
        "ticks": 3,
    }


def test_a_missed_tick_is_left_where_one_is_due_on_time(site: Site) -> None:
    site.create("0 * * * *")
    assert told(site.until("2026-11-30T15:01:00+01:00")) == [
        ("2026-11-30T14:00:00+01:00", "skipped"),
        ("2026-11-30T15:00:00+01:00", "queued"),
    ]


def test_without_catch_up_missed_ticks_are_noted_and_left(site: Site) -> None:
    site.create(catch_up=CatchUp.NONE)
    history = site.until("2026-12-04T09:00:00+01:00", turns=2)
    assert told(history) == [("2026-12-04T02:00:00+01:00", "skipped")]
    assert history[0].error is not None
    assert history[0].error["ticks"] == 4
    assert told(site.until("2026-12-05T02:00:00+01:00"))[1:] == [("2026-12-05T02:00:00+01:00", "queued")]


def test_all_missed_ticks_run_one_after_another_with_their_own_dates(site: Site) -> None:
    site.create(catch_up=CatchUp.ALL)
    site.until("2026-12-04T09:00:00+01:00")
    for number in range(1, 5):
        assert site.jobs() == number
        site.scheduler.turn()
        assert site.jobs() == number  # that of the tick before is unfinished
        site.end_jobs()
        site.scheduler.turn()
    assert [request["url"] for request in site.action.requests] == [f"in/2026-12-0{day}" for day in range(1, 5)]
    assert {(tick.state, tick.late) for tick in site.history()} == {(TickState.QUEUED, True)}


def test_catch_up_is_bounded(site: Site) -> None:
    site.create("*/10 * * * *", catch_up=CatchUp.ALL, catch_up_limit=3)
    site.clock.now = at("2026-12-04T09:05:00+01:00")
    for _ in range(10):
        site.scheduler.turn()
        site.end_jobs()
    history = site.history()
    assert told(history) == [
        ("2026-12-04T08:10:00+01:00", "skipped"),
        ("2026-12-04T08:20:00+01:00", "queued"),
        ("2026-12-04T08:30:00+01:00", "queued"),
        ("2026-12-04T08:40:00+01:00", "queued"),
        ("2026-12-04T08:50:00+01:00", "queued"),
        ("2026-12-04T09:00:00+01:00", "queued"),
    ]
    assert [tick.late for tick in history] == [False, True, True, True, False, False]
    assert history[0].error is not None
    assert history[0].error["ticks"] == (4 * 24 - 3) * 6 - 5  # from 12:10 of the first day
    assert "with the limit 3" in history[0].error["message"]


def test_of_years_of_missed_ticks_the_newest_are_planned_in_bounded_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_MOST_READ", 1000)
    schedule = site.create("* * * * *", catch_up=CatchUp.ALL, catch_up_limit=2)
    plan = planning.plan_of(schedule, at("2026-12-30T12:00:30+01:00"), 60.0)
    assert [(shown(planned.at), planned.late) for planned in plan.ticks[1:]] == [
        ("2026-12-30T11:58:00+01:00", True),
        ("2026-12-30T11:59:00+01:00", True),
        ("2026-12-30T12:00:00+01:00", False),
    ]
    assert plan.next_at == at("2026-12-30T12:01:00+01:00")
    told = plan.ticks[0].skipped
    assert told is not None
    assert 2000 < told["ticks"] < 30 * 24 * 60
    assert told["message"].startswith(f"at least {told['ticks']:,} ticks up to 2026-12-30T11:57:00+01:00 were missed")


@pytest.mark.parametrize("minutes", [990, 1000, 1003, 1010, 1990, 2000, 2100, 5000])
def test_of_many_missed_ticks_the_newest_and_those_on_time_are_all_planned(
    site: Site, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    monkeypatch.setattr(planning, "_MOST_READ", 1000)
    schedule = site.create("* * * * *", catch_up=CatchUp.ALL, catch_up_limit=500)
    assert schedule.next_at is not None
    now = schedule.next_at + minutes * 60.0
    plan = planning.plan_of(schedule, now, 900.0)
    late = [planned.at for planned in plan.ticks if planned.late]
    on_time = [planned.at for planned in plan.ticks if not planned.late and planned.skipped is None]
    assert on_time == [now - 60.0 * number for number in range(15, -1, -1)]
    assert late == [now - 60.0 * number for number in range(515, 15, -1)]


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_a_tick_is_skipped_while_a_job_of_an_earlier_one_is_unfinished(site: Site) -> None:
    site.create("0 * * * *")
    site.until("2026-11-30T13:00:00+01:00")
    history = site.until("2026-11-30T14:00:00+01:00")
    assert told(history)[1] == ("2026-11-30T14:00:00+01:00", "skipped")
    assert history[1].error is not None
    assert history[1].error["code"] == "overlap"
    assert "of an earlier tick is queued" in history[1].error["message"]
    site.end_jobs()
    assert told(site.until("2026-11-30T15:00:00+01:00"))[2] == ("2026-11-30T15:00:00+01:00", "queued")


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_a_tick_waits_for_the_job_of_an_earlier_one(site: Site, state: JobState) -> None:
    site.create("0 * * * *", overlap=Overlap.QUEUE)
    site.until("2026-11-30T13:00:00+01:00")
    with site.database.write() as connection:
        connection.execute(update(tables.jobs).values(state=state))
    history = site.until("2026-11-30T14:00:00+01:00", turns=3)
    assert told(history)[1] == ("2026-11-30T14:00:00+01:00", "pending")
    assert codes(history)[1] == "overlap"
    history = site.until("2026-11-30T15:30:00+01:00", turns=3)
    assert [tick.state for tick in history] == [TickState.QUEUED, TickState.PENDING, TickState.PENDING]
    site.end_jobs()
    history = site.until("2026-11-30T15:31:00+01:00", turns=3)
    assert [tick.state for tick in history] == [TickState.QUEUED, TickState.QUEUED, TickState.PENDING]
    assert codes(history)[1] is None
    site.end_jobs()
    assert {tick.state for tick in site.until("2026-11-30T15:32:00+01:00")} == {TickState.QUEUED}
    assert [request["url"] for request in site.action.requests] == ["in/2026-11-30"] * 3


def test_a_waiting_tick_writes_nothing_while_it_waits(sqlite: Database) -> None:
    site = Site(sqlite)
    site.create("0 * * * *", overlap=Overlap.QUEUE)
    site.until("2026-11-30T13:00:00+01:00")
    site.until("2026-11-30T14:00:00+01:00")
    before = sqlite.version_from_thread()
    for _ in range(5):
        assert site.scheduler.turn() == 2.0
    assert sqlite.version_from_thread() == before


def test_no_more_ticks_wait_than_may(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing_module, "_MOST_PENDING", 2)
    site.create("0 * * * *", overlap=Overlap.QUEUE)
    for hour in range(13, 18):
        site.until(f"2026-11-30T{hour}:00:00+01:00")
    states = [tick.state.value for tick in site.history()]
    assert states == ["queued", "pending", "pending", "skipped", "skipped"]
    assert codes(site.history())[3:] == ["overlap", "overlap"]


def test_a_deleted_job_blocks_no_tick(site: Site) -> None:
    site.create("0 * * * *")
    site.until("2026-11-30T13:00:00+01:00")
    with site.database.write() as connection:
        connection.execute(delete(tables.jobs))
    history = site.until("2026-11-30T14:00:00+01:00")
    assert [tick.state for tick in history] == [TickState.QUEUED] * 2
    with site.database.read() as connection:
        first = ticks.jobs_of(connection, [history[0].id])[history[0].id]
    assert [state for _, state in first.first] == [None]
    assert first.by_state == {"deleted": 1}


def test_schedules_do_not_wait_for_each_other(site: Site) -> None:
    site.create(name="first")
    site.create(name="second")
    assert [tick.state for tick in site.until("2026-12-01T02:00:00+01:00")] == [TickState.QUEUED] * 2


@pytest.mark.parametrize("late", [False, True])
def test_ticks_that_wait_keep_no_other_schedule_from_its_tick(
    site: Site, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr("batchserve.schedules.scheduler._MOST", 2)
    for number in range(5):
        policy = {"catch_up": CatchUp.ALL} if late else {"overlap": Overlap.QUEUE}
        site.create("0 * * * *", name=f"waits-{number}", **policy)
    victim = site.create("5 15 * * *", tenant="blue", name="victim")
    if not late:
        site.until("2026-11-30T13:00:00+01:00", turns=3)
    site.until("2026-11-30T14:30:00+01:00", turns=6)
    waiting = [tick for tick in site.history() if tick.state is TickState.PENDING]
    assert len(waiting) == 5
    history = site.until("2026-11-30T15:05:00+01:00", turns=6)
    assert [tick.state for tick in history if tick.schedule_id == victim.id] == [TickState.QUEUED]
    explained = [tick for tick in history if tick.id in {one.id for one in waiting}]
    assert codes(explained) == ["overlap"] * 5


def test_tenants_take_turns_however_many_ticks_of_one_are_due(site: Site) -> None:
    for number in range(5):
        site.create(name=f"many-{number}", tenant="many")
    few = site.create(name="few", tenant="few")
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    with site.database.read() as connection:
        for schedule in schedules.due(connection, site.clock.now, 10):
            site.scheduler.firing.plan(schedule)
    with site.database.read() as connection:
        found = ticks.due(connection, site.clock.now, 2)
    assert few.id in {tick.schedule_id for tick in found}
    assert len(found) == 2


# --- ticks that queue nothing ----------------------------------------------------------------------------------------


def test_a_tick_that_finds_no_input_fails_with_the_reason(site: Site) -> None:
    site.create()
    site.action.problem = InvalidInput("no file matches in/2026-12-01/*.csv")
    [tick] = site.until("2026-12-01T02:00:00+01:00", turns=2)
    assert (tick.state, tick.jobs, tick.attempt) == (TickState.FAILED, 0, 1)
    assert tick.error == {"code": "invalid-input", "message": "no file matches in/2026-12-01/*.csv"}
    site.action.problem = None
    assert told(site.until("2026-12-02T02:00:00+01:00"))[1] == ("2026-12-02T02:00:00+01:00", "queued")


def test_ticks_are_counted_by_outcome(site: Site) -> None:
    site.create("0 * * * *")
    site.action.problem = InvalidInput("no file matches")
    site.until("2026-11-30T13:00:00+01:00")
    site.action.problem = None
    site.until("2026-11-30T14:00:00+01:00", turns=2)
    site.until("2026-11-30T15:00:00+01:00", turns=2)
    site.until("2026-11-30T16:00:00+01:00")
    found = values_of(site.metrics.collect())
    counts = {
        outcome: found[f"batchserve_schedule_ticks_total{{{outcome}}}"] for outcome in ("queued", "skipped", "failed")
    }
    assert counts == {"queued": 1, "skipped": 2, "failed": 1}


@pytest.mark.parametrize("state", [TickState.QUEUED, TickState.SKIPPED, TickState.FAILED])
def test_a_tick_is_counted_and_logged_by_the_outcome_that_its_action_has_given_it(site: Site, state: TickState) -> None:
    def ending(tenant: str, request: Mapping[str, Any], claim: Claim) -> None:  # noqa: ARG001 - those of an action
        claim.end(state, {"code": "given", "message": "as the inputs were"})

    site.action.run = ending  # type: ignore[method-assign]
    site.create()
    with capture_logs() as logs:
        [tick] = site.until("2026-12-01T02:00:00+01:00")
    assert tick.state is state
    found = values_of(site.metrics.collect())
    counts = {one: found[f"batchserve_schedule_ticks_total{{{one}}}"] for one in ("queued", "skipped", "failed")}
    assert counts == {"queued": 0, "skipped": 0, "failed": 0} | {state.value: 1}
    action = {TickState.QUEUED: "tick_run", TickState.SKIPPED: "tick_skip", TickState.FAILED: "tick_fail"}[state]
    assert [(line["action"], line["code"]) for line in logs] == [(action, "given")]


@pytest.mark.parametrize("problem", [Unavailable("the bucket does not respond"), TooManyRequests("quota: jobs a day")])
def test_what_may_pass_is_tried_again_until_it_has_passed(site: Site, problem: Exception) -> None:
    site.create()
    site.action.problem = problem
    [tick] = site.until("2026-12-01T02:00:00+01:00", turns=3)
    assert (tick.state, tick.attempt) == (TickState.PENDING, 1)
    assert tick.error is not None
    assert tick.error["message"] == str(problem)
    [tick] = site.until("2026-12-01T02:00:11+01:00", turns=3)
    assert (tick.state, tick.attempt) == (TickState.PENDING, 2)
    site.action.problem = None
    [tick] = site.until("2026-12-01T02:00:32+01:00")
    assert (tick.state, tick.attempt, tick.error) == (TickState.QUEUED, 3, None)
    assert site.action.requests == [{"url": "in/2026-12-01"}]


def test_what_does_not_pass_within_the_grace_fails(site: Site) -> None:
    site.create()
    site.action.problem = Unavailable("the bucket does not respond")
    [tick] = site.until("2026-12-01T02:00:00+01:00")
    for minute in range(1, 16):
        [tick] = site.until(f"2026-12-01T02:{minute:02d}:00+01:00")
    assert tick.state is TickState.FAILED
    assert tick.error is not None
    assert tick.error["code"] == "unavailable"
    assert 5 < tick.attempt < 10


def test_a_tick_that_has_queued_some_of_its_jobs_is_queued_with_the_reason_for_the_rest(site: Site) -> None:
    """Until the grace ends it is tried again, and adds what it can."""

    def partly(tenant: str, request: Mapping[str, Any], claim: Claim) -> None:  # noqa: ARG001 - those of an action
        if claim.tick.attempt < 3:
            with site.database.write() as connection:
                claim.note(connection, [f"job {claim.tick.attempt}"])
        raise QuotaExceeded("no more jobs at a time")

    site.action.run = partly  # type: ignore[method-assign]
    site.create()
    [tick] = site.until("2026-12-01T02:00:00+01:00")
    assert (tick.state, tick.jobs, codes([tick])) == (TickState.PENDING, 1, ["quota-exceeded"])
    [tick] = site.until("2026-12-01T02:05:00+01:00")
    assert (tick.state, tick.jobs) == (TickState.PENDING, 2)
    [tick] = site.until("2026-12-01T02:14:59+01:00")
    assert (tick.state, tick.jobs, codes([tick])) == (TickState.QUEUED, 2, ["quota-exceeded"])


def test_an_unexpected_error_fails_its_tick_and_no_other(site: Site) -> None:
    site.create(name="a")
    site.action.problem = RuntimeError("odd")
    [tick] = site.until("2026-12-01T02:00:00+01:00")
    assert tick.state is TickState.FAILED
    assert tick.error is not None
    assert tick.error["code"] == "internal-error"
    assert "odd" not in tick.error["message"]


def test_a_database_that_goes_away_leaves_the_tick_to_be_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")

    def away(*_: Any, **__: Any) -> None:
        raise Unavailable("the database does not respond")

    with monkeypatch.context() as patch:
        patch.setattr(ticks, "end_if_mine", away)
        patch.setattr(ticks, "postpone_if_mine", away)
        site.scheduler.turn()
    assert [tick.state for tick in site.history()] == [TickState.PENDING]
    site.clock.now += site.settings.lease + 1
    site.scheduler.turn()
    assert [(tick.state, tick.attempt) for tick in site.history()] == [(TickState.QUEUED, 2)]
    assert site.jobs() == 1


# --- pause, resume, run, change, delete ------------------------------------------------------------------------------


def paused(site: Site, schedule: Schedule) -> None:
    with site.database.write() as connection:
        assert schedules.pause_if_active(connection, schedule, site.clock.now)
        ticks.end_pending(connection, schedule, site.clock.now, {"code": "paused", "message": "paused"})


def test_a_paused_schedule_has_no_ticks_and_what_it_missed_is_not_caught_up(site: Site) -> None:
    schedule = site.create(catch_up=CatchUp.ALL)
    paused(site, schedule)
    assert site.until("2026-12-04T09:00:00+01:00") == []
    with site.database.write() as connection:
        assert schedules.resume_if_paused(connection, schedule, at("2026-12-05T02:00:00+01:00"), site.clock.now)
    assert site.until("2026-12-04T10:00:00+01:00") == []
    assert told(site.until("2026-12-05T02:00:00+01:00")) == [("2026-12-05T02:00:00+01:00", "queued")]


def test_a_pause_skips_ticks_that_wait_and_undoes_one_that_runs(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    [tick] = site.history()
    claimed = site.scheduler.firing.claim(tick)
    assert claimed is not None
    paused(site, site.current(schedule))
    site.scheduler.firing.act(*claimed)
    assert [(one.state, one.jobs) for one in site.history()] == [(TickState.SKIPPED, 0)]
    assert site.jobs() == 0


def run_now(site: Site, schedule: Schedule, moment: float | None = None) -> Tick:
    with site.database.write() as connection:
        tick = site.scheduler.firing.begin_run(connection, schedule, moment)
    site.scheduler.firing.act(schedule, tick)
    with site.database.read() as connection:
        found = ticks.get(connection, tick.id)
    assert found is not None
    return found


def test_a_run_on_request_neither_waits_nor_is_skipped(site: Site) -> None:
    schedule = site.create()
    for number in range(1, 4):
        tick = run_now(site, schedule)
        assert (tick.state, tick.run, tick.on_request) == (TickState.QUEUED, number, True)
    paused(site, schedule)
    assert run_now(site, site.current(schedule)).state is TickState.QUEUED
    assert site.jobs() == 4


def test_a_run_on_request_has_the_dates_of_the_time_that_it_names(site: Site) -> None:
    schedule = site.create()
    run_now(site, schedule)
    for _ in range(2):
        run_now(site, schedule, at("2026-11-20T02:00:00+01:00"))
    assert [request["url"] for request in site.action.requests] == ["in/2026-11-30", "in/2026-11-20", "in/2026-11-20"]


def test_a_run_whose_process_was_killed_is_gone_on_with_by_another(site: Site) -> None:
    schedule = site.create()
    with site.database.write() as connection:
        site.scheduler.firing.begin_run(connection, schedule, None)
    history = once_more(site)
    assert [(tick.state, tick.attempt, tick.run) for tick in history] == [(TickState.QUEUED, 2, 1)]
    assert site.jobs() == 1


def test_a_due_tick_is_skipped_while_the_job_of_a_run_is_unfinished(site: Site) -> None:
    run_now(site, site.create())
    history = site.until("2026-12-01T02:00:00+01:00")
    assert [tick.state for tick in history] == [TickState.QUEUED, TickState.SKIPPED]


def test_a_deleted_schedule_takes_its_history_along_and_leaves_its_jobs(site: Site) -> None:
    schedule = site.create()
    site.until("2026-12-01T02:00:00+01:00")
    with site.database.write() as connection:
        schedules.delete_one(connection, schedule)
    assert site.until("2026-12-02T02:00:00+01:00") == []
    assert site.jobs() == 1
    with pytest.raises(ScheduleNotFound), site.database.write() as connection:
        schedules.delete_one(connection, schedule)


def test_a_schedule_that_is_deleted_while_its_tick_runs_queues_nothing(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.firing.plan(schedule)
    [tick] = site.history()
    claimed = site.scheduler.firing.claim(tick)
    assert claimed is not None
    with site.database.write() as connection:
        schedules.delete_one(connection, schedule)
    site.scheduler.firing.act(*claimed)
    assert site.jobs() == 0


def test_a_schedule_that_is_changed_while_it_is_planned_keeps_its_new_times(site: Site) -> None:
    before = site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    changed = replace(before, cron="0 5 * * *", next_at=at("2026-12-01T05:00:00+01:00"), changed_at=site.clock.now)
    with site.database.write() as connection:
        schedules.replace(connection, changed)
    site.scheduler.firing.plan(before)
    assert site.history() == []
    assert site.current(before).next_at == at("2026-12-01T05:00:00+01:00")


# --- a clock that jumps ----------------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_repeats_no_tick_and_stops_no_schedule(site: Site) -> None:
    schedule = site.create()
    site.until("2026-12-01T02:00:00+01:00")
    site.end_jobs()
    site.until("2026-12-01T01:30:00+01:00", turns=2)
    assert site.current(schedule).next_at == at("2026-12-01T02:00:00+01:00")
    site.until("2026-12-01T02:00:00+01:00", turns=2)
    assert len(site.history()) == 1
    assert told(site.until("2026-12-02T02:00:00+01:00"))[1:] == [("2026-12-02T02:00:00+01:00", "queued")]


def test_a_clock_that_was_years_ahead_leaves_a_schedule_with_its_right_time(site: Site) -> None:
    schedule = site.create()
    site.until("2031-06-01T12:00:00+02:00")
    site.end_jobs()
    assert site.current(schedule).next_at == at("2031-06-02T02:00:00+02:00")
    site.until("2026-11-30T12:30:00+01:00")
    assert site.current(schedule).next_at == at("2026-12-01T02:00:00+01:00")
    assert told(site.until("2026-12-01T02:00:00+01:00"))[-1] == ("2026-12-01T02:00:00+01:00", "queued")


def test_a_claim_of_a_clock_that_was_years_ahead_is_free(site: Site) -> None:
    schedule = site.create()
    site.clock.now = at("2031-06-01T02:00:00+02:00")
    with site.database.write() as connection:
        site.scheduler.firing.begin_run(connection, schedule, None)
    [tick] = site.until("2026-11-30T13:00:00+01:00")
    assert tick.state is TickState.QUEUED


# --- upkeep ----------------------------------------------------------------------------------------------------------


def test_ticks_are_kept_for_their_time_and_pending_ones_always(site: Site, tmp_path: Path) -> None:
    site.create()
    for day in range(1, 30):
        site.until(f"2026-12-{day:02d}T02:00:00+01:00")
        site.end_jobs()
    with site.database.write() as connection:
        connection.execute(update(tables.ticks).where(tables.ticks.c.id == 3).values(state="pending", try_at=2e9))
    settings = Settings(storage=str(tmp_path), keep_ticks="10d")
    now = at("2026-12-29T02:00:00+01:00")
    forget(site.database, settings, now, 1e9)
    assert [tick.id for tick in site.history()] == [3, *range(19, 30)]
    forget(site.database, settings.model_copy(update={"keep_ticks": None}), now + 1000 * DAY, 1e9)
    assert len(site.history()) == 12
    with site.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(tables.tick_jobs)) == 12


@pytest.mark.parametrize(
    "change",
    ["cron = 'never'", "time_zone = 'Moon/Tycho'", "catch_up = 'some'", "request = '[1]'", "action = 'none'"],
)  # fmt: skip
def test_a_schedule_that_cannot_be_read_prevents_no_other(site: Site, change: str) -> None:
    damaged = site.create(name="damaged")
    site.create(name="sound")
    with site.database.write() as connection:
        connection.execute(text(f"UPDATE schedules SET {change} WHERE id = '{damaged.id}'"))  # noqa: S608
    site.until("2026-12-01T02:00:00+01:00", turns=2)
    queued = [tick for tick in site.history() if tick.state is TickState.QUEUED]
    assert len(queued) == 1


def test_damaged_rows_are_found_and_removed(site: Site, tmp_path: Path) -> None:
    damaged = site.create(name="damaged")
    sound = site.create(name="sound")
    site.until("2026-12-01T02:00:00+01:00")
    with site.database.write() as connection:
        connection.execute(text(f"UPDATE schedules SET overlap = 'both' WHERE id = '{damaged.id}'"))  # noqa: S608
        connection.execute(text(f"UPDATE ticks SET state = 'lost' WHERE schedule_id = '{sound.id}'"))  # noqa: S608
    found = list(find_unreadable(site.database))
    assert [row.table for row in found] == ["schedules", "ticks"]
    assert all("batchserve mend" in row.fault.mend for row in found)
    mend_unreadable(site.database, open_storage(str(tmp_path)))
    assert list(find_unreadable(site.database)) == []
    with site.database.read() as connection:
        assert [one.name for one in schedules.list_page(connection, "default")[0]] == ["sound"]
    assert site.history() == []


def test_the_doctor_reports_a_schedule_that_no_process_plans(site: Site) -> None:
    schedule = site.create()
    with site.database.write() as connection:
        connection.execute(update(tables.schedules).values(next_at=1e9))
    [fault] = inspect_jobs(site.database, patience=60.0)
    assert fault.place == "schedule nightly"
    assert "no process plans them" in fault.found
    paused(site, schedule)
    assert inspect_jobs(site.database, patience=60.0) == []


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_schedule_is_found_by_its_id_or_name_within_its_tenant(site: Site) -> None:
    made = site.create()
    other = replace(made, id=str(uuid7()), tenant="blue")
    with site.database.write() as connection:
        schedules.create(connection, other)
    with site.database.read() as connection:
        assert schedules.find(connection, "nightly", "default") == made
        assert schedules.find(connection, made.id, "default") == made
        assert schedules.find(connection, other.id, "*") == other
        for reference, tenant in ((other.id, "default"), ("none", "default"), ("nightly", "red"), ("\0", "default")):
            with pytest.raises(ScheduleNotFound):
                schedules.find(connection, reference, tenant)
        with pytest.raises(Exception, match="several tenants have a schedule 'nightly'"):
            schedules.find(connection, "nightly", "*")


def test_the_claim_of_a_tick_is_the_guard_of_every_write(site: Site) -> None:
    site.create()
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    site.scheduler.turn()
    [ended] = site.history()
    stale = Claim(site.database, site.clock, replace(ended, attempt=ended.attempt), 30.0)
    acts: tuple[Callable[[], None], ...] = (
        lambda: stale.end(TickState.FAILED),
        lambda: stale.postpone(1.0, {"code": "c", "message": "m"}),
        lambda: noted(site, stale),
    )
    for act in acts:
        with pytest.raises(LeaseLost):
            act()
    assert site.history() == [ended]


def noted(site: Site, claim: Claim) -> None:
    with site.database.write() as connection:
        claim.note(connection, ["another"])


def test_a_tenant_has_no_more_schedules_than_it_may(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MOST", 2)
    made = [site.create(name=name) for name in ("a", "b")]
    with pytest.raises(Conflict, match="has 2 schedules, the most that it may have"):
        site.create(name="c")
    with site.database.write() as connection:
        schedules.delete_one(connection, made[0])
    site.create(name="c")


def test_a_database_that_was_moved_away_fires_nothing(sqlite: Database) -> None:
    site = Site(sqlite)
    site.create()
    with sqlite.write() as connection:
        closed.close(connection, [tables.schedules, tables.ticks, tables.jobs])
    site.clock.now = at("2026-12-01T02:00:00+01:00")
    with pytest.raises(Unavailable):
        site.scheduler.turn()
    assert (site.history(), site.jobs()) == ([], 0)
