"""The worker turn by turn: each test controls its clock and the ends of its calls, so nothing waits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphs
import pytest
from bench import Bench, HandWorker, answers, doubled, opened, rows_of
from hand import HandCall, HandEngine
from sqlalchemy import update

from batchserve import idempotency
from batchserve.db.connect import Moment
from batchserve.db.tables import jobs as job_rows
from batchserve.domain import JobState, ModelVersion
from batchserve.errors import InsufficientStorage, ScoringCrashed, ScoringTimeout
from batchserve.jobs import execution, plan
from batchserve.scoring.small import score_small
from batchserve.storage import input_key


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    with opened(database_url, tmp_path / "store", HandEngine(), chunk_records=10) as bench:
        yield bench


@pytest.fixture
def busy(bench: Bench) -> ModelVersion:
    return bench.register("busy", graphs.busy())


def scored(calls: list[HandCall]) -> int:
    return sum(call.first_record is not None for call in calls)


def crash(hand: HandWorker, error: Exception, *, at: int) -> None:
    """Makes the call for the chunk that begins at this record fail; the others run."""
    for call in hand.chunks():
        if call.first_record == at:
            call.fail(error)
        else:
            call.run()


# --- turns ---


def test_a_small_job_does_not_wait_for_a_huge_one(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    huge = bench.submit(busy, rows_of(*range(60)))
    under_way = hand.chunks()
    small = bench.submit(busy, rows_of(1))
    hand.worker.wake()
    hand.worker.turn()  # consumes the wake-up
    assert any(call.function is score_small and call.urgent for call in hand.calls())
    assert bench.get(huge).chunks_done == 0
    assert under_way
    assert bench.get(small).state is JobState.RUNNING


def test_jobs_take_turns_chunk_by_chunk(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    first, second = bench.submit(busy, rows_of(*range(20))), bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    for _ in range(4):
        for call in calls:
            call.run()
        calls = hand.calls()
    done = [bench.get(job_id).chunks_done for job_id in (first, second)]
    assert sum(done) >= 8
    assert abs(done[0] - done[1]) <= 2


def test_no_more_calls_are_under_way_than_keep_the_engine_busy(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    bench.submit(busy, rows_of(*range(20)))
    assert scored(hand.chunks()) == 2 * hand.engine.capacity
    assert scored(hand.calls()) == 0


def test_the_calls_under_way_follow_the_capacity_of_the_engine(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    planning = [call for call in calls if call.first_record is None]
    hand.engine.capacity = 5
    for call in planning:
        call.run()
    more = hand.chunks()
    assert scored(calls) + scored(more) == 10
    hand.engine.capacity = 0
    for call in calls + more:
        if call not in planning:
            call.run()
    assert scored(hand.calls()) == 0
    done = bench.get(job_id)
    assert (done.state, done.chunks_done) == (JobState.RUNNING, 10)
    hand.engine.capacity = 1
    hand.work()
    assert bench.get(job_id).state is JobState.COMPLETED


def test_a_worker_whose_engine_has_no_process_takes_no_job(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand()
    hand.engine.capacity = 0
    job_id = bench.submit(busy, rows_of(1))
    assert hand.calls() == []
    assert bench.get(job_id).state is JobState.QUEUED
    hand.engine.capacity = 1
    hand.work()
    assert bench.get(job_id).state is JobState.COMPLETED


def test_jobs_go_to_other_workers_when_the_engine_had_no_process_for_as_long_as_a_lease(
    bench: Bench, busy: ModelVersion
) -> None:
    hand = bench.by_hand(chunk_records=1, lease=60.0)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    hand.engine.capacity = 0
    hand.clock.advance(50.0)
    hand.calls()
    hand.worker.leases.renew()
    assert bench.get(job_id).state is JobState.RUNNING
    hand.clock.advance(20.0)
    hand.calls()
    assert bench.get(job_id).state is JobState.QUEUED
    assert all(call.future.cancelled() for call in calls)
    assert bench.outcomes(job_id) == ["released"]


def test_progress_grows_and_ends_at_one(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(40)))
    seen, calls = [], hand.calls()
    while not bench.get(job_id).state.finished:
        for call in calls:
            call.run()
        calls = hand.calls()
        seen.append(bench.get(job_id).progress)
    assert seen == sorted(seen)
    assert len({progress for progress in seen if 0 < progress < 1}) >= 5
    assert seen[-1] == 1.0
    assert hand.notified == [job_id]


# --- crashes ---


def test_a_poisonous_record_fails_its_job_after_three_tries_and_no_other(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand()
    poisoned = bench.submit(busy, rows_of(*range(30)))
    slow = ScoringTimeout("scoring took longer than 1 s and was stopped")
    crash(hand, slow, at=10)
    crash(hand, slow, at=10)
    for call in hand.calls():
        call.run()  # halves the chunk
    crash(hand, slow, at=10)
    hand.worker.turn()
    job = bench.get(poisoned)
    assert (job.state, job.reason, job.attempt) == (JobState.FAILED, "scoring-timeout", 1)
    assert job.error is not None
    assert "this was try 3 at records 10 to 14" in job.error["message"]
    with bench.database.read() as connection:
        left = [(chunk.first_record, chunk.records) for chunk in plan.pending_chunks(connection, poisoned)]
        committed = plan.done_chunks(connection, poisoned)
    done = [(one.chunk.first_record, one.chunk.records) for one in committed]
    assert (10, 5) in left
    assert sorted(left + done) == [(0, 10), (10, 5), (15, 5), (20, 10)]
    assert (0, 10) in done
    other = bench.submit(busy, rows_of(*range(25)))
    hand.work()
    assert answers(bench.result(other)) == doubled(*range(25))


def test_a_scoring_process_that_dies_costs_one_try(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(8)))
    crash(hand, ScoringCrashed("the scoring process died"), at=0)
    hand.work()
    assert answers(bench.result(job_id)) == doubled(*range(8))
    assert bench.get(job_id).attempt == 1


def test_planning_that_dies_is_retried(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand()
    job_id = bench.submit(busy, rows_of(*range(30)))
    (planning,) = hand.calls()
    planning.fail(ScoringCrashed("the scoring process died"))
    hand.work()
    assert answers(bench.result(job_id)) == doubled(*range(30))


# --- cancelling ---


def test_a_running_job_is_cancelled_and_keeps_its_finished_chunks(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    bench.cancel(job_id)
    hand.worker.wake()
    assert hand.calls() == []
    for call in calls:
        call.run()
    hand.worker.turn()
    hand.worker.turn()
    job = bench.get(job_id)
    assert (job.state, bench.outcomes(job_id)) == (JobState.CANCELLED, ["cancelled"])
    assert job.chunks_done == len(bench.parts(job_id)) == scored(calls)


def test_a_chunk_that_does_not_end_is_killed_by_a_cancel_after_its_grace(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1, cancel_grace=5.0)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    bench.cancel(job_id)
    hand.worker.wake()
    hand.worker.turn()
    asked = hand.clock.passed
    while bench.get(job_id).state is not JobState.CANCELLED:
        hand.worker.turn()
    assert 5.0 < hand.clock.passed - asked < 7.5
    assert all(call.future.cancelled() for call in calls)


# --- stopping and resuming ---


def test_another_worker_continues_where_one_stopped(bench: Bench, busy: ModelVersion) -> None:
    undisturbed = bench.submit(busy, rows_of(*range(40)))
    bench.by_hand(chunk_records=2).work()
    stopped = bench.submit(busy, rows_of(*range(40)))
    first = bench.by_hand(chunk_records=2)
    for call in first.chunks():
        call.run()
    first.worker.turn()
    first.stop()
    released = bench.get(stopped)
    assert (released.state, released.worker) == (JobState.QUEUED, None)
    assert 3 <= released.chunks_done < 20
    kept = bench.parts(stopped)
    assert len(kept) == released.chunks_done
    with bench.database.read() as connection:
        done = plan.done_chunks(connection, stopped)
    bench.by_hand(chunk_records=7).work()  # the chunks stay as they were planned
    with bench.database.read() as connection:
        whole = plan.done_chunks(connection, stopped)
    assert whole[: len(done)] == done
    assert {one.attempt for one in whole} == {1, 2}
    assert bench.result(stopped) == bench.result(undisturbed)
    assert (bench.get(stopped).attempt, bench.outcomes(stopped)) == (2, ["released", "completed"])
    assert answers(bench.result(stopped)) == doubled(*range(40))


def test_a_worker_that_stops_kills_what_outlasts_its_grace(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1, grace=10.0)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    began = hand.clock.passed
    hand.stop()
    assert hand.clock.passed - began == pytest.approx(10.0)
    assert all(call.future.cancelled() for call in calls)
    assert bench.get(job_id).state == JobState.QUEUED


def test_a_worker_that_stops_waits_no_longer_than_its_chunks(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1, grace=10.0)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    for call in calls:
        call.run()
    began = hand.clock.passed
    hand.stop()
    assert hand.clock.passed == began
    assert (bench.get(job_id).state, bench.get(job_id).chunks_done) == (JobState.QUEUED, scored(calls))


def test_a_cancelled_job_of_a_worker_that_stops_is_not_queued_again(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    hand.chunks()
    bench.cancel(job_id)
    hand.stop()
    assert bench.get(job_id).state == JobState.CANCELLED


# --- leases ---


def test_a_worker_that_lost_its_lease_writes_nothing_more(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    with bench.database.write() as connection:  # as another worker would, after a rescue
        moment = bench.database.moment(connection)
        taken = update(job_rows).where(job_rows.c.id == job_id)
        connection.execute(
            taken.values(attempt=2, worker="another", lease_until=moment.steady + 6000, lease_clock=moment.clock)
        )
    before = bench.get(job_id)
    first, second, *others = calls
    first.run()
    hand.worker.turn()
    assert all(call.future.cancelled() for call in (second, *others))
    other = bench.submit(busy, rows_of(1))
    hand.work()
    assert bench.get(job_id) == before
    assert answers(bench.result(other)) == doubled(1)


def test_a_lease_that_another_attempt_has_ends_the_run_at_the_next_heartbeat(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    with bench.database.write() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job_id).values(attempt=2, worker="another"))
    hand.worker.leases.renew()
    hand.worker.turn()
    assert all(call.future.cancelled() for call in calls)


def test_a_worker_whose_own_leases_lapse_resumes_its_jobs(
    bench: Bench, busy: ModelVersion, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could not reach the database for a while, so its heartbeat is too late."""
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    for call in hand.chunks():
        call.run()
    hand.worker.turn()
    hand.clock.advance(61.0)
    hand.work()
    assert answers(bench.result(job_id)) == doubled(*range(20))
    assert bench.outcomes(job_id) == ["lost", "completed"]
    assert "worker_error" not in capsys.readouterr().out


def test_a_lease_that_is_renewed_does_not_lapse(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    for _ in range(5):
        hand.clock.advance(40.0)
        hand.worker.leases.renew()
    hand.work(*calls)
    assert bench.outcomes(job_id) == ["completed"]


def test_a_heartbeat_that_fails_is_retried(bench: Bench, busy: ModelVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's disk is full for a moment. The lease lasts for several heartbeats."""
    hand = bench.by_hand(chunk_records=1)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()

    def full(*_: Any) -> None:
        raise InsufficientStorage("the database's disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(execution, "renew_lease_if_mine", full)
        hand.clock.advance(40.0)
        hand.worker.leases.renew()
    hand.worker.leases.renew()
    hand.clock.advance(40.0)
    hand.work(*calls)
    assert (bench.get(job_id).state, bench.outcomes(job_id)) == (JobState.COMPLETED, ["completed"])


def test_a_job_of_a_dead_worker_is_resumed_when_its_lease_has_lapsed(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(rescue=5.0)
    job_id = bench.submit(busy, rows_of(*range(30)))
    with bench.database.write() as connection:
        execution.claim_due(connection, "dead", 60.0, hand.clock.moment(connection), 1)
    while hand.clock.passed < 55.0:
        assert hand.calls() == []
    while not (calls := hand.calls()):
        assert hand.clock.passed < 70.0
    hand.work(*calls)
    assert bench.outcomes(job_id) == ["lost", "completed"]
    assert answers(bench.result(job_id)) == doubled(*range(30))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # the clock of a server knows no boots
def test_a_job_of_an_earlier_boot_is_resumed_at_once(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand()
    job_id = bench.submit(busy, rows_of(1))
    with bench.database.write() as connection:
        now = bench.database.moment(connection)
        execution.claim_due(connection, "dead", 3600.0, Moment(now.wall, now.steady, "an earlier boot"), 1)
    hand.work()
    job = bench.get(job_id)
    assert (job.state, job.attempt) == (JobState.COMPLETED, 2)


# --- a full disk ---


def test_a_job_waits_while_the_disk_is_full(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(chunk_records=1, rescue=5.0)
    job_id = bench.submit(busy, rows_of(*range(20)))
    calls = hand.chunks()
    for call in calls:
        call.fail(InsufficientStorage("the disk is full"))
    assert hand.calls() == []
    began = hand.clock.passed
    while not (calls := hand.calls()):
        assert bench.get(job_id).state is JobState.RUNNING
    assert 4.0 <= hand.clock.passed - began <= 6.0
    hand.work(*calls)
    assert answers(bench.result(job_id)) == doubled(*range(20))
    assert bench.get(job_id).attempt == 1


# --- housekeeping ---


def test_an_idempotency_key_is_forgotten_after_its_hours(bench: Bench) -> None:
    hand = bench.by_hand(idempotency_hours=1.0, rescue=5.0)
    hand.worker.turn()
    with bench.database.write() as connection:
        idempotency.remember(connection, "old", "content", "job", 201, hand.clock.moment(connection).wall)
        hand.clock.advance(1800.0)
        idempotency.remember(connection, "young", "content", "job", 201, hand.clock.moment(connection).wall)
    hand.clock.advance(1850.0)
    hand.worker.turn()
    with bench.database.read() as connection:
        known = [key for key in ("old", "young") if idempotency.recall(connection, key, "content")]
    assert known == ["young"]


def test_orphans_are_swept_when_they_are_old_and_inputs_stay(bench: Bench, busy: ModelVersion) -> None:
    hand = bench.by_hand(sweep_age=3600.0)
    kept = bench.submit(busy, rows_of(1))
    with bench.storage.create("uploads/orphan") as writer:
        writer.write(b"of no job")
        writer.commit()
    hand.worker.housekeeper.tidy()
    assert list(bench.storage.list("uploads/"))
    hand.clock.advance(3700.0)
    hand.worker.housekeeper.tidy()
    assert not list(bench.storage.list("uploads/"))
    assert bench.read(input_key(kept)) == rows_of(1)
