"""Sends cases to a site, follows their jobs to the end, and records the findings."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import judge
from fuzz.case import Case, Step
from fuzz.site import TENANTS, Site
from fuzz.wire import Answer, send

FOLLOWED = 8.0
"""Seconds that a case waits for its job; after that, it is checked again at the end of the run."""
_ID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NUMBER = re.compile(r"\d+|'[^']*'|\"[^\"]*\"|\[[^]]*\]")
KEPT_OF_EACH = 3


@dataclass
class Found:
    """All findings of a run: counted by class, the first of each class kept as files."""

    folder: Path
    seed: int
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, answer: Answer) -> None:
        with self._lock:
            self.statuses[answer.status] += 1

    def add(self, sentence: str, case: Case | None = None, at: str = "") -> None:
        fault = f"{at}: {_NUMBER.sub('_', sentence.partition(chr(10))[0])[:160]}"
        with self._lock:
            self.faults[fault] += 1
            number = self.faults[fault]
            self.examples.setdefault(fault, sentence)
            if number > KEPT_OF_EACH:
                return
            name = f"{len(self.faults):03}-{number}-{re.sub('[^a-z0-9]+', '-', fault.lower())[:60]}"
        if case is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.json").write_text(
                json.dumps({"seed": self.seed, "finding": sentence, "case": json.loads(case.to_json())}, indent=1)
            )


@dataclass
class Player:
    site: Site
    found: Found
    owners: dict[bytes, str] = field(default_factory=dict)
    """The acknowledged jobs and their tenants."""
    waiting: list[tuple[Case, str, str, bytes]] = field(default_factory=list)
    """The cases with unfinished jobs, with the tenant and the sent bytes."""

    def play(self, case: Case) -> list[Answer]:
        self.found.kinds[case.kind] += 1
        job, answers = "", []
        mine: dict[str, tuple[str, bytes]] = {}
        for step in case.steps:
            if "{job}" in step.target and not job:
                continue
            answer = self.send(case, step, job)
            answers.append(answer)
            if (made := self._job_of(step, answer)) is not None:
                mine.setdefault(made, (step.tenant, step.body))
                job = made
        if case.claim is not None and case.steps[-1].target.startswith("/v1/models/"):
            for sentence in judge.of_online(case.claim, answers[-1]):
                self.found.add(sentence, case, f"online {_class(case)}")
        elif case.claim is not None and not job and not case.claim.refusable and answers[-1].status not in (0, 503):
            self.found.add(f"refused, and it is good: {answers[-1].body[:300]!r}", case, _class(case))
        for made, (tenant, sent) in mine.items():
            self._follow(case, made, tenant, sent, FOLLOWED)
        return answers

    def send(self, case: Case, step: Step, job: str) -> Answer:
        answer = send(step, self.site.port, self.site.keys, job)
        self.found.count(answer)
        at = f"{step.method[:10]} {_route(step.target)}" if not step.raw else "raw"
        sentences = list(judge.of_answer(step, answer))
        if sentences and not self.site.runs:
            sentences = ["the server has died"]
        for sentence in sentences:
            self.found.add(sentence, case, at)
        if step.tenant in TENANTS and answer.status in range(200, 300):
            self._find_strangers(case, step.tenant, answer, at)
        return answer

    def _job_of(self, step: Step, answer: Answer) -> str | None:
        """The job in a response, if there is one."""
        if answer.status not in (200, 201, 202) or step.method != "POST" or step.tenant not in TENANTS:
            return None
        body = judge.parsed(answer.body)
        if not isinstance(body, dict) or not isinstance(body.get("id"), str):
            return None
        self.owners[body["id"].encode()] = step.tenant
        return str(body["id"])

    def _find_strangers(self, case: Case, tenant: str, answer: Answer, at: str) -> None:
        for job in set(_ID.findall(answer.body[: 2**20])):
            if self.owners.get(job, tenant) != tenant:
                self.found.add(f"{tenant} sees the job {job.decode()} of {self.owners[job]}", case, at)

    def _follow(self, case: Case, job: str, tenant: str, sent: bytes, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        wait = 0
        while True:
            answer = self.send(case, Step("GET", f"/v1/jobs/{job}?wait={wait}", tenant=tenant), job)
            wait = 2  # the first response shows whether there is a job to wait for
            if answer.status == 404:
                return  # it was deleted by the case
            read = judge.parsed(answer.body)
            if answer.status != 200 or not isinstance(read, dict):
                return
            if read["state"] in judge.ENDED:
                self._judge_job(case, read, tenant, sent)
                return
            if read["state"] == "uploaded":
                return
            if time.monotonic() > deadline or is_for_later(read):
                self.waiting.append((case, job, tenant, sent))
                return

    def _judge_job(self, case: Case, job: Mapping[str, Any], tenant: str, sent: bytes) -> None:
        self.found.ends[str((job["error"] or {}).get("code") if job["state"] == "failed" else job["state"])] += 1
        result = errors = None
        if job["state"] == "completed":
            links = job["links"]
            result = self.send(case, Step("GET", links["result"], tenant=tenant), job["id"])
            errors = self.send(case, Step("GET", links["errors"], tenant=tenant), job["id"])
            stored = self.send(case, Step("GET", links["input"], tenant=tenant), job["id"])
            sent = stored.body if stored.status == 200 else b""
        for sentence in judge.of_job(case, job, sent, result, errors):
            self.found.add(sentence, case, _class(case))

    def finish(self, seconds: float) -> None:
        """After the last case every job must end; delayed jobs are cancelled."""
        waiting, self.waiting = self.waiting, []
        for case, job, tenant, _ in waiting:
            read = judge.parsed(self.send(case, Step("GET", f"/v1/jobs/{job}", tenant=tenant), job).body)
            if isinstance(read, dict) and is_for_later(read):
                self.send(case, Step("POST", f"/v1/jobs/{job}/cancel", tenant=tenant, must=(202, 404)), job)
        deadline = time.monotonic() + seconds
        for case, job, tenant, sent in waiting:
            self._follow(case, job, tenant, sent, max(1.0, deadline - time.monotonic()))
        for case, job, *_ in self.waiting:
            self.found.add(f"the job {job} does not end", case, f"stuck {case.kind}")


def is_for_later(job: Mapping[str, Any]) -> bool:
    """Whether the job waits for its `run_after`."""
    return job.get("state") == "queued" and (job.get("options") or {}).get("run_after") is not None


def _class(case: Case) -> str:
    """The class of a case: the text before the colon of its note."""
    return f"{case.kind} {case.note.partition(':')[0]}".strip()


def _route(target: str) -> str:
    path = target.partition("?")[0]
    path = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "{job}", path)
    return re.sub(r"(?<=/v1/models/)[^/]+", "{name}", path)[:60]
