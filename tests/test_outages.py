"""An outage of the storage delays jobs and ends none. The outage is of the storage itself: worker, database and the
functions of scoring processes are the real ones."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import graphs
import pytest
from bench import Bench, HandWorker, answers, doubled, opened, rows_of
from hand import HandCall, HandEngine
from remote import RemoteStorage
from service import Api, problem, running

from batchserve import runtime
from batchserve.domain import JobState, ModelVersion
from batchserve.errors import InsufficientStorage, ScoringCrashed, Unavailable
from batchserve.scoring import inputs
from batchserve.scoring.assembly import assemble_result
from batchserve.scoring.planning import halve_chunk, plan_chunks
from batchserve.scoring.small import score_small

RECORDS = range(30)
OUTAGES = [
    pytest.param(Unavailable("the storage does not respond"), id="no answer"),
    pytest.param(OSError(errno.ESTALE, os.strerror(errno.ESTALE)), id="a share whose server is gone"),
    pytest.param(OSError(errno.EIO, os.strerror(errno.EIO)), id="a disk that fails"),
]


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    with opened(database_url, tmp_path / "store", HandEngine(), chunk_records=10, inline_bytes=0) as bench:
        yield bench


@pytest.fixture
def busy(bench: Bench) -> ModelVersion:
    return bench.register("busy", graphs.busy())


@pytest.fixture
def storage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteStorage]:
    """The storage of scoring, which a test can take away."""
    made = RemoteStorage(bench.runtime.settings.storage)
    monkeypatch.setattr(inputs, "open_storage", lambda _address: made)
    inputs.storage_at.cache_clear()
    inputs.header_of.cache_clear()
    yield made
    inputs.storage_at.cache_clear()
    inputs.header_of.cache_clear()


def calls_of(hand: HandWorker, function: object) -> list[HandCall]:
    """Runs calls until some of a function are handed out."""
    for _ in range(20):
        calls = hand.calls()
        if any(call.function is function for call in calls):
            return calls
        for call in calls:
            call.run()
    raise AssertionError("no such call is handed out")


def pause(hand: HandWorker) -> tuple[float, list[HandCall]]:
    """Seconds without a call, and the calls after them."""
    began = hand.clock.passed
    assert hand.calls() == []
    while not (calls := hand.calls()):
        pass
    return hand.clock.passed - began, calls


@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.parametrize("function", [score_small, plan_chunks, assemble_result])
def test_a_job_waits_in_any_of_its_steps_while_the_storage_is_away(
    bench: Bench, busy: ModelVersion, storage: RemoteStorage, function: object, outage: Exception
) -> None:
    hand = bench.by_hand(chunk_records=5)
    job_id = bench.submit(busy, rows_of(*RECORDS))
    calls = calls_of(hand, function)
    storage.outage = outage
    for call in calls:
        call.run()
    seconds, calls = pause(hand)
    assert 4.0 <= seconds <= 6.0
    job = bench.get(job_id)
    assert (job.state, job.reason) == (JobState.RUNNING, "unavailable")
    storage.outage = None
    hand.work(*calls)
    job = bench.get(job_id)
    assert (job.state, job.reason, job.attempt) == (JobState.COMPLETED, None, 1)
    assert answers(bench.result(job_id)) == doubled(*RECORDS)
    assert bench.outcomes(job_id) == ["completed"]


@pytest.mark.parametrize("outage", OUTAGES)
def test_chunks_that_meet_an_outage_are_put_back(
    bench: Bench, busy: ModelVersion, storage: RemoteStorage, outage: Exception
) -> None:
    hand = bench.by_hand(chunk_records=5)
    job_id = bench.submit(busy, rows_of(*RECORDS))
    done, *missed = hand.chunks()
    done.run()
    storage.outage = outage
    for call in missed:
        call.run()
    _, again = pause(hand)
    assert {call.first_record for call in missed} <= {call.first_record for call in again}
    assert done.first_record not in {call.first_record for call in again}
    storage.outage = None
    hand.work(*again)
    assert answers(bench.result(job_id)) == doubled(*RECORDS)
    assert bench.get(job_id).attempt == 1


def test_a_chunk_that_is_to_be_halved_waits_as_well(bench: Bench, busy: ModelVersion, storage: RemoteStorage) -> None:
    hand = bench.by_hand(chunk_records=10, crashes=2)
    job_id = bench.submit(busy, rows_of(*RECORDS))
    for call in hand.chunks():
        if call.first_record == 0:
            call.fail(ScoringCrashed("the process died"))
        else:
            call.run()
    calls = calls_of(hand, halve_chunk)
    storage.outage = Unavailable("the storage does not respond")
    for call in calls:
        call.run()
    _, calls = pause(hand)
    storage.outage = None
    hand.work(*calls)
    assert answers(bench.result(job_id)) == doubled(*RECORDS)


def test_the_pauses_grow_up_to_a_limit_however_long_the_outage(
    bench: Bench, busy: ModelVersion, storage: RemoteStorage
) -> None:
    hand = bench.by_hand(chunk_records=5, rescue=2.0)
    job_id = bench.submit(busy, rows_of(*RECORDS))
    calls, storage.outage = hand.chunks(), Unavailable("the storage does not respond")
    pauses = []
    for _ in range(40):
        for call in calls:
            call.run()
        seconds, calls = pause(hand)
        hand.worker.leases.renew()
        pauses.append(seconds)
    for found, expected in zip(pauses, [2.0, 4.0, 8.0, *[12.0] * 37], strict=True):
        assert expected - 1.0 <= found <= expected + 1.0
    storage.outage = None
    hand.work(*calls)
    assert bench.outcomes(job_id) == ["completed"]
    job_id = bench.submit(busy, rows_of(*RECORDS))
    calls, storage.outage = hand.chunks(), Unavailable("the storage does not respond")
    for call in calls:
        call.run()
    assert pause(hand)[0] <= 3.0, "it begins anew"


def test_a_job_that_waits_can_be_cancelled_and_released(
    bench: Bench, busy: ModelVersion, storage: RemoteStorage
) -> None:
    hand = bench.by_hand(chunk_records=5)
    released, cancelled = (bench.submit(busy, rows_of(*RECORDS)) for _ in range(2))
    hand.worker.turn()
    storage.outage = Unavailable("the storage does not respond")
    while bench.get(cancelled).reason is None or bench.get(released).reason is None:
        for call in hand.calls():
            call.run()
    bench.cancel(cancelled)
    for _ in range(3):
        for call in hand.calls():
            call.run()
    hand.stop()
    job = bench.get(cancelled)
    assert (job.state, job.reason) == (JobState.CANCELLED, None)
    job = bench.get(released)
    assert (job.state, job.reason, bench.outcomes(released)) == (JobState.QUEUED, None, ["released"])


def test_a_full_storage_is_told_from_one_that_is_away(
    bench: Bench, busy: ModelVersion, storage: RemoteStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    hand = bench.by_hand(chunk_records=5)
    job_id = bench.submit(busy, rows_of(*RECORDS))
    calls, storage.outage = hand.chunks(), InsufficientStorage("the storage is full")
    for call in calls:
        call.run()
    _, calls = pause(hand)
    assert bench.get(job_id).reason == "insufficient-storage"
    storage.outage = None
    hand.work(*calls)
    said = capsys.readouterr()
    assert "Job waits: the storage is full" in said.out + said.err
    assert "Job continues" in said.out + said.err


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[RemoteStorage]:
    """The storages that a service opens."""
    made: list[RemoteStorage] = []

    def remember(address: str) -> RemoteStorage:
        made.append(RemoteStorage(address))
        return made[-1]

    monkeypatch.setattr(runtime, "open_storage", remember)
    return made


@pytest.mark.parametrize("outage", OUTAGES)
def test_requests_get_a_503_while_the_storage_is_away_and_leave_nothing(
    tmp_path: Path, iris_onnx: Path, iris_csv: Path, reached: list[RemoteStorage], outage: Exception
) -> None:
    with running(tmp_path, worker=False, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        kept = api.upload(iris_csv.read_bytes())
        before = api.stored()
        (storage,) = reached
        storage.outage = outage
        _require_503(api, kept)
        storage.outage = None
        assert api.http.get("/readyz").status_code == 200
        assert api.stored() == before
        assert api.http.get(kept["links"]["input"]).content == iris_csv.read_bytes()


def _require_503(api: Api, kept: dict[str, dict[str, str]]) -> None:
    for answer in (
        api.http.post("/v1/upload", content=b"a,b\n1,2\n"),
        api.http.put("/v1/models/other", content=b"onnx"),
        api.http.get(kept["links"]["input"]),
    ):
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"]
    ready = api.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert "the storage does not respond" in ready.json()["checks"]["storage"]
