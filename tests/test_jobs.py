"""The states of a job and their guards, on every kind of database."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from calls import claim_all
from sqlalchemy import Connection, select, update

from batchserve import registry
from batchserve.correlation import Correlation
from batchserve.db.connect import Database, Moment
from batchserve.db.tables import attempts, chunks, events, inputs
from batchserve.db.tables import jobs as job_rows
from batchserve.db.tables import totals as total_rows
from batchserve.domain import (
    Attempt,
    Chunk,
    CommittedChunk,
    Dialect,
    InputTensor,
    Job,
    JobState,
    ModelVersion,
    Options,
    Result,
    ScoredChunk,
    Signature,
    StoredInput,
)
from batchserve.errors import JobConflict, JobNotFound, LeaseLost, ModelNotFound, OutOfMemory
from batchserve.facts import merge_facts
from batchserve.jobs import execution, expiry, lists, plan, queries, requests, totals
from batchserve.jobs.ends import forget_events
from batchserve.jobs.lists import JobFilter

SIGNATURE = Signature((InputTensor("X", "float32", (None, 2)),), ())
OPTIONS = Options("csv", passthrough=("id", "name"), columns={"a": "x"}, max_errors=0.5, top_k=3)
FIRST, SECOND = Chunk(0, 10, 4, 100), Chunk(10, 5, 100, 150)
LEASE = 30.0
RESULT = Result("results/1-1", 123, "a" * 64, None, 0)


def at(seconds: float, clock: str = "boot-1") -> Moment:
    """That many seconds after the start time of the tests, by both clocks."""
    return Moment(1_700_000_000.0 + seconds, 500.0 + seconds, clock)


def wall(seconds: float) -> float:
    return at(seconds).wall


def model(connection: Connection) -> ModelVersion:
    found = registry.find_digest(connection, "iris", "d" * 64)
    return found or registry.add(connection, "iris", "d" * 64, 10, SIGNATURE, {}, wall(0))


def upload(database: Database, job_id: str, filename: str | None = None) -> None:
    new = StoredInput(f"inputs/{job_id}", "csv", Dialect(";"), 150, "b" * 64, filename)
    with database.write() as connection:
        requests.create(connection, job_id, [new], model(connection), wall(0))


def enqueue(
    database: Database,
    job_id: str,
    *,
    metadata: dict[str, str] | None = None,
    priority: int = 0,
    run_after: float | None = None,
    second: float = 1,
    digest: str = "r" * 64,
) -> bool:
    with database.write() as connection:
        return requests.enqueue_if_uploaded(
            connection,
            job_id,
            model(connection),
            OPTIONS,
            digest,
            metadata=metadata or {},
            priority=priority,
            run_after=run_after,
            now=wall(second),
        )


def queue(database: Database, job_id: str, **request: Any) -> None:
    upload(database, job_id)
    assert enqueue(database, job_id, **request)


def claim(database: Database, worker: str = "w1", second: float = 2) -> Job | None:
    with database.write() as connection:
        return next(iter(execution.claim_due(connection, worker, LEASE, at(second), 1)), None)


def run(database: Database, job_id: str = "1", *planned: Chunk) -> Job:
    """A job in the state running, with a complete plan of `planned`."""
    queue(database, job_id)
    claim(database)
    with database.write() as connection:
        plan.add_chunks_if_mine(connection, job_id, 1, planned, complete=True)
    return get(database, job_id)


def scored(chunk: Chunk, failed: int = 0) -> ScoredChunk:
    facts = {"notes": [f"from {chunk.first_record}"], "model_seconds": chunk.records / 8}
    return ScoredChunk(chunk, failed, 1000 + chunk.first_record, "c" * 64, 17 * failed, facts)


def commit(database: Database, chunk: Chunk, failed: int = 0, progress: float = 0.5, attempt: int = 1) -> None:
    with database.write() as connection:
        plan.commit_chunk_if_mine(connection, "1", attempt, scored(chunk, failed), progress)


def complete(database: Database, attempt: int = 1, second: float = 9) -> None:
    with database.write() as connection:
        execution.complete_if_mine(connection, "1", attempt, RESULT, {"notes": ["a note"]}, wall(second))


def complete_at_once(connection: Connection, of_model: ModelVersion) -> tuple[Job, Attempt] | None:
    """Of job 1, as if it had been read while it was uploaded."""
    stored = StoredInput("inputs/1", "csv", Dialect(";"), 150, "b" * 64)
    asked = {"options": OPTIONS, "request_digest": "r" * 64, "metadata": {"a": "b"}, "priority": 2}
    job = Job("1", JobState.UPLOADED, (stored,), wall(0), model=of_model, inputs_bytes=150, **asked)  # type: ignore[arg-type]
    facts = {"notes": ["a note"]}
    return requests.complete_if_uploaded(connection, job, "w2", RESULT, facts, wall(8), only=scored(FIRST, 1), small={})


def rescue(database: Database, second: float, clock: str = "boot-1", crashes: int = 3) -> tuple[list[str], list[str]]:
    with database.write() as connection:
        return execution.rescue_expired(connection, crashes, at(second, clock))


def get(database: Database, job_id: str = "1") -> Job:
    with database.read() as connection:
        return queries.get(connection, job_id)


def everything(database: Database) -> list[list[Any]]:
    """All rows about jobs, to check that nothing was changed."""
    with database.read() as connection:
        return [
            [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
            for table in (job_rows, inputs, chunks, attempts)
        ]


def ends(database: Database, job_id: str = "1") -> list[tuple[str, str, float]]:
    """The tenant, state and time of each event of a job, in their order."""
    query = select(events.c.tenant, events.c.state, events.c.at).where(events.c.job_id == job_id).order_by(events.c.id)
    with database.read() as connection:
        return [(row.tenant, row.state, row.at) for row in connection.execute(query)]


# --- transitions -----------------------------------------------------------------------------------------------------

Action = Callable[[Connection], Any]

ACTIONS: dict[str, Action] = {
    "enqueue_if_uploaded": lambda connection: requests.enqueue_if_uploaded(
        connection, "1", model(connection), OPTIONS, "r" * 64, metadata={}, priority=0, run_after=None, now=wall(8)
    ),
    "complete_if_uploaded": lambda connection: complete_at_once(connection, model(connection)),
    "complete_as_equal_if_queued": lambda connection: requests.complete_as_equal_if_queued(
        connection, "1", queries.get(connection, "equal"), wall(8)
    ),
    "request_cancel": lambda connection: requests.request_cancel(connection, "1", wall(8)),
    "retry_if_stopped": lambda connection: requests.retry_if_stopped(connection, "1", wall(8)),
    "delete_if_not_running": lambda connection: requests.delete_if_not_running(connection, "1"),
    "claim_due": lambda connection: execution.claim_due(connection, "w2", LEASE, at(8), 1),
    "renew_lease_if_mine": lambda connection: execution.renew_lease_if_mine(connection, "1", 1, LEASE, at(8)),
    "add_chunks_if_mine": lambda connection: plan.add_chunks_if_mine(
        connection, "1", 1, [Chunk(15, 5, 150, 200)], complete=True
    ),
    "commit_chunk_if_mine": lambda connection: plan.commit_chunk_if_mine(connection, "1", 1, scored(SECOND), 0.5),
    "count_crash_if_mine": lambda connection: plan.count_crash_if_mine(connection, "1", 1, 10),
    "split_chunk_if_mine": lambda connection: plan.split_chunk_if_mine(
        connection, "1", 1, SECOND, [Chunk(10, 3, 100, 130), Chunk(13, 2, 130, 150)]
    ),
    "complete_if_mine": lambda connection: execution.complete_if_mine(connection, "1", 1, RESULT, {}, wall(8)),
    "complete_if_mine, only": lambda connection: execution.complete_if_mine(
        connection, "1", 1, RESULT, {}, wall(8), only=scored(FIRST)
    ),
    "fail_if_mine": lambda connection: execution.fail_if_mine(connection, "1", 1, OutOfMemory("too much"), wall(8)),
    "cancel_if_mine": lambda connection: execution.cancel_if_mine(connection, "1", 1, wall(8)),
    "release_if_mine": lambda connection: execution.release_if_mine(connection, "1", 1, wall(8)),
    "rescue_expired": lambda connection: execution.rescue_expired(connection, 3, at(100)),
    "expire_if_over": lambda connection: expiry.expire_if_over(
        connection, ["1"], ended_before=wall(7), uploaded_before=wall(7), now=wall(8)
    ),
    "drop_input_if_over": lambda connection: expiry.drop_input_if_over(connection, ["1"], wall(7), wall(8)),
    "delete_expired_before": lambda connection: expiry.delete_expired_before(connection, wall(7), 10),
}
MINE = [name for name in ACTIONS if name.endswith("_if_mine")]

# The state to which each action leads a job that was uploaded, ...; an action that is not listed changes nothing.
LEGAL: dict[str, dict[str, JobState | None]] = {
    "uploaded": {
        "enqueue_if_uploaded": JobState.QUEUED,
        "complete_if_uploaded": JobState.COMPLETED,
        "request_cancel": JobState.CANCELLED,
        "delete_if_not_running": None,
        "expire_if_over": JobState.EXPIRED,
    },
    "queued": {
        "complete_as_equal_if_queued": JobState.COMPLETED,
        "request_cancel": JobState.CANCELLED,
        "delete_if_not_running": None,
        "claim_due": JobState.RUNNING,
    },
    # Nor is a job completed while a chunk is missing.
    "running": {
        "request_cancel": JobState.RUNNING,
        "renew_lease_if_mine": JobState.RUNNING,
        "add_chunks_if_mine": JobState.RUNNING,
        "commit_chunk_if_mine": JobState.RUNNING,
        "count_crash_if_mine": JobState.RUNNING,
        "split_chunk_if_mine": JobState.RUNNING,
        "fail_if_mine": JobState.FAILED,
        "cancel_if_mine": JobState.CANCELLED,
        "release_if_mine": JobState.QUEUED,
        "rescue_expired": JobState.QUEUED,
    },
    "running, all chunks done": {
        "request_cancel": JobState.RUNNING,
        "renew_lease_if_mine": JobState.RUNNING,
        "add_chunks_if_mine": JobState.RUNNING,
        "count_crash_if_mine": JobState.RUNNING,
        "complete_if_mine": JobState.COMPLETED,
        "fail_if_mine": JobState.FAILED,
        "cancel_if_mine": JobState.CANCELLED,
        "release_if_mine": JobState.QUEUED,
        "rescue_expired": JobState.QUEUED,
    },
    "completed": {
        "delete_if_not_running": None,
        "expire_if_over": JobState.EXPIRED,
        "drop_input_if_over": JobState.COMPLETED,
    },
    "failed": {
        "retry_if_stopped": JobState.QUEUED,
        "delete_if_not_running": None,
        "expire_if_over": JobState.EXPIRED,
        "drop_input_if_over": JobState.FAILED,
    },
    "failed, without its input": {"delete_if_not_running": None, "expire_if_over": JobState.EXPIRED},
    "cancelled": {
        "retry_if_stopped": JobState.QUEUED,
        "delete_if_not_running": None,
        "expire_if_over": JobState.EXPIRED,
        "drop_input_if_over": JobState.CANCELLED,
    },
    "cancelled before it was queued": {
        "delete_if_not_running": None,
        "expire_if_over": JobState.EXPIRED,
        "drop_input_if_over": JobState.CANCELLED,
    },
    "expired": {"delete_if_not_running": None, "delete_expired_before": None},
}


def bring_to(database: Database, state: str) -> None:
    """Brings job 1 to a state; an equal job is completed."""
    run(database, "equal", FIRST)
    with database.write() as connection:
        plan.commit_chunk_if_mine(connection, "equal", 1, scored(FIRST), 0.9)
        execution.complete_if_mine(connection, "equal", 1, RESULT, {}, wall(3))
    if state == "uploaded" or "before" in state:
        upload(database, "1")
    elif state == "queued":
        queue(database, "1")
    else:
        run(database, "1", FIRST, SECOND)
        commit(database, FIRST)
    with database.write() as connection:
        if "before" in state:
            requests.request_cancel(connection, "1", wall(4))
        elif "done" in state:
            plan.commit_chunk_if_mine(connection, "1", 1, scored(SECOND), 0.9)
        elif state == "completed":
            plan.commit_chunk_if_mine(connection, "1", 1, scored(SECOND), 0.9)
            execution.complete_if_mine(connection, "1", 1, RESULT, {}, wall(4))
        elif state.startswith("failed"):
            execution.fail_if_mine(connection, "1", 1, OutOfMemory("too much"), wall(4))
            if "without" in state:
                expiry.drop_input_if_over(connection, ["1"], wall(5), wall(5))
        elif state == "expired":
            execution.cancel_if_mine(connection, "1", 1, wall(4))
            expiry.expire_if_over(connection, ["1"], ended_before=wall(5), uploaded_before=wall(0), now=wall(5))
        elif state == "cancelled":
            execution.cancel_if_mine(connection, "1", 1, wall(4))
    assert get(database).state == state.replace(",", "").partition(" ")[0]


def perform(database: Database, action: str) -> None:
    with database.write() as connection:
        ACTIONS[action](connection)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", LEGAL)
def test_a_transition_happens_from_its_states_and_from_no_other(database: Database, state: str, action: str) -> None:
    bring_to(database, state)
    before, told = everything(database), ends(database)
    refused = False
    try:
        perform(database, action)
    except (LeaseLost, JobConflict):
        refused = True
    assert not (refused and action in LEGAL[state])
    if action not in LEGAL[state]:
        assert (everything(database), ends(database)) == (before, told)
    elif LEGAL[state][action] is None:
        with pytest.raises(JobNotFound):
            get(database)
        assert ends(database) == []
    else:
        job = get(database)
        assert job.state == LEGAL[state][action]
        assert everything(database) != before
        is_new = job.state.finished and job.state != state.replace(",", "").partition(" ")[0]
        assert [event[:2] for event in ends(database)[len(told) :]] == ([("default", job.state)] if is_new else [])


@pytest.mark.parametrize("action", MINE)
def test_a_stale_attempt_changes_nothing(database: Database, action: str) -> None:
    """Attempt 1 was paused for longer than its lease; attempt 2 owns the job when it resumes."""
    bring_to(database, "running")
    if action == "complete_if_mine":
        commit(database, SECOND)  # only the attempt is wrong
    rescue(database, 100)
    assert claim(database, "w2", 101)
    before = everything(database)
    with pytest.raises(LeaseLost):
        perform(database, action)
    assert everything(database) == before


def test_a_small_job_is_planned_scored_and_completed_in_one_step(database: Database) -> None:
    queue(database, "1")
    claim(database)
    with database.write() as connection:
        execution.complete_if_mine(
            connection, "1", 1, RESULT, {"notes": ["a note"]}, wall(9), only=scored(FIRST, failed=3)
        )
    at_once = get(database)
    in_one_step = everything(database)
    assert ends(database) == [("default", "completed", wall(9))]
    with database.write() as connection:
        requests.delete_if_not_running(connection, "1")
    run(database, "1", FIRST)
    commit(database, FIRST, failed=3)
    complete(database)
    assert at_once == get(database)
    assert in_one_step == everything(database)
    assert ends(database) == [("default", "completed", wall(9))]


def test_a_stale_attempt_completes_no_small_job(database: Database) -> None:
    queue(database, "1")
    claim(database)
    rescue(database, 100)
    assert claim(database, "w2", 101)
    before = everything(database)
    with database.write() as connection, pytest.raises(LeaseLost):
        execution.complete_if_mine(connection, "1", 1, RESULT, {}, wall(102), only=scored(FIRST))
    assert everything(database) == before


def test_a_job_that_is_released_or_rescued_after_a_cancel_request_has_its_event(database: Database) -> None:
    for job_id in ("released", "rescued"):
        queue(database, job_id)
        assert claim(database)
        with database.write() as connection:
            requests.request_cancel(connection, job_id, wall(3))
            if job_id == "released":
                execution.release_if_mine(connection, job_id, 1, wall(4))
    rescue(database, 100)
    assert ends(database, "released") == [("default", "cancelled", wall(4))]
    assert ends(database, "rescued") == [("default", "cancelled", wall(100))]


def test_a_job_that_lost_its_workers_again_and_again_has_its_event(database: Database) -> None:
    queue(database, "1")
    for second in (2, 102):
        assert claim(database, second=second)
        rescue(database, second + 50, crashes=2)
    assert ends(database) == [("default", "failed", wall(152))]


def test_a_job_that_ends_twice_has_two_events_and_no_id_is_given_twice(database: Database) -> None:
    bring_to(database, "failed")
    with database.write() as connection:
        requests.retry_if_stopped(connection, "1", wall(6))
        requests.request_cancel(connection, "1", wall(7))
    assert [state for _, state, _ in ends(database)] == ["failed", "cancelled"]
    with database.write() as connection:
        last = connection.execute(select(events.c.id).order_by(events.c.id.desc()).limit(1)).scalar_one()
        requests.delete_if_not_running(connection, "1")
    queue(database, "2")
    with database.write() as connection:
        requests.request_cancel(connection, "2", wall(8))
        assert connection.execute(select(events.c.id).where(events.c.job_id == "2")).scalar_one() > last


def test_events_are_forgotten_by_their_age_the_oldest_first(database: Database) -> None:
    for number in range(4):
        queue(database, str(number))
        with database.write() as connection:
            requests.request_cancel(connection, str(number), wall(10 * number))
    with database.write() as connection:
        assert forget_events(connection, wall(25), 2, wall(1000)) == 2
        assert forget_events(connection, wall(25), 2, wall(1000)) == 1
        assert forget_events(connection, wall(25), 2, wall(1000)) == 0
        assert forget_events(connection, wall(25), 2, wall(29)) == 1  # of a clock that was ahead
    assert [ends(database, str(number)) for number in range(4)] == [[], [], [], []]


def test_facts_about_the_chunks_are_merged() -> None:
    first = {"notes": ["a", "b"], "seconds": {"model": 1.5, "read": 1}, "kind": "x", "whole": False}
    second = {"notes": ["b", "c"], "seconds": {"model": 0.5}, "kind": "y", "whole": True, "more": 1}
    assert merge_facts(first, second) == {
        "notes": ["a", "b", "c"], "seconds": {"model": 2.0, "read": 1}, "kind": "y", "whole": True, "more": 1,
    }  # fmt: skip
    assert merge_facts(first) == first
    assert first["notes"] == ["a", "b"]


def test_two_jobs_read_one_input_which_is_referenced_until_both_have_released_it(database: Database) -> None:
    upload(database, "1")
    with database.write() as connection:
        requests.create_on_inputs_of(connection, "2", queries.get(connection, "1"), wall(1))
        assert queries.get(connection, "2").inputs == queries.get(connection, "1").inputs
        assert queries.get(connection, "2").state is JobState.UPLOADED
        assert requests.delete_if_not_running(connection, "1").inputs == ("inputs/1",)
        assert queries.named_inputs(connection, ["inputs/1", "inputs/2"]) == {"inputs/1"}
        over = {"ended_before": wall(0), "uploaded_before": wall(5), "now": wall(6)}
        (expired,) = expiry.expire_if_over(connection, ["2"], **over)
        assert expired.inputs == ("inputs/1",)
        assert queries.named_inputs(connection, ["inputs/1"]) == set()
        with pytest.raises(JobConflict, match="its input was removed"):
            requests.create_on_inputs_of(connection, "3", queries.get(connection, "2"), wall(7))
        gone = queries.get(connection, "2")
        requests.delete_if_not_running(connection, "2")
        with pytest.raises(JobNotFound):
            requests.create_on_inputs_of(connection, "3", gone, wall(8))


def test_several_inputs_are_read_as_they_were_given_and_borrowed_ones_stay_with_their_owner(
    database: Database,
) -> None:
    stored = (
        StoredInput("inputs/1", "csv", Dialect(";"), 150, "b" * 64, "a.csv"),
        StoredInput("lake/b", "parquet", owned=False),
        StoredInput("inputs/c", "csv"),
    )
    upload(database, "0")
    with database.write() as connection:
        requests.create(connection, "1", stored, model(connection), wall(0))
    assert (get(database).inputs, get(database).inputs_total) == (stored[:1], 3)
    assert get(database).dialect == Dialect(";")
    with database.write() as connection:
        assert queries.get_whole(connection, "1").inputs == stored
        assert queries.get_whole(connection, "0").inputs == get(database, "0").inputs
        assert [job.inputs_total for job in lists.list_page(connection)] == [3, 1]
        assert requests.delete_if_not_running(connection, "1").inputs == ("inputs/1", "inputs/c")


def test_a_transaction_that_loses_its_lease_is_undone_as_a_whole(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    before = everything(database)

    def commit_two() -> None:
        with database.write() as connection:
            plan.commit_chunk_if_mine(connection, "1", 1, scored(FIRST), 0.5)
            plan.commit_chunk_if_mine(connection, "1", 2, scored(SECOND), 0.9)

    with pytest.raises(LeaseLost):
        commit_two()
    assert everything(database) == before


# --- upload and predict ----------------------------------------------------------------------------------------------


def test_a_job_is_read_as_it_was_written(database: Database) -> None:
    upload(database, "1", "flowers.csv")
    job = get(database)
    assert (job.state, job.input.filename, job.dialect) == (JobState.UPLOADED, "flowers.csv", Dialect(";"))
    assert (job.input.key, job.input.bytes, job.input.format, job.options) == ("inputs/1", 150, "csv", None)
    assert enqueue(database, "1", metadata={"who": "Zoë"}, priority=3, run_after=wall(50), second=7)
    job = get(database)
    assert (job.options, job.metadata, job.priority) == (OPTIONS, {"who": "Zoë"}, 3)
    assert (job.run_after, job.queued_at, job.created_at) == (wall(50), wall(7), wall(0))
    assert job.model is not None
    assert (job.model.reference, job.model.signature) == ("iris@1", SIGNATURE)


def test_an_unknown_id_gives_no_job(database: Database) -> None:
    with pytest.raises(JobNotFound, match="'none'"):
        get(database, "none")


def test_an_equal_job_reuses_the_same_result(database: Database) -> None:
    run(database, "1", FIRST)
    commit(database, FIRST, failed=2)
    complete(database)
    queue(database, "2", second=20)
    with database.write() as connection:
        equal = queries.find_equal(connection, "r" * 64)
        assert equal is not None
        assert requests.complete_as_equal_if_queued(connection, "2", equal, wall(21))
    first, second = get(database, "1"), get(database, "2")
    assert second.reused_from == "1"
    assert second.result == RESULT
    assert (second.rows_ok, second.rows_failed, second.progress) == (8, 2, 1.0)
    assert second.notes == first.notes == ("a note",)
    with database.write() as connection:
        requests.delete_if_not_running(connection, "1")
        assert queries.named_results(connection, [RESULT.key]) == {RESULT.key}  # job 2 still needs the result
        requests.delete_if_not_running(connection, "2")
        assert queries.named_results(connection, [RESULT.key]) == set()


def test_only_the_result_of_a_completed_job_is_reused(database: Database) -> None:
    run(database, "1", FIRST)
    with database.write() as connection:
        assert queries.find_equal(connection, "r" * 64) is None
    commit(database, FIRST)
    complete(database)
    with database.write() as connection:
        assert queries.find_equal(connection, "r" * 64) is not None
        assert queries.find_equal(connection, "s" * 64) is None


# --- claiming --------------------------------------------------------------------------------------------------------


def test_jobs_are_claimed_by_priority_then_by_age(database: Database) -> None:
    queue(database, "late", second=3)
    queue(database, "early", second=1)
    queue(database, "urgent", second=5, priority=10)
    queue(database, "idle", second=0, priority=-1)
    queue(database, "same", second=1)
    claimed = [claim(database) for _ in range(6)]
    assert [job and job.id for job in claimed] == ["urgent", "early", "same", "late", "idle", None]


def test_a_job_waits_for_its_time(database: Database) -> None:
    queue(database, "1", run_after=wall(50))
    assert claim(database, second=49) is None
    job = claim(database, second=50)
    assert job is not None
    assert job.id == "1"


def test_a_claim_starts_an_attempt(database: Database) -> None:
    queue(database, "1")
    job = claim(database, "w1", 5)
    assert job is not None
    assert (job.state, job.attempt, job.worker, job.started_at) == (JobState.RUNNING, 1, "w1", wall(5))
    with database.read() as connection:
        (attempt,) = queries.attempts_of(connection, "1")
    assert (attempt.number, attempt.worker, attempt.started_at, attempt.outcome) == (1, "w1", wall(5), None)


def test_two_threads_never_claim_the_same_job(database: Database) -> None:
    names = [f"{number:03d}" for number in range(60)]
    for name in names:
        queue(database, name)

    def claim_until_none(worker: int) -> list[str]:
        claimed = []
        while job := claim(database, f"w{worker}"):
            claimed.append(job.id)
        return claimed

    with ThreadPoolExecutor(8) as pool:
        claimed = [name for names in pool.map(claim_until_none, range(8)) for name in names]
    assert sorted(claimed) == names


def test_two_processes_never_claim_the_same_job(database: Database) -> None:
    names = [f"{number:03d}" for number in range(40)]
    for name in names:
        queue(database, name)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        claimed = [name for names in pool.map(claim_all, [database.url] * 2, ["w1", "w2"]) for name in names]
    assert sorted(claimed) == names


# --- leases ----------------------------------------------------------------------------------------------------------


def test_a_lease_lasts_until_its_last_renewal_runs_out(database: Database) -> None:
    run(database)
    assert rescue(database, 2 + LEASE) == ([], [])
    with database.write() as connection:
        execution.renew_lease_if_mine(connection, "1", 1, LEASE, at(20))
    assert rescue(database, 20 + LEASE) == ([], [])
    assert rescue(database, 20.1 + LEASE) == (["1"], [])
    job = get(database)
    assert (job.state, job.worker) == (JobState.QUEUED, None)
    with database.read() as connection:
        (attempt,) = queries.attempts_of(connection, "1")
    assert (attempt.outcome, attempt.finished_at) == ("lost", wall(20.1 + LEASE))
    assert attempt.error == {"code": "worker-lost", "message": "lease lapsed"}


def test_a_lease_of_another_boot_has_lapsed(database: Database) -> None:
    """The steady clock starts again at each boot, so the lease would seem to last for days."""
    run(database)
    assert rescue(database, -400, clock="boot-2") == (["1"], [])


def test_a_wall_clock_that_jumps_changes_no_lease(database: Database) -> None:
    run(database)
    day = 86_400
    for jump in (-day, day):
        moment = Moment(at(3).wall + jump, at(3).steady, "boot-1")
        with database.write() as connection:
            assert execution.rescue_expired(connection, 3, moment) == ([], [])


def test_a_job_that_kills_its_workers_fails_after_three(database: Database) -> None:
    run(database, "1", FIRST)
    for number in (1, 2):
        assert rescue(database, 100 * number) == (["1"], [])
        assert claim(database, f"w{number + 1}", 100 * number + 1)
    assert rescue(database, 300) == ([], ["1"])
    job = get(database)
    assert (job.state, job.reason, job.finished_at) == (JobState.FAILED, "worker-crashed", wall(300))
    assert job.error is not None
    assert "3 workers" in job.error["message"]
    with database.read() as connection:
        assert [attempt.outcome for attempt in queries.attempts_of(connection, "1")] == ["lost"] * 3


def test_a_worker_that_finishes_a_chunk_resets_the_crashes_of_its_job(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    for number in (1, 2):
        rescue(database, 100 * number)
        claim(database, "w", 100 * number + 1)
    commit(database, FIRST, attempt=3)
    assert rescue(database, 300) == (["1"], [])
    assert claim(database, "w", 301)
    assert rescue(database, 400) == (["1"], [])


def test_a_released_job_is_due_at_once(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST)
    with database.write() as connection:
        execution.release_if_mine(connection, "1", 1, wall(5))
    job = claim(database, "w2", 5)
    assert job is not None
    assert (job.attempt, job.chunks_done, job.rows_done) == (2, 1, 10)
    with database.read() as connection:
        assert plan.pending_chunks(connection, "1") == [SECOND]
        assert [attempt.outcome for attempt in queries.attempts_of(connection, "1")] == ["released", None]


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancel_of_a_running_job_is_recorded_as_a_request(database: Database) -> None:
    run(database)
    run(database, "2")
    with database.write() as connection:
        job = requests.request_cancel(connection, "1", wall(5))
        assert requests.request_cancel(connection, "1", wall(6)) is None
        assert job is not None
        assert (job.state, job.cancel_requested_at) == (JobState.RUNNING, wall(5))
        assert queries.get(connection, "1") == job
    with database.read() as connection:
        assert execution.cancel_requests(connection, ["1", "2"]) == {"1"}
        assert execution.cancel_requests(connection, ["2"]) == set()
        assert execution.cancel_requests(connection, []) == set()


def test_a_cancel_request_outlives_the_worker_that_held_the_job(database: Database) -> None:
    """The job might not be claimed again for hours, and would seem to be queued."""
    for name, leave in [("1", "release"), ("2", "crash")]:
        run(database, name)
        with database.write() as connection:
            requests.request_cancel(connection, name, wall(5))
            if leave == "release":
                execution.release_if_mine(connection, name, 1, wall(6))
    assert rescue(database, 100) == ([], [])
    for name, outcome, second in [("1", "released", 6), ("2", "lost", 100)]:
        job = get(database, name)
        assert (job.state, job.finished_at) == (JobState.CANCELLED, wall(second))
        with database.read() as connection:
            assert [attempt.outcome for attempt in queries.attempts_of(connection, name)] == [outcome]


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_a_plan_grows_and_is_kept_in_order(database: Database) -> None:
    queue(database, "1")
    claim(database)
    with database.write() as connection:
        plan.add_chunks_if_mine(connection, "1", 1, [FIRST], complete=False)
        assert plan.last_chunk(connection, "1") == FIRST
        assert not queries.get(connection, "1").planned
        plan.add_chunks_if_mine(connection, "1", 1, [SECOND], complete=False)
        plan.add_chunks_if_mine(connection, "1", 1, [], complete=True)
    job = get(database)
    assert (job.planned, job.rows_planned, job.chunks_total) == (True, 15, 2)
    with database.read() as connection:
        assert plan.pending_chunks(connection, "1") == [FIRST, SECOND]
        assert plan.last_chunk(connection, "1") == SECOND
        assert plan.chunk_before(connection, "1", 10) == FIRST
        assert plan.chunk_before(connection, "1", 0) is None


def test_a_chunk_is_committed_once(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST, failed=3)
    before = everything(database)
    with pytest.raises(LeaseLost):
        commit(database, FIRST)
    assert everything(database) == before
    with database.read() as connection:
        assert plan.done_chunks(connection, "1") == [CommittedChunk(FIRST, 1, 1000, 3, 51, scored(FIRST).facts)]
        assert plan.pending_chunks(connection, "1") == [SECOND]
    job = get(database)
    assert (job.rows_ok, job.rows_failed, job.chunks_done) == (7, 3, 1)


def test_a_chunk_that_was_not_planned_is_not_committed(database: Database) -> None:
    run(database, "1", FIRST)
    before = everything(database)
    for chunk in (SECOND, Chunk(0, 9, 4, 100)):
        with pytest.raises(LeaseLost):
            commit(database, chunk)
    assert everything(database) == before


def test_each_write_of_an_attempt_may_be_repeated_and_counts_once(database: Database) -> None:
    """It is unknown whether a commit has happened when the connection is lost."""
    left, right = Chunk(0, 5, 4, 50), Chunk(5, 5, 50, 100)
    queue(database, "1")
    claim(database)

    def commit(connection: Connection, chunk: Chunk) -> None:
        plan.commit_chunk_if_mine(connection, "1", 1, scored(chunk), 0.5)

    def complete(connection: Connection) -> None:
        execution.complete_if_mine(connection, "1", 1, RESULT, {}, wall(9))

    writes: list[Callable[[Connection], object]] = [
        lambda connection: plan.add_chunks_if_mine(connection, "1", 1, [FIRST], complete=False),
        lambda connection: plan.add_chunks_if_mine(connection, "1", 1, [SECOND], complete=True),
        lambda connection: plan.split_chunk_if_mine(connection, "1", 1, FIRST, [left, right]),
        *(partial(commit, chunk=chunk) for chunk in (left, right, SECOND)),
        complete,
    ]
    for write in writes:
        with database.write() as connection:
            write(connection)
        state = everything(database), ends(database)
        with database.write() as connection:
            write(connection)
        assert (everything(database), ends(database)) == state
    job = get(database)
    assert (job.state, job.rows_ok, job.rows_planned, job.chunks_total) == (JobState.COMPLETED, 15, 15, 3)


def test_progress_never_goes_back(database: Database) -> None:
    third = Chunk(15, 1, 150, 160)
    run(database, "1", FIRST, SECOND, third)
    seen = []
    for chunk, progress in [(FIRST, 0.6), (SECOND, 0.2), (third, 0.7)]:
        commit(database, chunk, progress=progress)
        seen.append(get(database).progress)
    assert seen == [0.6, 0.6, 0.7]


def test_crashes_are_counted_for_each_chunk(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    with database.write() as connection:
        counts = [plan.count_crash_if_mine(connection, "1", 1, record) for record in (0, 0, 10, 0)]
    assert counts == [1, 2, 1, 3]


def test_the_halves_of_a_chunk_take_its_place_and_its_crashes(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    left, right = Chunk(0, 5, 4, 50), Chunk(5, 5, 50, 100)
    with database.write() as connection:
        plan.count_crash_if_mine(connection, "1", 1, 0)
        plan.count_crash_if_mine(connection, "1", 1, 0)
        plan.split_chunk_if_mine(connection, "1", 1, FIRST, [left, right])
        assert plan.pending_chunks(connection, "1") == [left, right, SECOND]
        assert [plan.count_crash_if_mine(connection, "1", 1, record) for record in (0, 5, 10)] == [3, 3, 1]
    with pytest.raises(LeaseLost):
        commit(database, FIRST)  # another process still scored the whole chunk
    job = get(database)
    assert (job.chunks_total, job.rows_planned) == (3, 15)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_job_completes_when_every_record_has_its_row(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST, failed=1)
    with pytest.raises(LeaseLost):
        complete(database)
    assert get(database).state == JobState.RUNNING
    commit(database, SECOND)
    complete(database)
    job = get(database)
    assert (job.state, job.progress, job.finished_at) == (JobState.COMPLETED, 1.0, wall(9))
    assert (job.rows_ok, job.rows_failed) == (14, 1)
    assert (job.result, job.notes) == (RESULT, ("a note",))
    with database.read() as connection:
        assert queries.attempts_of(connection, "1")[0].outcome == "completed"


@pytest.mark.parametrize("account", ["rows_ok = rows_ok - 1", "rows_failed = 1", "chunks_total = 2"])
def test_a_job_whose_counts_do_not_add_up_does_not_complete(database: Database, account: str) -> None:
    run(database, "1", FIRST)
    commit(database, FIRST)
    with database.write() as connection:
        connection.exec_driver_sql(f"UPDATE jobs SET {account}")  # noqa: S608 - from the list above
    with pytest.raises(LeaseLost):
        complete(database)


def test_a_job_without_a_complete_plan_does_not_complete(database: Database) -> None:
    queue(database, "1")
    claim(database)
    with database.write() as connection:
        plan.add_chunks_if_mine(connection, "1", 1, [FIRST], complete=False)
    commit(database, FIRST)
    with pytest.raises(LeaseLost):
        complete(database)


def test_a_failed_job_has_its_reason(database: Database) -> None:
    run(database)
    with database.write() as connection:
        execution.fail_if_mine(connection, "1", 1, OutOfMemory("too much", errors=[{"row": 3}], limit=7), wall(8))
    job = get(database)
    expected = {"code": "out-of-memory", "message": "too much", "limit": 7, "errors": [{"row": 3}]}
    assert (job.reason, job.error) == ("out-of-memory", expected)
    with database.read() as connection:
        (attempt,) = queries.attempts_of(connection, "1")
    assert (attempt.outcome, attempt.error, attempt.finished_at) == ("failed", expected, wall(8))


def test_a_retry_keeps_the_chunks_that_are_done(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST)
    with database.write() as connection:
        for _ in range(3):
            plan.count_crash_if_mine(connection, "1", 1, 10)
        execution.fail_if_mine(connection, "1", 1, OutOfMemory("too much"), wall(8))
        job = requests.retry_if_stopped(connection, "1", wall(20))
    assert (job.state, job.reason, job.error, job.finished_at) == (JobState.QUEUED, None, None, None)
    again = claim(database, "w2", 21)
    assert again is not None
    assert (again.attempt, again.started_at, again.rows_done) == (2, wall(2), 10)
    with database.write() as connection:
        assert plan.pending_chunks(connection, "1") == [SECOND]
        assert plan.count_crash_if_mine(connection, "1", 2, 10) == 1
        assert [attempt.outcome for attempt in queries.attempts_of(connection, "1")] == ["failed", None]


def test_a_job_whose_model_was_deleted_is_not_retried(database: Database) -> None:
    run(database)
    with database.write() as connection:
        execution.cancel_if_mine(connection, "1", 1, wall(8))
        registry.delete_if_unused(connection, model(connection), wall(9))
    with pytest.raises(JobConflict, match="iris@1 was deleted"), database.write() as connection:
        requests.retry_if_stopped(connection, "1", wall(10))


def test_failed_records_are_not_scored_again_when_the_model_was_deleted(database: Database) -> None:
    run(database, "1", FIRST)
    commit(database, FIRST, failed=2)
    complete(database)
    with database.write() as connection:
        registry.delete_if_unused(connection, model(connection), wall(10))
    before = everything(database)
    with pytest.raises(JobConflict, match="iris@1 was deleted"), database.write() as connection:
        requests.create_retry_of_failed_rows(connection, queries.get(connection, "1"), "2", wall(11))
    assert everything(database) == before


def test_a_job_that_is_completed_at_once_is_returned_as_it_is_read(database: Database) -> None:
    upload(database, "1")
    with database.write() as connection:
        done = complete_at_once(connection, model(connection))
    with database.read() as connection:
        assert done == (queries.get(connection, "1"), *queries.attempts_of(connection, "1"))
    assert ends(database) == [("default", "completed", wall(8))]


def test_a_job_is_not_queued_for_a_model_that_was_deleted_meanwhile(database: Database) -> None:
    upload(database, "1")
    with database.write() as connection:
        gone = registry.add(connection, "gone", "e" * 64, 1, SIGNATURE, {}, wall(0))
        registry.delete_if_unused(connection, gone, wall(1))
    request: dict[str, Any] = {"metadata": {}, "priority": 0, "run_after": None, "now": wall(2)}
    before = everything(database)
    with pytest.raises(ModelNotFound, match="gone@1 was deleted"), database.write() as connection:
        requests.enqueue_if_uploaded(connection, "1", gone, OPTIONS, "r" * 64, **request)
    assert everything(database) == before
    with database.write() as connection:
        assert complete_at_once(connection, gone) is None
    assert everything(database) == before
    assert enqueue(database, "1")
    with database.write() as connection:  # an earlier request remains valid, even if its model was deleted since
        assert requests.enqueue_if_uploaded(connection, "1", gone, OPTIONS, "r" * 64, **request) is False


def test_a_deleted_job_leaves_no_row(database: Database) -> None:
    run(database, "1", FIRST)
    with pytest.raises(JobConflict, match="cancel it"), database.write() as connection:
        requests.delete_if_not_running(connection, "1")
    with database.write() as connection:
        execution.cancel_if_mine(connection, "1", 1, wall(5))
        assert requests.delete_if_not_running(connection, "1").id == "1"
    assert everything(database) == [[], [], [], []]


# --- queries ---------------------------------------------------------------------------------------------------------


def page(database: Database, limit: int = 50, after: str | None = None, **wanted: Any) -> list[str]:
    with database.read() as connection:
        found = lists.list_page(connection, wanted=JobFilter(**wanted), after=after, limit=limit)
        return [job.id for job in found]


def test_pages_go_from_the_newest_to_the_oldest(database: Database) -> None:
    names = [f"{number:02d}" for number in range(7)]
    for name in names:
        upload(database, name)
    seen: list[str] = []
    while found := page(database, limit=3, after=seen[-1] if seen else None):
        seen += found
    assert seen == names[::-1]


def test_a_list_is_filtered_by_state_and_model(database: Database) -> None:
    for name in ("1", "2", "3"):
        queue(database, name)
    claim(database)
    with database.write() as connection:
        other = registry.add(connection, "wine", "e" * 64, 1, SIGNATURE, {}, wall(0))
        newer = registry.add(connection, "iris", "f" * 64, 1, SIGNATURE, {}, wall(0))
        connection.execute(update(job_rows).where(job_rows.c.id == "2").values(model_id=other.id))
        connection.execute(update(job_rows).where(job_rows.c.id == "3").values(model_id=newer.id))
    assert page(database, states=(JobState.RUNNING,)) == ["1"]
    assert page(database, states=(JobState.QUEUED,)) == ["3", "2"]
    assert page(database, states=(JobState.RUNNING, JobState.QUEUED)) == ["3", "2", "1"]
    assert page(database, model="iris") == ["3", "1"]
    assert page(database, model="iris@1") == ["1"]
    assert page(database, model="wine@1", states=(JobState.QUEUED,)) == ["2"]
    for unknown in ("none", "iris@9", "iris@x", f"iris@{10**30}"):
        assert page(database, model=unknown) == []


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("flowers", ["1"]),
        ("FLOWERS.csv", ["1"]),
        ("100%", ["2"]),
        ("%", ["2"]),
        ("a_b", ["3"]),
        ("_", ["3"]),
        ("/", ["4"]),
        ("Zoë", ["5"]),
        ("the end", ["6"]),
        ("\\", []),
        ("nowhere", []),
    ],
)
def test_a_search_finds_a_part_of_a_name_or_of_metadata(database: Database, search: str, found: list[str]) -> None:
    filenames = {"1": "flowers.csv", "2": "100% wool.csv", "3": "a_b.csv", "4": "a/b.csv", "5": "axb.csv", "6": None}
    metadata = {"5": {"who": "Zoë"}, "6": {"long": "x" * 500 + "the end"}}
    for name, filename in filenames.items():
        upload(database, name, filename)
        assert enqueue(database, name, metadata=metadata.get(name))
    assert page(database, search=search) == found


def test_the_queue_position_counts_the_jobs_ahead(database: Database) -> None:
    for name, second, priority in [("a", 1, 0), ("b", 1, 0), ("c", 2, 0), ("d", 9, 5), ("e", 0, -1)]:
        queue(database, name, second=second, priority=priority)
    with database.read() as connection:
        positions = {
            name: queries.queue_position(connection, queries.get(connection, name), wall(9)) for name in "abcde"
        }
    assert positions == {"d": 0, "a": 1, "b": 2, "c": 3, "e": 4}
    claimed = claim(database)
    assert claimed is not None
    with database.read() as connection:
        assert queries.queue_position(connection, claimed, wall(9)) is None
        assert queries.queue_position(connection, queries.get(connection, "a"), wall(9)) == 0


def test_a_job_that_is_not_due_is_ahead_of_no_other(database: Database) -> None:
    queue(database, "1", second=1, run_after=wall(100), priority=9)
    queue(database, "2", second=2)
    with database.read() as connection:
        second = queries.get(connection, "2")
        assert queries.queue_position(connection, second, wall(99)) == 0
        assert queries.queue_position(connection, second, wall(100)) == 1


def test_jobs_and_rows_are_counted(database: Database) -> None:
    with database.read() as connection:
        assert queries.count_by_state(connection) == {}
        assert totals.count_all(connection).rows_ok == 0
        assert queries.longest_wait(connection, wall(1)) == 0.0
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST, failed=4)
    queue(database, "2", second=7)
    queue(database, "3", second=6)
    with database.read() as connection:
        assert queries.count_by_state(connection) == {"running": 1, "queued": 2}
        assert (totals.count_all(connection).rows_ok, totals.count_all(connection).rows_failed) == (6, 4)
        assert queries.longest_wait(connection, wall(10)) == 4.0


def test_the_wait_of_a_job_begins_when_it_is_due(database: Database) -> None:
    def waited(second: float) -> float:
        with database.read() as connection:
            return queries.longest_wait(connection, wall(second))

    queue(database, "1", second=1, run_after=wall(100))
    assert (waited(99), waited(103)) == (0.0, 3.0)
    assert claim(database, second=103) is not None
    assert waited(104) == 0.0
    with database.write() as connection:
        execution.release_if_mine(connection, "1", 1, wall(110))
    assert waited(112) == 2.0  # since it was released
    queue(database, "2", second=105)
    assert waited(112) == 7.0


def test_an_attempt_records_the_progress_before_it(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST, failed=3)
    with database.write() as connection:
        execution.release_if_mine(connection, "1", 1, wall(5))
    claim(database, "w2", 6)
    with database.read() as connection:
        assert [attempt.rows_before for attempt in queries.attempts_of(connection, "1")] == [0, 10]


def test_referenced_results_are_distinguished_from_others(database: Database) -> None:
    run(database, "1", FIRST)
    commit(database, FIRST, failed=1)
    with database.write() as connection:
        result = Result("results/1-1", 9, "a" * 64, "results/1-1.errors", 5)
        execution.complete_if_mine(connection, "1", 1, result, {}, wall(9))
        asked = ["results/1-1", "results/1-1.errors", "results/1-2", "results/1-2.errors", "results/2-1"]
        assert queries.named_results(connection, asked) == {"results/1-1", "results/1-1.errors"}
        assert queries.named_results(connection, []) == set()


# --- the counters of the service ---


def counted(database: Database) -> tuple[dict[str, int], int, int]:
    """Ends of jobs without those that never happened, and scored and failed rows."""
    with database.read() as connection:
        found = totals.count_all(connection)
    return {outcome: count for outcome, count in found.ended.items() if count}, found.rows_ok, found.rows_failed


def test_a_job_counts_once_also_when_it_has_expired_and_was_deleted(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST, failed=4)
    assert counted(database) == ({}, 6, 4)
    commit(database, SECOND)
    complete(database)
    expected = ({"completed": 1}, 11, 4)
    assert counted(database) == expected
    over = {"ended_before": wall(50), "uploaded_before": wall(50)}
    with database.write() as connection:
        assert expiry.expire_if_over(connection, ["1"], **over, now=wall(60))
    assert counted(database) == expected
    with database.write() as connection:
        assert expiry.delete_expired_before(connection, wall(70), 9) == 1
    assert counted(database) == expected


def test_an_upload_that_expires_is_no_end_of_a_job(database: Database) -> None:
    upload(database, "1")
    with database.write() as connection:
        over = {"ended_before": wall(50), "uploaded_before": wall(50)}
        assert expiry.expire_if_over(connection, ["1"], **over, now=wall(60))
    assert counted(database) == ({}, 0, 0)


def test_each_end_of_a_job_that_is_retried_counts(database: Database) -> None:
    run(database, "1", FIRST, SECOND)
    commit(database, FIRST)
    with database.write() as connection:
        execution.fail_if_mine(connection, "1", 1, OutOfMemory("too much"), wall(4))
    with database.write() as connection:
        requests.retry_if_stopped(connection, "1", wall(5))
    assert counted(database) == ({"failed": 1}, 10, 0)
    with database.write() as connection:
        requests.request_cancel(connection, "1", wall(6))
    assert counted(database) == ({"failed": 1, "cancelled": 1}, 10, 0)
    with database.write() as connection:
        requests.delete_if_not_running(connection, "1")
    assert counted(database) == ({"failed": 1, "cancelled": 1}, 10, 0)


def test_a_retry_that_is_refused_counts_for_nothing(database: Database) -> None:
    run(database, "1", FIRST)
    commit(database, FIRST)
    complete(database)
    with pytest.raises(JobConflict), database.write() as connection:
        requests.retry_if_stopped(connection, "1", wall(20))
    assert counted(database) == ({"completed": 1}, 10, 0)


def test_a_damaged_job_that_is_removed_keeps_what_it_has_counted_for(database: Database) -> None:
    run(database, "1", FIRST)
    commit(database, FIRST, failed=1)
    complete(database)
    with database.write() as connection:
        assert requests.remove_whatever_its_state(connection, "1") is not None
        assert requests.remove_whatever_its_state(connection, "1") is None
    assert counted(database) == ({"completed": 1}, 9, 1)


def test_what_removed_jobs_have_counted_for_is_summed_up(database: Database) -> None:
    with database.write() as connection:
        for _ in range(400):
            totals.add(connection, {"failed": 1, "rows_ok": 2**40, "rows_failed": 0})
    assert counted(database) == ({"failed": 400}, 400 * 2**40, 0)
    while True:
        with database.write() as connection:
            more = totals.fold(connection)
        assert counted(database) == ({"failed": 400}, 400 * 2**40, 0)
        if not more:
            break
    with database.read() as connection:
        assert len(connection.execute(select(total_rows)).all()) <= 4


# --- the requests of a job -------------------------------------------------------------------------------------------

SPANS = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 5)]


def asked(database: Database, job_id: str = "1") -> tuple[str | None, str | None, str | None]:
    job = get(database, job_id)
    return job.upload_traceparent, job.request_id, job.traceparent


def upload_and_enqueue(database: Database) -> None:
    with database.write() as connection:
        stored = StoredInput("inputs/1", "csv", Dialect(";"), 150, "b" * 64)
        requests.create(connection, "1", [stored], model(connection), wall(0), traceparent=SPANS[0])
        by = Correlation("predict", SPANS[1])
        values: dict[str, Any] = {"metadata": {}, "priority": 0, "run_after": None, "now": wall(1), "asked_by": by}
        assert requests.enqueue_if_uploaded(connection, "1", model(connection), OPTIONS, "r" * 64, **values)


def test_a_job_names_the_request_that_queued_it_until_it_is_retried(database: Database) -> None:
    upload_and_enqueue(database)
    assert asked(database) == (SPANS[0], "predict", SPANS[1])
    job = claim(database)
    assert job is not None
    assert (job.upload_traceparent, job.request_id, job.traceparent) == (SPANS[0], "predict", SPANS[1])
    assert rescue(database, 100) == (["1"], [])
    assert asked(database) == (SPANS[0], "predict", SPANS[1])
    claim(database, second=101)
    with database.write() as connection:
        assert execution.request_ids(connection, ["1", "none"]) == {"1": "predict"}
        assert execution.request_ids(connection, []) == {}
        execution.fail_if_mine(connection, "1", 2, OutOfMemory("too much"), wall(102))
        requests.retry_if_stopped(connection, "1", wall(103), Correlation("retry", SPANS[2]))
    assert asked(database) == (SPANS[0], "retry", SPANS[2])


def test_a_job_on_the_input_of_another_has_its_upload_and_a_request_of_its_own(database: Database) -> None:
    upload_and_enqueue(database)
    with database.write() as connection:
        requests.create_on_inputs_of(connection, "2", queries.get(connection, "1"), wall(2))
    assert asked(database, "2") == (SPANS[0], None, None)
    claim(database)
    with database.write() as connection:
        plan.add_chunks_if_mine(connection, "1", 1, [FIRST], complete=True)
    commit(database, FIRST, failed=1)
    complete(database)
    with database.write() as connection:
        by = Correlation("retry", SPANS[3])
        requests.create_retry_of_failed_rows(connection, queries.get(connection, "1"), "3", wall(11), by)
    assert asked(database, "3") == (SPANS[0], "retry", SPANS[3])
    assert asked(database, "1") == (SPANS[0], "predict", SPANS[1])
