"""A schedule and a webhook of the service: each tick queues its job once, each end of a job arrives under one ID."""

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
from receivers import Received, Receiver, receiving
from standardwebhooks import Webhook, WebhookVerificationError

from chaos import history
from chaos.audit import Job, Verdict
from chaos.inputs import Input

SCHEDULE = "every-minute"
INPUT = Input(seed=2026, records=300, format="csv", faulty=True)
"""What each tick scores."""
_LATEST = 10.0
"""Seconds within which a tick that is due is in the history of the schedule."""
_ENDED = ("completed", "failed", "cancelled", "expired")
Tick = dict[str, Any]


def settings(inputs: Path) -> dict[str, str]:
    """Those of a service that reads inputs in this folder, and sends webhooks to this host."""
    return {
        "BATCHSERVE_INPUT_PREFIXES": json.dumps({"default": [f"{inputs.as_uri()}/"]}),
        "BATCHSERVE_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "BATCHSERVE_WEBHOOK_TIMEOUT": "2",
    }


class Nightly:
    """The schedule and the webhook of a service."""

    def __init__(self, url: str, inputs: Path, model: str, receiver: Receiver) -> None:
        self._url, self._receiver = url, receiver
        folder = inputs / SCHEDULE
        folder.mkdir()
        (folder / "input.csv").write_bytes(INPUT.body())
        request = {
            "model": model,
            "input": {"urls": [f"{folder.as_uri()}/*.csv"]},
            "metadata": {"token": "{schedule} {date} {time}"},
            "reuse": False,
        }
        schedule = {"name": SCHEDULE, "cron": "* * * * *", "request": request, "catch_up": "all", "overlap": "queue"}
        self._created = time.time()
        self._post("/v1/schedules", schedule)
        made = self._post("/v1/webhooks", {"url": receiver.url, "events": ["job.*"]})
        self._webhook, self._verifier = made["id"], Webhook(made["secret"])
        receiver.behaviour = self._receive
        self._random, self._seen, self._forged = random.Random(made["id"]), set[str](), 0

    def wait(self, seconds: float, verdict: Verdict, meanwhile: Callable[[], None]) -> None:
        """Waits until all ticks have queued their jobs; no further one runs then."""
        self._wait(f"/v1/schedules/{SCHEDULE}/ticks", "ticks", seconds, verdict, meanwhile)
        self._paused = time.time()
        self._post(f"/v1/schedules/{SCHEDULE}/pause", {})

    def wait_for_deliveries(self, seconds: float, verdict: Verdict, meanwhile: Callable[[], None]) -> None:
        self._wait(f"/v1/webhooks/{self._webhook}/deliveries", "deliveries", seconds, verdict, meanwhile)

    def audit_ticks(self, path: Path, verdict: Verdict) -> dict[str, tuple[str, Input]]:
        """The jobs of the ticks, each with the name of its tick and its input."""
        ticks = {tick["id"]: tick for tick in self._listed(f"/v1/schedules/{SCHEDULE}/ticks", "ticks")}
        for event in history.events(path):
            if event["event"] == "ran":
                verdict.expect(event["tick"] in ticks, f"tick {event['tick']} was acknowledged and is not there")
        self._check_times([tick for tick in ticks.values() if tick["kind"] != "run"], verdict)
        jobs: dict[str, tuple[str, Input]] = {}
        for number, tick in ticks.items():
            if (tick["error"] or {}).get("code") == "paused":
                continue
            verdict.ticks += 1
            verdict.expect(tick["state"] == "queued", f"tick {number} is {tick['state']}: {tick['error']}")
            verdict.expect(tick["jobs_total"] > 0, f"tick {number} has queued no job")
            if tick["jobs_total"] > 1:
                verdict.double(f"tick {number} has queued {tick['jobs_total']} jobs", tick["jobs_total"] - 1)
            for job in tick["jobs"]:
                verdict.expect(job["state"] == "completed", f"the job of tick {number} is {job['state']}")
                if job["id"] in jobs:
                    verdict.double(f"job {job['id']} is of {jobs[job['id']][0]} and of tick {number}")
                jobs[job["id"]] = f"tick {number}", INPUT
        return jobs

    def audit_events(self, jobs: dict[str, Job], verdict: Verdict) -> None:
        """Every end of a job has arrived, and each under one ID."""
        ids: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for received in list(self._receiver.requests):
            event = received.event
            ids[event["data"]["id"], event["type"]].add(received.id)
        for (job_id, kind), found in ids.items():
            if len(found) > 1:
                verdict.double(f"{kind} of job {job_id} has arrived as {sorted(found)}", len(found) - 1)
        for job_id, job in jobs.items():
            if job["state"] in _ENDED:
                arrived = (job_id, f"job.{job['state']}") in ids
                verdict.expect(arrived, f"job {job_id} is {job['state']}, and no webhook has said so")
        verdict.expect(not self._forged, f"{self._forged} webhooks have no right signature")
        given_up = self._listed(f"/v1/webhooks/{self._webhook}/deliveries", "deliveries", state="given-up")
        for delivery in given_up:
            verdict.lose(f"delivery {delivery['id']} of {delivery['event']} was given up")
        verdict.events, verdict.requests = sum(map(len, ids.values())), len(self._receiver.requests)

    def _receive(self, received: Received) -> int:
        """Every tenth event is refused when it arrives first, and taken when it is sent again."""
        try:
            self._verifier.verify(received.body, dict(received.headers))
        except WebhookVerificationError:
            self._forged += 1
            return 401
        is_new = received.id not in self._seen
        self._seen.add(received.id)
        return 503 if is_new and self._random.random() < 0.1 else 204

    def _check_times(self, ticks: list[Tick], verdict: Verdict) -> None:
        """Each minute has one tick."""
        times = [int(datetime.fromisoformat(tick["at"]).timestamp()) for tick in ticks]
        if len(times) > len(set(times)):
            verdict.double("two ticks are for the same minute", len(times) - len(set(times)))
        first = int(self._created // 60 + 1) * 60
        for minute in range(first, int(self._paused - _LATEST) + 1, 60):
            verdict.expect(minute in times, f"{datetime.fromtimestamp(minute, UTC)} has no tick")

    def _wait(self, path: str, kind: str, seconds: float, verdict: Verdict, meanwhile: Callable[[], None]) -> None:
        """Waits until nothing of this is pending; what is pending too long is stuck."""
        deadline = time.monotonic() + seconds
        while pending := list(self._listed(path, kind, state="pending")):
            if time.monotonic() > deadline:
                verdict.stuck += len(pending)
                verdict.sentences += [f"stuck: of the {kind} {one}" for one in pending]
                return
            meanwhile()
            time.sleep(0.5)

    def _listed(self, path: str, kind: str, **query: str) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            params = {"limit": "200", **query, **after}
            page = httpx2.get(self._url + path, params=params, timeout=60).raise_for_status().json()
            yield from page[kind]
            if page["next"] is None:
                return
            after = {"after": str(page["next"])}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = httpx2.post(self._url + path, json=body, timeout=60).raise_for_status().json()
        return answer


@contextmanager
def nightly(url: str, inputs: Path | None, model: str) -> Iterator[Nightly | None]:
    """None where the service shares no folder with its clients."""
    if inputs is None:
        yield None
        return
    with receiving() as receiver:
        yield Nightly(url, inputs, model, receiver)
