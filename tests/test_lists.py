"""Lists of jobs: every filter in every order, pages that stay correct while jobs come and go, and an index for each."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import uuid_utils
from sqlalchemy import Connection, Engine, delete, event, insert, update

from batchserve import registry
from batchserve.access import EVERY_TENANT
from batchserve.db.connect import Database
from batchserve.db.tables import inputs
from batchserve.db.tables import jobs as job_rows
from batchserve.domain import InputTensor, Job, JobState, Signature
from batchserve.errors import InvalidOptions
from batchserve.jobs import lists
from batchserve.jobs.lists import NEWEST, JobFilter, JobOrder, SortKey, cursor_of

SIGNATURE = Signature((InputTensor("X", "float32", (None, 2)),), ())
STATES = list(JobState)
ORDERS = [JobOrder(by, ascending) for by in SortKey for ascending in (False, True)]
EPOCH = 1_700_000_000.0
TENANTS = ("blue", "red")


def name_of(order: JobOrder) -> str:
    return f"{order.by} {'asc' if order.ascending else 'desc'}"


def id_at(moment: float) -> str:
    return str(uuid_utils.uuid7(nanoseconds=int(1e9 * moment)))


def row(number: int, **values: Any) -> dict[str, Any]:
    """A job that was created in the second of this number. A value may be a function of the number."""
    given = {name: value(number) if callable(value) else value for name, value in values.items()}
    state = given.pop("state", STATES[number % len(STATES)])
    moment = EPOCH + number
    return {
        "id": id_at(moment), "state": state, "options": {}, "metadata": {}, "created_at": moment, "queued_at": moment,
        "finished_at": moment + number % 5 if JobState(state).finished else None, "tenant": "blue", "model_id": None,
        **given,
    }  # fmt: skip


def fill(database: Database, count: int, **values: Any) -> list[dict[str, Any]]:
    rows = [row(number, **values) for number in range(count)]
    with database.write() as connection:
        connection.execute(insert(job_rows), rows)
        stored = {"number": 0, "key": "i", "format": "csv", "delimiter": ",", "bytes": 10, "sha256": "a" * 64}
        named = [{"job_id": one["id"], "filename": f"file-{number}.csv", **stored} for number, one in enumerate(rows)]
        connection.execute(insert(inputs), named)
    return rows


def versions(database: Database, *names: str) -> list[int]:
    """A new version of each of these models."""
    with database.write() as connection:
        return [
            registry.add(connection, name, f"{number:064x}", 1, SIGNATURE, {}, 0.0).id
            for number, name in enumerate(names)
        ]


def pages(
    database: Database, tenant: str, wanted: JobFilter, order: JobOrder, limit: int, between: Callable[[], object] = int
) -> Iterator[list[Job]]:
    """The pages of a list, with something done after each."""
    after = None
    while True:
        with database.read() as connection:
            page = lists.list_page(connection, tenant, wanted, order, after=after, limit=limit)
        if not page:
            return
        yield page
        after = cursor_of(page[-1], order)
        between()


def listed(database: Database, wanted: JobFilter, order: JobOrder = NEWEST, tenant: str = "blue") -> list[str]:
    return [job.id for page in pages(database, tenant, wanted, order, 7) for job in page]


def expected(rows: Sequence[dict[str, Any]], order: JobOrder, wanted: Callable[[dict[str, Any]], bool]) -> list[str]:
    finished = order.by is SortKey.FINISHED
    found = [one for one in rows if wanted(one) and (not finished or one["finished_at"] is not None)]
    found.sort(key=lambda one: (one["finished_at"], one["id"]) if finished else one["id"], reverse=not order.ascending)
    return [one["id"] for one in found]


# --- what a list has -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=name_of)
@pytest.mark.parametrize("tenant", ["blue", EVERY_TENANT])
def test_every_filter_selects_the_same_jobs_in_every_order(database: Database, order: JobOrder, tenant: str) -> None:
    iris, wine, newer = versions(database, "iris", "wine", "iris")
    of = {0: None, 1: iris, 2: wine, 3: newer}
    rows = fill(
        database, 120, model_id=lambda number: of[number // 7 % 4], tenant=lambda number: TENANTS[number % 3 == 0],
    )  # fmt: skip
    seen = [one for one in rows if tenant in (EVERY_TENANT, one["tenant"])]
    failed, ended = (JobState.FAILED,), (JobState.CANCELLED, JobState.COMPLETED, JobState.UPLOADED)
    middle, late = EPOCH + 40, EPOCH + 90
    cases: list[tuple[JobFilter, Callable[[dict[str, Any]], bool]]] = [
        (JobFilter(), lambda _: True),
        (JobFilter(failed), lambda one: one["state"] in failed),
        (JobFilter(ended), lambda one: one["state"] in ended),
        (JobFilter(model="iris"), lambda one: one["model_id"] in (iris, newer)),
        (JobFilter(model="iris@2"), lambda one: one["model_id"] == newer),
        (JobFilter(ended, model="iris"), lambda one: one["state"] in ended and one["model_id"] in (iris, newer)),
        (JobFilter(model="none"), lambda _: False),
        (JobFilter(since=middle, until=late), lambda one: middle <= one["created_at"] < late),
        (JobFilter(failed, since=middle), lambda one: one["state"] in failed and one["created_at"] >= middle),
        (JobFilter(search="FILE-1"), lambda one: "file-1" in f"file-{rows.index(one)}.csv"),
        (JobFilter(ended, search="file-1"), lambda one: one["state"] in ended and str(rows.index(one))[0] == "1"),
    ]
    if order.by is SortKey.FINISHED:
        cases += [
            (
                JobFilter(finished_since=middle, finished_until=late),
                lambda one: middle <= (one["finished_at"] or 0) < late,
            ),
            (
                JobFilter(failed, model="wine", finished_since=middle),
                lambda one: one["state"] in failed and one["model_id"] == wine and one["finished_at"] >= middle,
            ),
        ]
    for wanted, holds in cases:
        right = expected(seen, order, holds)
        assert listed(database, wanted, order, tenant) == right, wanted
        with database.read() as connection:
            assert lists.count(connection, tenant, wanted, order) == len(right), wanted
    assert len(expected(seen, order, cases[1][1])) > 5


def test_a_list_by_the_end_of_jobs_has_no_unfinished_ones(database: Database) -> None:
    fill(database, 20, state=JobState.QUEUED)
    order = JobOrder(SortKey.FINISHED)
    assert listed(database, JobFilter(), order) == []
    assert listed(database, JobFilter((JobState.QUEUED,)), order) == []
    assert len(listed(database, JobFilter((JobState.QUEUED,)))) == 20


@pytest.mark.parametrize("tenant", ["blue", EVERY_TENANT])
def test_the_jobs_of_many_versions_and_of_many_tenants_are_in_one_order(database: Database, tenant: str) -> None:
    made = versions(database, *["iris"] * 30)
    rows = fill(
        database, 90, model_id=lambda number: made[number % 30],
        tenant=lambda number: "blue" if number < 60 else f"tenant-{number}",
    )  # fmt: skip
    seen = [one for one in rows if tenant in (EVERY_TENANT, one["tenant"])]
    for order in ORDERS:
        assert listed(database, JobFilter(model="iris"), order, tenant) == expected(seen, order, lambda _: True)


def test_a_damaged_row_hides_no_other(sqlite: Database) -> None:
    rows = fill(sqlite, 30, state=JobState.COMPLETED)
    with sqlite.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET options = 'x' WHERE id = ?", (rows[12]["id"],))
        connection.exec_driver_sql("UPDATE jobs SET finished_at = 'x' WHERE id = ?", (rows[20]["id"],))
        connection.exec_driver_sql("UPDATE jobs SET finished_at = 1e300 WHERE id = ?", (rows[21]["id"],))
    others = [one for number, one in enumerate(rows) if number not in (12, 20, 21)]
    for order in ORDERS:
        assert listed(sqlite, JobFilter(), order) == expected(others, order, lambda _: True)


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=name_of)
@pytest.mark.parametrize("states", [(), (JobState.COMPLETED, JobState.FAILED)], ids=["all", "two states"])
def test_pages_neither_repeat_nor_omit_a_job_while_others_come_and_go(
    database: Database, order: JobOrder, states: tuple[JobState, ...]
) -> None:
    """Also when the last job of a page, whose place the next one begins behind, is deleted."""
    chance = random.Random(5)
    rows = fill(database, 60, state=lambda number: (JobState.COMPLETED, JobState.FAILED)[number % 2])
    kept, deleted, latest = {one["id"] for one in rows}, set(), [60]
    seen: list[str] = []

    def come_and_go() -> None:
        gone = {seen[-1], chance.choice(sorted(kept))}
        kept.difference_update(gone)
        deleted.update(gone)
        latest[0] += 1
        with database.write() as connection:
            connection.execute(delete(job_rows).where(job_rows.c.id.in_(gone)))
            connection.execute(insert(job_rows), [row(latest[0], state=JobState.COMPLETED)])

    for page in pages(database, "blue", JobFilter(states), order, 5, come_and_go):
        seen += [job.id for job in page]
    assert len(set(seen)) == len(seen)
    assert kept <= set(seen)
    assert len(deleted) > 10


def test_jobs_that_finished_at_one_moment_are_on_one_page_each(database: Database) -> None:
    rows = fill(database, 25, state=JobState.COMPLETED, finished_at=EPOCH + 0.1)
    for order in (JobOrder(SortKey.FINISHED), JobOrder(SortKey.FINISHED, ascending=True)):
        assert listed(database, JobFilter(), order) == expected(rows, order, lambda _: True)


@pytest.mark.parametrize(
    ("order", "cursor"),
    [
        (NEWEST, "1700000000.0_01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"),
        (JobOrder(SortKey.FINISHED), "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"),
        (JobOrder(SortKey.FINISHED), "nan_x"),
        (JobOrder(SortKey.FINISHED), "_"),
        (JobOrder(SortKey.FINISHED), ""),
        (NEWEST, ""),
        (NEWEST, "x"),
    ],
)
def test_the_cursor_of_another_list_is_refused(database: Database, order: JobOrder, cursor: str) -> None:
    with database.read() as connection, pytest.raises(InvalidOptions, match="`next` of a page of the same list"):
        lists.list_page(connection, "blue", JobFilter(), order, after=cursor)


# --- how it is read --------------------------------------------------------------------------------------------------

FILTERS = {
    "all": JobFilter(),
    "a state": JobFilter((JobState.FAILED,)),
    "two states": JobFilter((JobState.FAILED, JobState.CANCELLED)),
    "a model": JobFilter(model="iris"),
    "a version": JobFilter(model="iris@1"),
    "a state of a model": JobFilter((JobState.FAILED,), model="iris"),
    "a time": JobFilter(since=EPOCH + 5, until=EPOCH + 15),
    "a state and a time": JobFilter((JobState.FAILED,), since=EPOCH + 5, until=EPOCH + 15),
    "a model and a time": JobFilter(model="iris", since=EPOCH + 5),
}
OF_FINISHED = {
    "an end": JobFilter(finished_since=EPOCH + 5, finished_until=EPOCH + 15),
    "a state and an end": JobFilter((JobState.FAILED,), finished_since=EPOCH + 5),
}
INDICES = {
    SortKey.CREATED: {"ix_jobs_tenant_id", "ix_jobs_tenant_state_id_model_id", "ix_jobs_model_id_tenant_id"},
    SortKey.FINISHED: {"ix_jobs_finished"},
}
PRIMARY_KEY = {"sqlite_autoindex_jobs_1"}


@contextmanager
def statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements of a database, with their values."""
    found: list[tuple[str, Any]] = []

    def note(connection: Connection, _cursor: object, statement: str, values: object, *_: object) -> None:
        if str(connection.engine.url) == database.url and statement.startswith("SELECT"):
            found.append((statement, values))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@pytest.mark.parametrize("order", ORDERS, ids=name_of)
@pytest.mark.parametrize("tenant", ["blue", EVERY_TENANT])
def test_an_index_gives_each_list_in_its_order(sqlite: Database, tenant: str, order: JobOrder) -> None:
    (iris,) = versions(sqlite, "iris")
    fill(sqlite, 20, state=JobState.FAILED, model_id=iris)
    filters = [*FILTERS.values(), *(OF_FINISHED.values() if order.by is SortKey.FINISHED else ())]
    with sqlite.read() as connection:
        last = cursor_of(lists.list_page(connection, tenant, JobFilter(), order, limit=1)[0], order)
        for wanted, after in itertools.product(filters, (None, last)):
            with statements(sqlite) as run:
                lists.list_page(connection, tenant, wanted, order, after=after)
            (page,) = [(text, values) for text, values in run if "ORDER BY" in text and "options" not in text]
            plan = [one.detail for one in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {page[0]}", page[1])]
            reads = [step for step in plan if " jobs " in f"{step} "]
            has_primary_key = tenant == EVERY_TENANT and not (wanted.states or wanted.model)
            known = PRIMARY_KEY if order.by is SortKey.CREATED and has_primary_key else INDICES[order.by]
            assert reads
            assert all(set(step.split()) & known for step in reads), plan
            if known is not PRIMARY_KEY:
                assert all(step.startswith("SEARCH jobs USING ") for step in reads), plan
            if len(reads) == 1:  # otherwise the beginnings of several are merged, of each as many as a page has
                assert not [step for step in plan if "TEMP B-TREE" in step], plan


@pytest.mark.parametrize("order", ORDERS, ids=name_of)
def test_a_page_reads_as_much_among_many_jobs_as_among_few(sqlite: Database, order: JobOrder) -> None:
    """The jobs of a state and of a model are those at the far end of the list."""
    iris, wine = versions(sqlite, "iris", "wine")
    rare = 200
    taken: dict[str, list[int]] = {}
    for tenant, count in (("blue", 1000), ("red", 10_000)):
        old = range(rare) if not order.ascending else range(count - rare, count)
        rows = fill(
            sqlite, count, tenant=tenant,
            state=lambda number, old=old: JobState.FAILED if number in old else JobState.COMPLETED,
            model_id=lambda number, old=old: iris if number in old else wine,
        )  # fmt: skip
        middle = rows[old[rare // 2]]
        deep = middle["id"] if order.by is SortKey.CREATED else f"{middle['finished_at']!r}_{middle['id']}"
        with sqlite.read() as connection:
            assert lists.count(connection, tenant) == count
            for named, after in itertools.product(FILTERS, (None, deep)):
                page = partial(lists.list_page, connection, tenant, FILTERS[named], order, after=after)
                taken.setdefault(f"{named}{after and ', a deep page'}", []).append(steps(connection, page))
    for named, (few, many) in taken.items():
        if not picked(named, order):
            assert many < 1.5 * few + 2, named
    assert any(few > 10 for few, _ in taken.values())


def picked(named: str, order: JobOrder) -> bool:
    """Whether the jobs of a list are picked from an index: those of a model in a state or by their end, and those of a
    time by their end."""
    of_model, by_end = "model" in named or "version" in named, order.by is SortKey.FINISHED
    return (of_model and ("state" in named or by_end)) or ("time" in named and (by_end or of_model))


def steps(connection: Connection, work: Callable[[], object]) -> int:
    """The hundreds of steps that SQLite takes for a call."""
    taken = []
    driver: Any = connection.connection.driver_connection
    driver.set_progress_handler(lambda: taken.append(1), 100)
    work()
    driver.set_progress_handler(None, 0)
    return len(taken)


def test_a_job_that_is_retried_leaves_the_list_of_finished_ones(database: Database) -> None:
    rows = fill(database, 3, state=JobState.FAILED)
    with database.write() as connection:
        connection.execute(
            update(job_rows).where(job_rows.c.id == rows[1]["id"]).values(state=JobState.QUEUED, finished_at=None)
        )
    assert listed(database, JobFilter(), JobOrder(SortKey.FINISHED)) == [rows[2]["id"], rows[0]["id"]]
