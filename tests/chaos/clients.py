"""Clients that submit, run a schedule, wait, cancel, delete and download, and record all responses in the history."""

import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import orjson

from chaos.history import History
from chaos.inputs import FORMATS, Input
from chaos.nightly import SCHEDULE

MODEL = "busy"
COMMON = [Input(seed, 300, format, faulty=True) for seed, format in enumerate(FORMATS)]
"""Inputs that several clients send, so that their jobs share a result."""
_UNFINISHED = ("uploaded", "queued", "running")


class GaveUp(Exception):
    """The run has ended, or it is unknown whether a request without an Idempotency-Key was received."""


class Client:
    """Submits one job after the other until `stopping`, each in a random way."""

    def __init__(
        self, number: int, seed: int, url: str, inputs: Path | None, history: History, stopping: threading.Event
    ) -> None:
        self.thread = threading.Thread(target=self._run, name=f"client-{number}", daemon=True)
        self._random = random.Random(f"{seed}-{number}")
        self._number = number
        self._inputs = inputs
        self._history = history
        self._stopping = stopping
        self._http = httpx2.Client(base_url=url, timeout=20.0)
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            with self._http:
                while not self._stopping.is_set():
                    try:
                        self._one_job()
                    except GaveUp:
                        continue
        except BaseException as error:  # noqa: BLE001 - reported at the end of the run
            self.error = error

    def _one_job(self) -> None:
        ways = [self._submit_in_one_call, self._submit_in_two_calls]
        if self._inputs is not None:
            if self._random.random() < 0.1:
                return self._run_schedule()
            ways.append(self._submit_in_place)
        job_id = self._random.choice(ways)(self._new_input())
        match self._random.choices(("wait", "leave", "cancel", "delete", "cancel and retry"), (10, 3, 2, 2, 1))[0]:
            case "wait":
                self._read(job_id)
            case "cancel":
                self._pause()
                self._cancel(job_id)
            case "cancel and retry":
                self._cancel(job_id)
                self._retry(job_id)
            case "delete":
                self._read(job_id)
                self._delete(job_id)
        return None

    def _new_input(self) -> Input:
        if self._random.random() < 0.1:
            return self._random.choice(COMMON)
        small = self._random.random() < 0.7
        return Input(
            seed=self._random.randrange(2**32),
            records=self._random.randint(2, 400) if small else self._random.randint(5_000, 40_000),
            format=self._random.choice(FORMATS),
            faulty=self._random.random() < 0.3,
        )

    # --- calls ---

    def _submit_in_one_call(self, input: Input) -> str:
        token, key = self._try(input, "one call")
        params = {"model": MODEL, "filename": token, "reuse": input in COMMON}
        job_id = self._post("/v1/predict", key, content=input.body(), params=params, expected=(200, 202))["id"]
        self._history.tell("queued", token=token, job=job_id)
        return str(job_id)

    def _submit_in_two_calls(self, input: Input) -> str:
        """Three, with the download."""
        token, key = self._try(input, "three calls")
        job = self._post("/v1/upload", key, content=input.body(), params={"filename": token}, expected=(201,))
        job_id = str(job["id"])
        self._history.tell("stored", token=token, job=job_id)
        # Needs no key, because it may be repeated as it is.
        params = {"model": MODEL, "reuse": input in COMMON}
        self._answer("POST", f"/v1/predict/{job_id}", params=params, expected=(200, 202))
        self._history.tell("queued", token=token, job=job_id)
        return job_id

    def _submit_in_place(self, input: Input) -> str:
        """Of several files in a folder that the service reads."""
        assert self._inputs is not None
        token, key = self._try(input, "in place")
        folder = self._inputs / token
        folder.mkdir()
        for number, part in enumerate(input.parts(self._random.randint(1, min(4, input.records // 2)))):
            (folder / f"{number}.{input.format}").write_bytes(part)
        body = {
            "input": {"urls": [f"{folder.as_uri()}/*"]},
            "model": MODEL,
            "metadata": {"token": token},
            "reuse": input in COMMON,
        }
        job_id = self._post("/v1/jobs", key, json=body, expected=(200, 202))["id"]
        self._history.tell("queued", token=token, job=job_id)
        return str(job_id)

    def _run_schedule(self) -> None:
        key = str(uuid.UUID(int=self._random.getrandbits(128)))
        tick = self._post(f"/v1/schedules/{SCHEDULE}/run", key, json={}, expected=(202,))
        self._history.tell("ran", tick=tick["id"])

    def _try(self, input: Input, way: str) -> tuple[str, str | None]:
        token = f"{self._number}-{uuid.UUID(int=self._random.getrandbits(128))}"
        key = token if self._random.random() < 0.8 else None
        self._history.tell("tried", token=token, way=way, key=key is not None, input=asdict(input))
        return token, key

    def _read(self, job_id: str) -> None:
        """Waits for the end of a job and downloads its result."""
        job: Mapping[str, Any] = {"state": "queued"}
        while job["state"] in _UNFINISHED:
            if self._stopping.is_set():
                raise GaveUp
            job = self._answer("GET", f"/v1/jobs/{job_id}", params={"wait": 5}).json()
        if job["state"] == "completed":
            answer = self._answer("GET", f"/v1/download/{job_id}")
            self._history.tell("read", job=job_id, sha256=sha256(answer.content).hexdigest())

    def _cancel(self, job_id: str) -> None:
        self._history.tell("cancelling", job=job_id)
        self._answer("POST", f"/v1/jobs/{job_id}/cancel", expected=(202,))
        self._history.tell("cancelled", job=job_id)

    def _retry(self, job_id: str) -> None:
        """Retries a job. A 409 means that it was completed before the cancel, or is still running."""
        key = {"Idempotency-Key": str(uuid.UUID(int=self._random.getrandbits(128)))}
        answer = self._answer("POST", f"/v1/jobs/{job_id}/retry", headers=key, expected=(202, 409))
        if answer.status_code == 202:
            self._history.tell("retried", job=job_id)

    def _delete(self, job_id: str) -> None:
        """Deletes a job. A 404 means that the response to an earlier try was lost."""
        self._history.tell("deleting", job=job_id)
        self._answer("DELETE", f"/v1/jobs/{job_id}", expected=(204, 404))
        self._history.tell("deleted", job=job_id)

    def _post(self, path: str, key: str | None, **request: Any) -> Mapping[str, Any]:
        """With a key, every third response is discarded and the request repeated."""
        if key is not None:
            request["headers"] = {"Idempotency-Key": key}
            if self._random.random() < 0.33:
                self._answer("POST", path, **request)
        body: Mapping[str, Any] = self._answer("POST", path, repeatable=key is not None, **request).json()
        return body

    def _answer(
        self, method: str, path: str, *, expected: tuple[int, ...] = (200,), repeatable: bool = True, **request: Any
    ) -> httpx2.Response:
        """The answer to a request, which is repeated until it is there. One that is not expected goes to the history,
        and ends this job."""
        while True:
            try:
                answer = self._http.request(method, path, **request)
            except httpx2.TransportError:
                if not repeatable:
                    raise GaveUp from None
            else:
                if answer.status_code in expected:
                    return answer
                if not _asks_to_come_back(answer):
                    self._history.tell(
                        "unexpected", call=f"{method} {path}", status=answer.status_code, answer=answer.text[:500]
                    )
                    raise GaveUp
            if self._stopping.is_set():
                raise GaveUp
            time.sleep(self._random.uniform(0.05, 0.3))

    def _pause(self) -> None:
        self._stopping.wait(self._random.uniform(0.0, 1.0))


def _asks_to_come_back(answer: httpx2.Response) -> bool:
    """Whether it is a 503, or a 409 while a request with the same key is in progress."""
    return answer.status_code == 503 or (
        answer.status_code == 409 and orjson.loads(answer.content).get("code") == "idempotency-in-progress"
    )


def run_clients(
    count: int,
    seed: int,
    url: str,
    inputs: Path | None,
    history: History,
    seconds: float,
    meanwhile: Callable[[float], None],
) -> None:
    """Runs clients for a while. `inputs`: a folder that the service reads, if there is one. Raises the exception of a
    client that failed."""
    stopping = threading.Event()
    clients = [Client(number, seed, url, inputs, history, stopping) for number in range(count)]
    for client in clients:
        client.thread.start()
    try:
        meanwhile(seconds)
    finally:
        stopping.set()
        for client in clients:
            client.thread.join(60.0)
    for client in clients:
        if client.error is not None:
            raise client.error
        assert not client.thread.is_alive(), f"{client.thread.name} did not end"
