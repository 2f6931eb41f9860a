"""Schedules over HTTP, in Python, on the command line and on pages, with real jobs."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from commands import in_this_process
from pages import shown
from service import Api, ok, problem, running
from sqlalchemy import update
from waiting import until

from batchserve import AsyncClient, Client, keys
from batchserve.access import EVERY_TENANT, Scope
from batchserve.db import tables
from batchserve.db.connect import Database
from batchserve.errors import Conflict, InvalidOptions, ScheduleNotFound

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
FLOWER = "5.1,3.5,1.4,0.2\n"
NEVER = "0 0 29 2 *"
UNKNOWN = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"


@dataclass(frozen=True)
class Site:
    """A service with a model, and two folders that it may read and write in place."""

    api: Api
    inputs: Path
    outputs: Path

    def fill(self, day: str, *counts: int) -> None:
        """A file for each of these counts of flowers, in the folder of a day."""
        folder = self.inputs / day
        folder.mkdir(parents=True)
        for number, count in enumerate(counts):
            (folder / f"part-{number}.csv").write_text(HEADER + FLOWER * count)

    def request(self, place: str = "{date}", **fields: Any) -> dict[str, Any]:
        return {"model": "iris", "input": {"urls": [f"{self.inputs.as_uri()}/{place}/*.csv"]}, **fields}

    def body(self, name: str, request: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """A schedule that does not run by itself during the test."""
        return {"name": name, "cron": NEVER, "request": self.request() if request is None else request, **fields}

    def create(self, name: str, request: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        made: dict[str, Any] = ok(self.api.http.post("/v1/schedules", json=self.body(name, request, **fields)), 201)
        return made

    def run(self, name: str, moment: str | None = None) -> dict[str, Any]:
        body = None if moment is None else {"at": moment}
        tick: dict[str, Any] = ok(self.api.http.post(f"/v1/schedules/{name}/run", json=body), 202)
        return tick

    def ticks(self, name: str, **query: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ok(self.api.http.get(f"/v1/schedules/{name}/ticks", params=query))["ticks"]
        return found

    def make_due(self, schedule_id: str) -> float:
        """Moves the next tick to the last whole minute, as if it had just come. Returns that time."""
        with closing(Database(self.api.settings.database_url)) as database, database.write() as connection:
            due = database.moment(connection).wall // 60 * 60
            moved = update(tables.schedules).where(tables.schedules.c.id == schedule_id)
            connection.execute(moved.values(next_at=due))
        self.api.http.app.state.scheduler.look()  # type: ignore[attr-defined]
        return due


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("schedules")
    inputs, outputs = folder / "in", folder / "out"
    inputs.mkdir()
    outputs.mkdir()
    places: dict[str, Any] = {
        "input_prefixes": {"*": [f"{inputs.as_uri()}/"]},
        "output_prefixes": {"*": [f"{outputs.as_uri()}/"]},
    }
    with running(folder / "storage", **places) as api:
        api.register("iris", iris_onnx)
        yield Site(api, inputs, outputs)


# --- definition ------------------------------------------------------------------------------------------------------


def test_a_schedule_is_created_with_its_next_five_times(site: Site) -> None:
    body = {"name": "first", "cron": " 30  2 * * * ", "time_zone": "Europe/Zurich", "request": site.request()}
    answer = site.api.http.post("/v1/schedules", json=body)
    made = ok(answer, 201)
    assert answer.headers["location"] == made["links"]["self"]
    assert (made["cron"], made["meaning"], made["paused"], made["last"]) == (
        "30 2 * * *", "At 02:30 every day", False, None,
    )  # fmt: skip
    assert (made["action"], made["catch_up"], made["catch_up_limit"], made["overlap"]) == ("job", "last", 100, "skip")
    times = [datetime.fromisoformat(moment) for moment in made["next"]]
    assert len(times) == 5
    assert all(moment.strftime("%H:%M") in ("02:30", "03:00") for moment in times)
    assert all(later - earlier <= timedelta(hours=25) for earlier, later in pairwise(times))
    assert times[0] > datetime.now(UTC)
    for reference in (made["id"], "first"):
        assert ok(site.api.http.get(f"/v1/schedules/{reference}")) == made
    assert made in ok(site.api.http.get("/v1/schedules"))["schedules"]


def test_an_equal_schedule_is_the_same_and_another_of_the_name_is_refused(site: Site) -> None:
    made = site.create("equal")
    assert ok(site.api.http.post("/v1/schedules", json=site.body("equal"))) == made
    refused = site.api.http.post("/v1/schedules", json=site.body("equal", overlap="queue"))
    assert "'equal' already exists" in problem(refused, 409, "conflict")["detail"]


def test_a_definition_is_replaced_and_its_history_and_state_stay(site: Site) -> None:
    made = site.create("changing")
    site.run("changing")
    site.api.http.post("/v1/schedules/changing/pause")
    body = site.body("changed", cron="0 5 * * *", overlap="queue")
    changed = ok(site.api.http.put("/v1/schedules/changing", json=body))
    assert (changed["id"], changed["name"], changed["overlap"]) == (made["id"], "changed", "queue")
    assert changed["paused"]
    assert changed["next"] == []
    assert len(site.ticks("changed")) == 1
    problem(site.api.http.get("/v1/schedules/changing"), 404, "schedule-not-found")
    site.create("taken")
    problem(site.api.http.put("/v1/schedules/changed", json=site.body("taken")), 409, "conflict")
    problem(site.api.http.put("/v1/schedules/none", json=body), 404, "schedule-not-found")


@pytest.mark.parametrize(
    ("change", "status", "code", "told"),
    [
        ({"cron": "0 0 2 * * *"}, 422, "invalid-options", "expected five fields"),
        ({"cron": "61 * * * *"}, 422, "invalid-options", "the minute cannot be '61'"),
        ({"time_zone": "Europe/Zuerich"}, 422, "invalid-options", "close: "),
        ({"name": "a b"}, 422, "invalid-options", "name: expected letters"),
        ({"name": UNKNOWN}, 422, "invalid-options", "does not look like an ID"),
        ({"catch_up": "some"}, 422, "invalid-options", "catch_up"),
        ({"catch_up_limit": 0}, 422, "invalid-options", "catch_up_limit"),
        ({"catch_up_limit": True}, 422, "invalid-options", "catch_up_limit: expected a number, got true"),
        ({"overlap": "both"}, 422, "invalid-options", "overlap"),
        ({"every": "day"}, 422, "invalid-options", "every: there is no such option"),
        ({"request": {}}, 422, "invalid-options", "request.model: must be given"),
        ({"request": {"model": "iris"}}, 422, "invalid-options", "request.input: must be given"),
        ({"request": {"model": "ir\0is", "input": {"urls": ["x"]}}}, 422, "invalid-options", "NUL"),
        ({"request": [1]}, 422, "invalid-options", "request"),
        ({"action": "uploaded", "request": {"model": "iris", "fromat": "csv"}}, 422, "invalid-options",
         "request.fromat: there is no such option"),
        ({"action": "uploaded", "request": {"model": "none"}}, 404, "model-not-found", "none"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_schedule_is_told_when_it_is_created(
    site: Site, change: dict[str, Any], status: int, code: str, told: str
) -> None:
    body = site.body("wrong") | change
    assert told in problem(site.api.http.post("/v1/schedules", json=body), status, code)["detail"]
    problem(site.api.http.get("/v1/schedules/wrong"), 404, "schedule-not-found")


def test_an_unknown_placeholder_is_refused_with_its_place_in_the_request(site: Site) -> None:
    refused = site.api.http.post("/v1/schedules", json=site.body("wrong", site.request("{dat}")))
    told = problem(refused, 422, "invalid-options")
    assert told["errors"][0]["parameter"] == "request.input.urls.0"
    assert "there is no placeholder '{dat}'" in told["detail"]


def test_a_place_that_the_tenant_may_not_read_or_write_is_refused_at_once(site: Site) -> None:
    elsewhere = {"model": "iris", "input": {"urls": ["file:///etc/{date}/*.csv"]}}
    problem(site.api.http.post("/v1/schedules", json=site.body("wrong", elsewhere)), 403, "location-refused")
    output = site.request(output={"url": "file:///etc/{stem}.csv"})
    problem(site.api.http.post("/v1/schedules", json=site.body("wrong", output)), 403, "location-refused")


def test_a_webhook_without_a_secret_is_refused_when_the_schedule_is_created_or_changed(
    tmp_path: Path, iris_onnx: Path
) -> None:
    with running(tmp_path, worker=False, input_prefixes={"*": ["file:///in/"]}) as api:
        api.register("iris", iris_onnx)
        uploaded: dict[str, Any] = {"name": "u", "cron": NEVER, "action": "uploaded", "request": {"model": "iris"}}
        request = {"model": "iris", "input": {"urls": ["file:///in/a.csv"]}}
        job: dict[str, Any] = {"name": "j", "cron": NEVER, "request": request}
        ok(api.http.post("/v1/schedules", json={**uploaded, "name": "plain"}), 201)
        signed = [{**one, "request": {**one["request"], "webhook": "https://example.com/"}} for one in (uploaded, job)]
        for body in signed:
            refused = problem(api.http.post("/v1/schedules", json=body), 422, "invalid-options")
            assert "has no secret to sign requests with" in refused["detail"]
        refused = problem(api.http.put("/v1/schedules/plain", json=signed[0]), 422, "invalid-options")
        assert "has no secret to sign requests with" in refused["detail"]
        ok(api.http.post("/v1/webhooks/jobs/rotate"), 200)
        for body in signed:
            ok(api.http.post("/v1/schedules", json=body), 201)


def test_schedules_are_listed_in_pages(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        names = [f"s{number}" for number in range(5)]
        for name in names:
            body = {"name": name, "cron": NEVER, "action": "uploaded", "request": {"model": "iris"}}
            ok(api.http.post("/v1/schedules", json=body), 201)
        seen: list[str] = []
        query: dict[str, Any] = {"limit": 2}
        while True:
            page = ok(api.http.get("/v1/schedules", params=query))
            seen += [schedule["name"] for schedule in page["schedules"]]
            if page["next"] is None:
                break
            query["after"] = page["next"]
        assert seen == names
        damaged = problem(api.http.get("/v1/schedules", params={"after": "s1"}), 422, "invalid-options")
        assert "expected `next` of a page of the same list, got 's1'" in damaged["detail"]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_scores_the_files_of_its_date_and_writes_them_where_it_is_told(site: Site) -> None:
    site.fill("2026-11-20", 3, 4)
    output = {"url": f"{site.outputs.as_uri()}/{{date}}/{{stem}}.parquet"}
    site.create(
        "files",
        site.request(format="parquet", output=output, metadata={"night": "{date-1d}"}),
        time_zone="Europe/Zurich",
    )
    tick = site.run("files", "2026-11-19T23:30:00Z")
    assert (tick["state"], tick["kind"], tick["at"]) == ("queued", "run", "2026-11-20T00:30:00+01:00")
    [job] = tick["jobs"]
    done = site.api.finished(job["id"])
    assert (done["state"], done["rows"]["ok"], done["metadata"]) == ("completed", 7, {"night": "2026-11-19"})
    found = sorted((site.outputs / "2026-11-20").iterdir())
    assert [(path.name, pl.read_parquet(path).height) for path in found] == [
        ("part-0.parquet", 3), ("part-1.parquet", 4),
    ]  # fmt: skip
    [shown_tick] = site.ticks("files")
    assert (shown_tick["jobs"], shown_tick["job_states"]) == (
        [{"id": job["id"], "state": "completed"}], {"completed": 1},
    )  # fmt: skip
    assert ok(site.api.http.get("/v1/schedules/files"))["last"] == shown_tick


def test_a_date_without_files_fails_its_run_and_names_the_address(site: Site) -> None:
    site.create("old", site.request("{date-1y}"))
    tick = site.run("old", "2026-11-20T02:00:00Z")
    assert (tick["state"], tick["jobs"], tick["jobs_total"]) == ("failed", [], 0)
    assert tick["error"]["code"] == "input-not-found"
    assert "/2025-11-20/*.csv" in tick["error"]["message"]
    assert [one["state"] for one in site.ticks("old", state="failed")] == ["failed"]
    assert site.ticks("old", state="queued") == []


def test_a_due_tick_queues_its_job_by_itself(site: Site) -> None:
    site.create("due", site.request("{date:%Y}-due/{time}"))
    schedule_id = ok(site.api.http.get("/v1/schedules/due"))["id"]
    due = datetime.now(UTC)
    for minutes in range(3):  # the minute may change meanwhile
        site.fill(f"{due:%Y}-due/{due + timedelta(minutes=minutes):%H%M}", 5)
    moment = site.make_due(schedule_id)
    until(lambda: [tick["state"] for tick in site.ticks("due")] == ["queued"])
    [tick] = site.ticks("due")
    assert (tick["kind"], datetime.fromisoformat(tick["at"]).timestamp()) == ("due", moment)
    assert site.api.finished(tick["jobs"][0]["id"])["rows"]["ok"] == 5


def test_a_tick_may_score_all_that_was_uploaded(site: Site) -> None:
    site.create("collected", {"model": "iris", "metadata": {"night": "{date}"}}, action="uploaded")
    empty = site.run("collected")
    assert (empty["state"], empty["error"]["code"]) == ("skipped", "nothing-uploaded")
    fitting = [site.api.upload(HEADER + FLOWER * count) for count in (1, 2, 3)]
    unfit = site.api.upload("a,b\n1,2\n")
    tick = site.run("collected", "2026-11-20T02:00:00Z")
    assert tick["state"] == "queued"
    assert [job["id"] for job in tick["jobs"]] == [job["id"] for job in fitting]
    assert tick["error"]["code"] == "schema-mismatch"
    assert unfit["id"] in tick["error"]["message"]
    for job, count in zip(fitting, (1, 2, 3), strict=True):
        done = site.api.finished(job["id"])
        assert (done["rows"]["ok"], done["metadata"]) == (count, {"night": "2026-11-20"})
    only_unfit = site.run("collected")
    assert (only_unfit["state"], only_unfit["jobs"]) == ("failed", [])
    site.api.http.delete(f"/v1/jobs/{unfit['id']}")


def test_uploads_beyond_a_quota_are_tried_again_until_there_is_room(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        site = Site(api, tmp_path, tmp_path)
        api.register("iris", iris_onnx)
        ok(api.http.put("/v1/quotas/default", json={"jobs": 1}))
        api.upload("a,b\n1,2\n")
        held = [api.upload(HEADER + FLOWER * count)["id"] for count in (1, 2)]
        site.create("collected", {"model": "iris"}, action="uploaded")
        tick = site.run("collected")
        assert (tick["state"], [job["id"] for job in tick["jobs"]]) == ("pending", held[:1])
        assert tick["error"]["code"] == "quota-exceeded"
        assert held[1] in tick["error"]["message"]
        ok(api.http.put("/v1/quotas/default", json={"jobs": 2}))
        with closing(Database(api.settings.database_url)) as database, database.write() as connection:
            connection.execute(update(tables.ticks).values(try_at=0.0))
        api.http.app.state.scheduler.look()  # type: ignore[attr-defined]
        until(lambda: [one["state"] for one in site.ticks("collected")] == ["queued"])
        [tick] = site.ticks("collected")
        assert [job["id"] for job in tick["jobs"]] == held
        assert tick["error"]["code"] == "schema-mismatch"


def test_a_repeated_run_with_its_key_runs_once(site: Site) -> None:
    site.fill("2026-10-01", 2)
    site.create("keyed")
    answers = [
        site.api.http.post(
            "/v1/schedules/keyed/run", json={"at": "2026-10-01T12:00:00Z"}, headers={"idempotency-key": "one"}
        )
        for _ in range(2)
    ]
    first, again = (ok(answer, 202) for answer in answers)
    assert first["id"] == again["id"]
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert len(site.ticks("keyed")) == 1
    other = site.api.http.post("/v1/schedules/keyed/run", json={}, headers={"idempotency-key": "one"})
    problem(other, 422, "idempotency-mismatch")


def test_a_paused_schedule_has_no_next_times_until_it_is_resumed(site: Site) -> None:
    site.create("resting")
    for _ in range(2):
        paused = ok(site.api.http.post("/v1/schedules/resting/pause"))
        assert (paused["paused"], paused["next"]) == (True, [])
        assert paused["paused_at"] is not None
    for _ in range(2):
        active = ok(site.api.http.post("/v1/schedules/resting/resume"))
        assert (active["paused"], len(active["next"]), active["paused_at"]) == (False, 5, None)


def test_a_tick_that_is_due_at_a_change_or_a_pause_is_not_lost(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.http.app.state.scheduler.stop()  # type: ignore[attr-defined]  # so that nothing else plans the tick
        api.register("iris", iris_onnx)
        site = Site(api, tmp_path, tmp_path)
        request = {"model": "iris"}
        due = {}
        for name in ("changed", "paused"):
            made = site.create(name, request, action="uploaded", cron="0 2 * * *")
            due[name] = site.make_due(made["id"])
        body = site.body("changed", {**request, "priority": 1}, action="uploaded", cron="0 3 * * *")
        assert ok(api.http.put("/v1/schedules/changed", json=body))["next"][0][11:16] == "03:00"
        ok(api.http.post("/v1/schedules/paused/pause"))
        [pending], [skipped] = site.ticks("changed"), site.ticks("paused")
        found = [datetime.fromisoformat(tick["at"]).timestamp() for tick in (pending, skipped)]
        assert found == [due["changed"], due["paused"]]
        assert pending["state"] == "pending"
        assert (skipped["state"], skipped["error"]["code"]) == ("skipped", "paused")
        ok(api.http.put("/v1/schedules/changed", json={**body, "cron": "0 4 * * *"}))
        assert len(site.ticks("changed")) == 1


def test_a_deleted_schedule_is_gone_and_its_jobs_stay(site: Site) -> None:
    site.fill("2026-10-02", 2)
    site.create("brief")
    [job] = site.run("brief", "2026-10-02T12:00:00Z")["jobs"]
    assert site.api.http.delete("/v1/schedules/brief").status_code == 204
    problem(site.api.http.delete("/v1/schedules/brief"), 404, "schedule-not-found")
    problem(site.api.http.get("/v1/schedules/brief/ticks"), 404, "schedule-not-found")
    assert site.api.finished(job["id"])["state"] == "completed"


def test_a_history_is_listed_in_pages_newest_first(site: Site) -> None:
    site.create("paged")
    made = [site.run("paged")["id"] for _ in range(5)]
    seen: list[int] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = ok(site.api.http.get("/v1/schedules/paged/ticks", params=query))
        seen += [tick["id"] for tick in page["ticks"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    assert seen == made[::-1]
    for refused in ({"limit": 0}, {"limit": 201}, {"after": 0}, {"state": "lost"}, {"before": 1}):
        problem(site.api.http.get("/v1/schedules/paged/ticks", params=refused), 422, "invalid-options")


@pytest.mark.parametrize("moment", ["2026-11-20T02:00:00", "1969-01-01T00:00:00Z", "3001-01-01T00:00:00Z", "soon"])
def test_a_run_at_no_time_is_refused(site: Site, moment: str) -> None:
    site.api.http.post("/v1/schedules", json=site.body("timed"))
    problem(site.api.http.post("/v1/schedules/timed/run", json={"at": moment}), 422, "invalid-options")


# --- tenants, scopes, the audit log ----------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path, iris_onnx: Path) -> Iterator[tuple[Api, dict[str, dict[str, str]]]]:
    """A service with keys, and the headers of each."""
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        made = {
            "operator": (Scope.ADMIN, EVERY_TENANT),
            "red": (Scope.USER, "red"),
            "reader": (Scope.READER, "red"),
            "blue": (Scope.USER, "blue"),
        }
        with closing(Database(api.settings.database_url)) as database, database.write() as connection:
            texts = {name: keys.create(connection, name, *what, 1.0)[1] for name, what in made.items()}
        yield api, {name: {"authorization": f"Bearer {text}"} for name, text in texts.items()}


BODY = {"name": "nightly", "cron": NEVER, "action": "uploaded", "request": {"model": "iris"}}


def test_a_schedule_of_another_tenant_looks_like_a_missing_one(
    guarded: tuple[Api, dict[str, dict[str, str]]],
) -> None:
    api, headers = guarded
    reds = ok(api.http.post("/v1/schedules", json=BODY, headers=headers["red"]), 201)
    blues = ok(api.http.post("/v1/schedules", json=BODY, headers=headers["blue"]), 201)
    assert (reds["tenant"], blues["tenant"]) == ("red", "blue")
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/resume"),
                         ("POST", "/run"), ("GET", "/ticks")):  # fmt: skip
        answer = api.http.request(method, f"/v1/schedules/{reds['id']}{path}", headers=headers["blue"])
        problem(answer, 404, "schedule-not-found")
    assert ok(api.http.get("/v1/schedules/nightly", headers=headers["blue"]))["id"] == blues["id"]
    listed = ok(api.http.get("/v1/schedules", headers=headers["red"]))["schedules"]
    assert [schedule["id"] for schedule in listed] == [reds["id"]]
    every = ok(api.http.get("/v1/schedules", headers=headers["operator"]))["schedules"]
    assert {schedule["tenant"] for schedule in every} == {"red", "blue"}
    problem(api.http.get("/v1/schedules/nightly", headers=headers["operator"]), 409, "conflict")
    assert ok(api.http.get(f"/v1/schedules/{reds['id']}", headers=headers["operator"])) == reds


def test_a_key_that_reads_sees_schedules_and_changes_none(guarded: tuple[Api, dict[str, dict[str, str]]]) -> None:
    api, headers = guarded
    made = ok(api.http.post("/v1/schedules", json=BODY, headers=headers["red"]), 201)
    reader = headers["reader"]
    assert ok(api.http.get("/v1/schedules/nightly", headers=reader)) == made
    assert ok(api.http.get("/v1/schedules/nightly/ticks", headers=reader))["ticks"] == []
    for method, path in (("POST", ""), ("PUT", "/nightly"), ("DELETE", "/nightly"), ("POST", "/nightly/pause"),
                         ("POST", "/nightly/resume"), ("POST", "/nightly/run")):  # fmt: skip
        problem(api.http.request(method, f"/v1/schedules{path}", json=BODY, headers=reader), 403, "forbidden")
    assert ok(api.http.get("/v1/schedules/nightly", headers=reader)) == made


@pytest.mark.slow
def test_the_uploads_of_a_tick_are_those_of_its_tenant(guarded: tuple[Api, dict[str, dict[str, str]]]) -> None:
    api, headers = guarded
    ok(api.http.post("/v1/schedules", json=BODY, headers=headers["red"]), 201)
    red, blue = (
        ok(api.http.post("/v1/upload", content=HEADER + FLOWER, headers=headers[name]), 201)["id"]
        for name in ("red", "blue")
    )
    tick = ok(api.http.post("/v1/schedules/nightly/run", headers=headers["red"]), 202)
    assert [job["id"] for job in tick["jobs"]] == [red]
    assert ok(api.http.get(f"/v1/jobs/{blue}", headers=headers["blue"]))["state"] == "uploaded"


def test_each_change_of_a_schedule_is_recorded_with_its_key(guarded: tuple[Api, dict[str, dict[str, str]]]) -> None:
    api, headers = guarded
    for method, path, body in (
        ("POST", "", BODY), ("POST", "", BODY), ("POST", "/nightly/run", None), ("POST", "/nightly/pause", None),
        ("POST", "/nightly/pause", None), ("POST", "/nightly/resume", None), ("POST", "/nightly/resume", None),
        ("PUT", "/nightly", BODY), ("PUT", "/nightly", BODY | {"overlap": "queue"}), ("DELETE", "/nightly", None),
    ):  # fmt: skip
        answer = api.http.request(method, f"/v1/schedules{path}", json=body, headers=headers["red"])
        assert answer.is_success, answer.text
    entries = ok(api.http.get("/v1/audit", headers=headers["operator"]))["entries"][::-1]
    found = [(one["tenant"], one["key"], one["action"], one["subject"]) for one in entries if one["kind"] == "schedule"]
    assert found == [
        ("red", "red", action, "nightly") for action in ("create", "run", "pause", "resume", "change", "delete")
    ]


# --- the client and the command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory,
    iris_onnx: Path,
    start_server: Callable[..., AbstractContextManager[str]],
) -> Iterator[tuple[str, Path]]:
    """A server process with a model, and the folder whose `in` it may read in place."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "in").mkdir()
    places = json.dumps({"*": [f"{(folder / 'in').as_uri()}/"]})
    with start_server(folder, BATCHSERVE_INPUT_PREFIXES=places) as url:
        with Client(url) as client:
            client.models.add(iris_onnx, name="iris")
        yield url, folder


@pytest.mark.slow
def test_the_client_creates_runs_changes_and_follows_schedules(address: tuple[str, Path]) -> None:
    url, folder = address
    (folder / "in" / "2026-11-20.csv").write_text(HEADER + FLOWER * 3)
    request = {"model": "iris", "input": {"urls": [f"{folder.as_uri()}/in/{{date}}.csv"]}}
    with Client(url) as client:
        nightly = client.schedules.create("nightly", "0 2 * * *", request, time_zone="Europe/Zurich")
        assert len(nightly.next) == 5
        assert nightly.next[0].utcoffset() is not None
        assert client.schedules.create("nightly", "0 2 * * *", request, time_zone="Europe/Zurich").id == nightly.id
        with pytest.raises(Conflict):
            client.schedules.create("nightly", "0 3 * * *", request)
        tick = nightly.run(at=datetime(2026, 11, 20, 2, tzinfo=UTC))
        assert client.jobs.get(tick["jobs"][0]["id"]).wait(60).rows["ok"] == 3
        assert nightly.run("2026-11-21T02:00:00Z")["error"]["code"] == "input-not-found"
        assert [one["state"] for one in nightly.ticks()] == ["failed", "queued"]
        assert [one["state"] for one in nightly.ticks(state="queued")] == ["queued"]
        last = nightly.refresh().last
        assert last is not None
        assert last["state"] == "failed"
        assert nightly.change(cron="0 4 * * *").data["overlap"] == "skip"
        assert (nightly.cron, nightly.time_zone) == ("0 4 * * *", "Europe/Zurich")
        assert nightly.pause().paused
        assert not nightly.resume().paused
        assert [one.name for one in client.schedules.list()] == ["nightly"]
        with pytest.raises(InvalidOptions, match="expected five fields"):
            client.schedules.create("wrong", "0 0 2 * * *", request)
        client.schedules.get("nightly").delete()
        with pytest.raises(ScheduleNotFound):
            client.schedules.get("nightly")
        with pytest.raises(ScheduleNotFound):
            client.schedules.delete("nightly")


def test_the_client_for_asyncio_has_the_same_calls(address: tuple[str, Path]) -> None:
    async def calls() -> list[str]:
        async with AsyncClient(address[0]) as client:
            made = await client.schedules.create("twin", NEVER, {"model": "iris"}, action="uploaded")
            tick = await made.run()
            await made.pause()
            states = [one["state"] async for one in made.ticks()]
            names = [one.name async for one in client.schedules.list()]
            await (await client.schedules.get("twin")).delete()
            return [tick["error"]["code"], *states, *names]

    assert asyncio.run(calls()) == ["nothing-uploaded", "skipped", "twin"]


def test_the_commands_create_show_run_pause_and_delete(address: tuple[str, Path]) -> None:
    url, folder = address

    def command(*words: str, code: int = 0, input: str | None = None) -> tuple[str, str]:
        done = in_this_process(folder, "schedules", *words, input=input, BATCHSERVE_URL=url)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    (folder / "in" / "2026-11-22.csv").write_text(HEADER + FLOWER * 3)
    where = f"{folder.as_uri()}/in/{{date}}.csv"
    make = ("create", "daily", "--cron", "0 2 * * *", "--time-zone", "Europe/Zurich", "-m", "iris", "--url", where)
    out, _ = command(*make)
    assert "At 02:00 every day" in out
    assert "T02:00:00+0" in out
    assert json.loads(command(*make, "--json")[0])["name"] == "daily"
    _, error = command(*make, "--overlap", "queue", code=1)
    assert "already exists" in error
    assert json.loads(command(*make, "--overlap", "queue", "--replace", "--json")[0])["overlap"] == "queue"
    job_id = command("run", "daily", "--at", "2026-11-22T02:00:00Z")[0].strip()
    with Client(url) as client:
        assert client.jobs.get(job_id).wait(60).rows["ok"] == 3
    _, error = command("run", "daily", "--at", "2026-01-01T02:00:00Z", code=1)
    assert "2026-01-01.csv" in error
    lines = [line.split("\t") for line in command("ticks", "daily")[0].splitlines()]
    assert [(line[1], line[2], line[3]) for line in lines] == [
        ("on request", "failed", "0"), ("on request", "1 completed", "1"),
    ]  # fmt: skip
    assert len(json.loads(command("ticks", "daily", "--state", "failed", "--json")[0])) == 1
    assert "is paused" in command("pause", "daily")[1]
    assert command("list")[0].split("\t")[:4] == ["daily", "0 2 * * *", "Europe/Zurich", "paused"]
    assert "is active" in command("resume", "daily")[1]
    assert "failed" in command("show", "daily")[0]
    command("rm", "daily")
    assert command("list", "--json")[0].strip() == "[]"
    given = json.dumps({"model": "iris"})
    command("create", "given", "--cron", NEVER, "--uploaded", "--request", "-", input=given)
    (folder / "given.json").write_text(given)
    command("create", "given", "--cron", NEVER, "--uploaded", "--request", "@given.json")
    command("rm", "given")


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "iris"],
        ["--url", "file:///a.csv"],
        ["--model", "iris", "--url", "file:///a.csv", "--uploaded"],
        ["--model", "iris", "--uploaded", "--output", "file:///b.csv"],
        ["--request", "{}", "--model", "iris"],
        ["--request", "[1]"],
        ["--request", "{"],
    ],
)
def test_a_request_that_is_given_twice_or_not_at_all_is_wrong_usage(tmp_path: Path, words: list[str]) -> None:
    done = in_this_process(
        tmp_path, "schedules", "create", "x", "--cron", NEVER, *words, BATCHSERVE_URL="http://127.0.0.1:9"
    )
    assert done.returncode == 2, done.stderr


# --- pages -----------------------------------------------------------------------------------------------------------


def post(site: Site, name: str, **fields: str) -> int:
    answer = site.api.http.post(f"/schedules/{name}?token=", data=fields, follow_redirects=False)
    return answer.status_code


def test_the_pages_show_schedules_and_their_history(site: Site) -> None:
    site.fill("2026-10-03", 2)
    site.create("paged-one", cron="0 2 * * *", time_zone="Europe/Zurich")
    [job] = site.run("paged-one", "2026-10-03T12:00:00Z")["jobs"]
    site.run("paged-one", "2026-01-01T12:00:00Z")
    listed = shown(site.api, "/schedules")
    assert "paged-one" in listed
    assert "At 02:00 every day" in listed
    page = shown(site.api, "/schedules/paged-one")
    assert f'href="/jobs/{job["id"]}"' in page
    assert "2026-01-01/*.csv" in page
    assert page.count("<li><time") == 5
    assert "Run now" in page
    assert "&#34;model&#34;: &#34;iris&#34;" in page
    assert "no schedule" in shown(site.api, "/schedules/none", 404)


def test_the_pages_run_pause_resume_and_delete(site: Site) -> None:
    site.create("acted-on")
    assert post(site, "acted-on", action="run") == 303
    assert len(site.ticks("acted-on")) == 1
    assert post(site, "acted-on", action="pause") == 303
    assert "Resume" in shown(site.api, "/schedules/acted-on")
    assert post(site, "acted-on", action="resume") == 303
    assert "Pause" in shown(site.api, "/schedules/acted-on")
    assert post(site, "acted-on", action="explode") == 400
    assert post(site, "acted-on", action="delete") == 200
    assert ok(site.api.http.get("/v1/schedules/acted-on"))["name"] == "acted-on"
    assert post(site, "acted-on", action="delete", confirmed="yes") == 303
    assert post(site, "acted-on", action="run") == 404


def test_an_empty_list_says_how_a_schedule_is_created(own_api: Api) -> None:
    page = shown(own_api, "/schedules")
    assert "There are no schedules yet." in page
    assert "batchserve schedules create" in page


def test_a_session_that_reads_sees_no_buttons(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        ok(api.http.post("/v1/schedules", json=BODY), 201)
        with closing(Database(api.settings.database_url)) as database, database.write() as connection:
            _, text = keys.create(connection, "reader", Scope.READER, "default", 1.0)
        api.http.post("/sign-in", data={"key": text})
        page = shown(api, "/schedules/nightly")
        assert "Run now" not in page
        token = re.search(r"token=(\w+)", page)
        assert token is not None
        assert api.http.post(f"/schedules/nightly?token={token[1]}", data={"action": "run"}).status_code == 403


# --- what is out of reach --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bucket_out_of_reach_is_named_and_tried_again(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with running(tmp_path, worker=False, input_prefixes={"*": ["s3://unreachable/in/"]}) as api:
        api.register("iris", iris_onnx)
        request = {"model": "iris", "input": {"urls": ["s3://unreachable/in/{date}/*.csv"]}}
        ok(api.http.post("/v1/schedules", json={"name": "far", "cron": NEVER, "request": request}), 201)
        tick = ok(api.http.post("/v1/schedules/far/run"), 202)
    assert (tick["state"], tick["error"]["code"], tick["attempt"]) == ("pending", "unavailable", 1)
    assert "s3://unreachable" in tick["error"]["message"]
