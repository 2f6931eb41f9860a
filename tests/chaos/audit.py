"""The end of a run: everything acknowledged is compared with the stored data."""

import base64
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import orjson

from chaos import history
from chaos.inputs import Input

Job = dict[str, Any]


@dataclass
class Verdict:
    """The counts of faults, each with a sentence, and the counts of what was checked."""

    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    stuck: int = 0
    records: int = 0
    ticks: int = 0
    events: int = 0
    requests: int = 0
    """By which events arrived, some of them more than once."""
    states: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    sentences: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.duplicated or self.stuck)

    def lose(self, sentence: str, count: int = 1) -> None:
        self.lost += count
        self.sentences.append(f"lost: {sentence}")

    def double(self, sentence: str, count: int = 1) -> None:
        self.duplicated += count
        self.sentences.append(f"duplicated: {sentence}")

    def expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.lose(sentence)


def wait_for_all(url: str, seconds: float, verdict: Verdict, meanwhile: Callable[[], None]) -> None:
    """Waits for the jobs to end; those that do not end in time are stuck."""
    deadline = time.monotonic() + seconds
    while waiting := [job["id"] for state in ("queued", "running") for job in listed(url, state=state)]:
        if time.monotonic() > deadline:
            verdict.stuck += len(waiting)
            verdict.sentences += [f"stuck: {job_id}" for job_id in waiting]
            return
        meanwhile()
        time.sleep(0.5)


def listed(url: str, **query: str) -> Iterator[Job]:
    after: dict[str, str] = {}
    while True:
        page = (
            httpx2.get(f"{url}/v1/jobs", params={"limit": 200, **query, **after}, timeout=60).raise_for_status().json()
        )
        yield from page["jobs"]
        if page["next"] is None:
            return
        after = {"after": page["next"]}


@dataclass
class Told:
    """The entries of the history about one job."""

    token: str
    events: set[str] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)


def audit(url: str, path: Path, verdict: Verdict, others: Mapping[str, tuple[str, Input]]) -> dict[str, Job]:
    """Compares every line of the history with every job of the service, and returns these. `others`: jobs that no
    client has submitted, each with a token of its own and its input."""
    inputs, told = _read_history(path, verdict)
    inputs |= dict(others.values())
    found = {job["id"]: job for job in listed(url)}
    tokens = {job_id: others[job_id][0] if job_id in others else _token(job) for job_id, job in found.items()}
    jobs_of: defaultdict[str, list[str]] = defaultdict(list)
    for job_id, token in tokens.items():
        jobs_of[token].append(job_id)
    for token, job_ids in jobs_of.items():
        verdict.expect(token in inputs, f"job {job_ids[0]} was submitted by no client")
        if len(job_ids) > 1:
            verdict.double(f"{token} made the jobs {job_ids}", len(job_ids) - 1)
    for job_id, known in told.items():
        _check_acknowledged(job_id, known, found.get(job_id), verdict)
    with httpx2.Client(base_url=url, timeout=60) as http:
        for job_id, job in found.items():
            verdict.states[job["state"]] += 1
            verdict.attempts += job["attempt"]
            if input := inputs.get(tokens[job_id]):
                _check_content(http, job, input, told[job_id].digests if job_id in told else set(), verdict)
    return found


def _token(job: Job) -> str:
    """What names the input of a job: its file name, or what its client has noted on a job that reads in place."""
    return str(job["metadata"].get("token") or job["input"]["filename"])


def _read_history(path: Path, verdict: Verdict) -> tuple[dict[str, Input], dict[str, Told]]:
    """The inputs that were sent, by token, and the responses about each job."""
    inputs: dict[str, Input] = {}
    told: dict[str, Told] = {}
    for event in history.events(path):
        name = event["event"]
        verdict.acknowledged += name in history.ACKNOWLEDGED
        if name == "tried":
            inputs[event["token"]] = Input(**event["input"])
        elif name == "unexpected":
            verdict.lose(f"{event['call']} was answered with {event['status']}: {event['answer']}")
        elif name != "ran":
            known = told.setdefault(event["job"], Told(event.get("token", "")))
            known.events.add(name)
            if name == "read":
                known.digests.add(event["sha256"])
    return inputs, told


def _check_acknowledged(job_id: str, known: Told, job: Job | None, verdict: Verdict) -> None:
    if job is None:
        verdict.expect("deleting" in known.events, f"job {job_id} was acknowledged and is not there")
        return
    state = job["state"]
    verdict.expect("deleted" not in known.events, f"job {job_id} was deleted and is there")
    verdict.expect(_token(job) == known.token, f"job {job_id} has the input of another")
    if "queued" in known.events:
        verdict.expect(state != "uploaded", f"job {job_id} was queued and is {state}")
    if known.digests:
        verdict.expect(state == "completed", f"the result of job {job_id} was read and it is {state}")
    if "retried" in known.events:
        verdict.expect(state in ("completed", "queued", "running"), f"job {job_id} was retried and is {state}")
    if state in ("failed", "expired"):
        verdict.lose(f"job {job_id} is {state}: {job['error']}")
    if state == "cancelled":
        verdict.expect("cancelling" in known.events, f"job {job_id} was cancelled by no client")


def _check_content(http: httpx2.Client, job: Job, input: Input, digests: set[str], verdict: Verdict) -> None:
    """Checks the bytes of a job: its input as it was sent; its result complete, correct, and the same each time."""
    job_id = job["id"]
    if job["input"]["url"] is None:  # one that is kept by the service
        stored = http.get(f"/v1/download/{job_id}/input").raise_for_status().content
        verdict.expect(stored == input.body(), f"the input of job {job_id} has changed")
    if job["state"] != "completed":
        return
    answers = [http.get(f"/v1/download/{job_id}").raise_for_status() for _ in range(2)]
    content = answers[0].content
    digest = sha256(content).digest()
    expected = f"sha-256=:{base64.b64encode(digest).decode()}:"
    same = all(answer.headers["repr-digest"] == expected and answer.content == content for answer in answers)
    verdict.expect(
        same and digests <= {digest.hex()} and job["result"]["sha256"] == digest.hex(),
        f"the result of job {job_id} has changed",
    )
    rows = {
        "total": input.records,
        "ok": input.records - len(input.faulty_records),
        "failed": len(input.faulty_records),
    }
    verdict.expect(job["rows"] == rows, f"job {job_id} counts {job['rows']}, expected {rows}")
    findings = input.compare(content)
    if findings.lost:
        verdict.lose(f"{findings.lost} records of job {job_id} are missing or wrong", findings.lost)
    if findings.duplicated:
        verdict.double(f"{findings.duplicated} records of job {job_id} are there twice", findings.duplicated)
    errors = http.get(f"/v1/download/{job_id}/errors").raise_for_status().content.splitlines()
    named = [orjson.loads(line)["record"] for line in errors]
    verdict.expect(sorted(named) == sorted(input.faulty_records), f"the errors of job {job_id} name other records")
    verdict.records += input.records


def check_database(database: Path, verdict: Verdict) -> None:
    with closing(sqlite3.connect(database)) as connection:
        for check in ("integrity_check", "foreign_key_check"):
            rows = connection.execute(f"PRAGMA {check}").fetchall()
            verdict.expect(rows in ([("ok",)], []), f"{check} says {rows}")
