"""/v1/webhooks, the option `webhook` of predict, the client, and the command line."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from commands import in_this_process
from receivers import Receiver, receiving
from service import Api, ok, problem, running
from standardwebhooks import Webhook as Verifier
from waiting import until

from batchserve import AsyncClient, Client, keys
from batchserve.access import EVERY_TENANT, Scope
from batchserve.client import Webhook
from batchserve.db.connect import Database
from batchserve.errors import InvalidOptions, WebhookNotFound

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
URL = "https://example.com/hook"
LOOPBACK: dict[str, Any] = {"webhook_networks": "127.0.0.0/8"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service that may send to loopback."""
    with running(tmp_path_factory.mktemp("webhooks"), **LOOPBACK) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def create(api: Api, url: str = URL, **given: Any) -> dict[str, Any]:
    made: dict[str, Any] = ok(api.http.post("/v1/webhooks", json={"url": url, **given}), 201)
    return made


def delivered(api: Api, path: str, count: int = 1) -> list[dict[str, Any]]:
    """The deliveries at a path, when so many have arrived."""

    def read() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ok(api.http.get(path, params={"state": "delivered"}))["deliveries"]
        return found

    until(lambda: len(read()) >= count)
    return read()


# --- endpoints -------------------------------------------------------------------------------------------------------


def test_a_webhook_is_created_shown_changed_and_removed(own_api: Api) -> None:
    made = create(own_api, events=["job.failed"], description="the night run")
    assert made["secret"].startswith("whsec_")
    shown = ok(own_api.http.get(made["links"]["self"]))
    assert shown == {name: value for name, value in made.items() if name != "secret"}
    assert (shown["url"], shown["events"], shown["enabled"], shown["tenant"]) == (URL, ["job.failed"], True, "default")
    assert ok(own_api.http.get("/v1/webhooks")) == {"webhooks": [shown]}
    changed = ok(own_api.http.patch(made["links"]["self"], json={"enabled": False, "events": ["job.*", "batch.*"]}))
    assert changed == {**shown, "enabled": False, "events": ["job.*", "batch.*"]}
    assert own_api.http.delete(made["links"]["self"]).status_code == 204
    for method in ("GET", "PATCH", "DELETE"):
        problem(own_api.http.request(method, made["links"]["self"]), 404, "webhook-not-found")


def test_by_default_a_webhook_gets_all_ends_of_jobs(own_api: Api) -> None:
    made = create(own_api)
    assert (made["events"], made["description"]) == (["job.*"], "")


@pytest.mark.parametrize(
    ("body", "parameter", "said"),
    [
        ({}, "url", "must be given"),
        ({"url": "http://example.com/"}, "", "expected https"),
        ({"url": "https://127.0.0.1/"}, "", "not a public address"),
        ({"url": "https://[::1]/"}, "", "not a public address"),
        ({"url": "https://me:secret@example.com/"}, "url", "without a user"),
        ({"url": "https://example.com:22/"}, "url", "port 22"),
        ({"url": "ftp://example.com/"}, "url", "such as https"),
        ({"url": "https://example.com/\0"}, "url", "printable"),
        ({"url": "https://example.com/" + "x" * 3000}, "url", "2048"),
        ({"url": 7}, "url", "string"),
        ({"url": URL, "events": []}, "events", "at least 1"),
        ({"url": URL, "events": ["job.started"]}, "events", "expected one of"),
        ({"url": URL, "events": "job.*"}, "events", "list"),
        ({"url": URL, "description": "a\0b"}, "description", "NUL"),
        ({"url": URL, "description": "x" * 300}, "description", "255"),
        ({"url": URL, "secret": "mine"}, "secret", "no such option"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused_with_the_reason(
    body: dict[str, Any], parameter: str, said: str, own_api: Api
) -> None:
    found = problem(own_api.http.post("/v1/webhooks", json=body), 422, "invalid-options")
    assert said in found["detail"]
    assert not parameter or found["errors"][0]["parameter"].startswith(parameter)
    assert ok(own_api.http.get("/v1/webhooks")) == {"webhooks": []}
    made = create(own_api)
    if "url" in body:
        problem(own_api.http.patch(made["links"]["self"], json=body), 422, "invalid-options")
        assert ok(own_api.http.get(made["links"]["self"]))["url"] == URL


def test_a_repeated_creation_gives_the_same_webhook_and_secret(own_api: Api) -> None:
    headers = {"idempotency-key": "once"}
    answers = [own_api.http.post("/v1/webhooks", json={"url": URL}, headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert len(ok(own_api.http.get("/v1/webhooks"))["webhooks"]) == 1
    other = own_api.http.post("/v1/webhooks", json={"url": f"{URL}/other"}, headers=headers)
    problem(other, 422, "idempotency-mismatch")


def test_a_secret_is_shown_once(own_api: Api) -> None:
    made = create(own_api)
    answer = own_api.http.post(f"{made['links']['self']}/rotate", json={"overlap": 60})
    rotated = ok(answer)
    assert answer.headers["cache-control"] == "no-store"
    assert rotated["secret"].startswith("whsec_")
    assert rotated["earlier_until"]
    for path in ("/v1/webhooks", made["links"]["self"], "/v1/audit", "/webhooks", f"/webhooks/{made['id']}"):
        text = own_api.http.get(path).text
        assert made["secret"] not in text
        assert rotated["secret"] not in text
    assert ok(own_api.http.post("/v1/webhooks/jobs/rotate"))["earlier_until"] is None
    for overlap in (-1, 8 * 86400, "day", True, None):
        answer = own_api.http.post(f"{made['links']['self']}/rotate", json={"overlap": overlap})
        problem(answer, 422, "invalid-options")


# --- events over the whole way ---------------------------------------------------------------------------------------


def test_the_end_of_a_job_arrives_signed_and_is_in_the_log(site: Api, receiver: Receiver) -> None:
    made = create(site, receiver.url, events=["job.completed"])
    job = site.run(CSV, "iris", metadata='{"night": "2026-11-20"}')
    (request,) = receiver.wait(1)
    event = Verifier(made["secret"]).verify(request.body, dict(request.headers))
    assert event["type"] == "job.completed"
    assert event["data"] == {
        "id": job["id"],
        "tenant": "default",
        "state": "completed",
        "model": "iris@1",
        "rows": {"total": 1, "ok": 1, "failed": 0},
        "error": None,
        "reused_from": None,
        "metadata": {"night": "2026-11-20"},
        "links": {name: job["links"][name] for name in ("self", "result", "errors")},
    }
    (delivery,) = delivered(site, made["links"]["deliveries"])
    assert (delivery["id"], delivery["job"], delivery["url"]) == (request.id, job["id"], None)
    shown = ok(site.http.get(delivery["links"]["self"]))
    assert shown["body"] == event
    (attempt,) = shown["log"]
    assert (attempt["number"], attempt["status"], attempt["response"], attempt["error"]) == (1, 204, "", None)
    assert attempt["seconds"] > 0
    site.http.delete(made["links"]["self"])


@pytest.mark.parametrize("direct_seconds", [0, 0.05])
def test_every_way_in_which_a_job_ends_is_sent(
    direct_seconds: float, receiver: Receiver, tmp_path: Path, iris_onnx: Path
) -> None:
    with running(tmp_path, direct_seconds=direct_seconds, **LOOPBACK) as api:
        api.register("iris", iris_onnx)
        made = create(api, receiver.url)
        expected = [(api.run(CSV, "iris")["id"], "job.completed")]
        reused = ok(api.http.post("/v1/predict?model=iris", content=CSV, headers={"prefer": "wait=30"}))
        expected.append((reused["id"], "job.completed"))
        failed = api.run(f"{CSV}5.1,tall,1.4,0.2\n", "iris", on_row_error="fail")
        expected.append((failed["id"], "job.failed"))
        queued = ok(api.http.post("/v1/predict?model=iris&reuse=0&run_after=2999-01-01T00:00:00Z", content=CSV), 202)
        api.http.post(queued["links"]["cancel"])
        expected.append((queued["id"], "job.cancelled"))
        found = [request.event for request in receiver.wait(4)]
        delivered(api, made["links"]["deliveries"], 4)
    assert sorted((event["data"]["id"], event["type"]) for event in found) == sorted(expected)
    (failure,) = (event["data"] for event in found if event["type"] == "job.failed")
    assert failure["error"]["code"] == failed["error"]["code"]
    assert {event["data"]["reused_from"] for event in found} >= {reused["reused_from"]}


def test_a_test_event_arrives_whatever_the_webhook_asks_for(site: Api, receiver: Receiver) -> None:
    made = create(site, receiver.url, events=["job.expired"])
    answer = site.http.post(made["links"]["test"])
    sent = ok(answer, 202)
    assert (sent["event"], sent["state"], answer.headers["location"]) == (
        "webhook.test", "pending", sent["links"]["self"],
    )  # fmt: skip
    (request,) = receiver.wait(1)
    assert (request.id, request.event["type"], request.event["data"]["webhook"]) == (
        sent["id"], "webhook.test", made["id"],
    )  # fmt: skip
    site.http.delete(made["links"]["self"])


def test_a_delivery_is_sent_again_with_the_same_id(site: Api, receiver: Receiver) -> None:
    made = create(site, receiver.url, events=["job.expired"])
    ok(site.http.post(made["links"]["test"]), 202)
    (delivery,) = delivered(site, made["links"]["deliveries"])
    assert ok(site.http.post(delivery["links"]["redeliver"]), 202)["state"] == "pending"
    first, second = receiver.wait(2)
    assert (first.id, first.body) == (second.id, second.body)
    until(lambda: len(ok(site.http.get(delivery["links"]["self"]))["log"]) == 2)
    site.http.delete(made["links"]["self"])


def test_a_disabled_webhook_is_neither_tested_nor_sent_to_again(own_api: Api) -> None:
    made = create(own_api)
    sent = ok(own_api.http.post(made["links"]["test"]), 202)
    ok(own_api.http.patch(made["links"]["self"], json={"enabled": False}))
    for path in (made["links"]["test"], sent["links"]["redeliver"]):
        problem(own_api.http.post(path), 409, "conflict")
    given_up = ok(own_api.http.get(made["links"]["deliveries"], params={"state": "given-up"}))["deliveries"]
    assert [one["id"] for one in given_up] == [sent["id"]]
    assert given_up[0]["next_attempt_at"] is None


def test_deliveries_are_listed_in_pages(own_api: Api) -> None:
    made = create(own_api)
    sent = [ok(own_api.http.post(made["links"]["test"]), 202)["id"] for _ in range(5)]
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = ok(own_api.http.get(made["links"]["deliveries"], params={"limit": 2, **after}))
        seen += [one["id"] for one in page["deliveries"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert seen == sent[::-1]
    for refused in ({"limit": 0}, {"limit": 201}, {"state": "lost"}, {"after": "a\0"}, {"after": "x"}, {"before": 1}):
        problem(own_api.http.get(made["links"]["deliveries"], params=refused), 422, "invalid-options")


# --- addresses on jobs -----------------------------------------------------------------------------------------------


def test_a_job_may_have_an_address_once_its_tenant_has_a_secret(
    receiver: Receiver, tmp_path: Path, iris_onnx: Path
) -> None:
    with running(tmp_path, **LOOPBACK) as api:
        api.register("iris", iris_onnx)
        options = {"model": "iris", "webhook": receiver.url}
        with api.unchanged():
            refused = problem(api.http.post("/v1/predict", params=options, content=CSV), 422, "invalid-options")
        assert "has no secret" in refused["detail"]
        secret = ok(api.http.post("/v1/webhooks/jobs/rotate"))["secret"]
        job = api.run(CSV, "iris", webhook=receiver.url)
        assert job["options"]["webhook"] == receiver.url
        (request,) = receiver.wait(1)
        event = Verifier(secret).verify(request.body, dict(request.headers))
        assert (event["type"], event["data"]["id"]) == ("job.completed", job["id"])
        (delivery,) = delivered(api, "/v1/webhooks/jobs/deliveries")
        assert (delivery["url"], delivery["job"]) == (receiver.url, job["id"])
        problem(api.http.get("/v1/webhooks/jobs"), 404, "webhook-not-found")


@pytest.mark.slow
def test_an_uploaded_job_takes_its_address_when_it_is_predicted(
    receiver: Receiver, tmp_path: Path, iris_onnx: Path
) -> None:
    with running(tmp_path, **LOOPBACK) as api:
        api.register("iris", iris_onnx)
        ok(api.http.post("/v1/webhooks/jobs/rotate"))
        uploaded = api.upload(CSV)
        body = {"model": "iris", "webhook": receiver.url}
        ok(api.http.post(f"/v1/predict/{uploaded['id']}", json=body), 202)
        again = api.http.post(f"/v1/predict/{uploaded['id']}", json=body)
        assert again.json()["id"] == uploaded["id"], "the same request is the same job"
        other = api.http.post(f"/v1/predict/{uploaded['id']}", json={**body, "webhook": f"{receiver.url}/other"})
        assert other.json()["id"] != uploaded["id"]
        receiver.wait(2)
        delivered(api, "/v1/webhooks/jobs/deliveries", 2)
    assert {request.path for request in receiver.requests} == {"/hook", "/hook/other"}


@pytest.mark.slow
def test_a_job_over_inputs_in_place_has_an_address_as_well_and_so_has_a_schedule(
    receiver: Receiver, tmp_path: Path, iris_onnx: Path
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "a.csv").write_text(CSV)
    with running(tmp_path / "store", input_prefixes={"*": [f"file://{lake}/"]}, **LOOPBACK) as api:
        api.register("iris", iris_onnx)
        ok(api.http.post("/v1/webhooks/jobs/rotate"))
        asked = {"input": {"urls": [f"file://{lake}/*.csv"]}, "model": "iris", "webhook": receiver.url}
        job = ok(api.http.post("/v1/jobs", json=asked, headers={"prefer": "wait=30"}))
        (request,) = receiver.wait(1)
        assert (request.event["data"]["id"], request.event["type"]) == (job["id"], "job.completed")
        refused = {**asked, "webhook": "https://10.0.0.1/"}
        problem(api.http.post("/v1/jobs", json=refused), 422, "invalid-options")
        schedule = {"name": "nightly", "cron": "0 6 * * *", "request": refused}
        found = problem(api.http.post("/v1/schedules", json=schedule), 422, "invalid-options")
        assert "not a public address" in found["detail"]
        ok(api.http.post("/v1/schedules", json={**schedule, "request": asked}), 201)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/", "expected https"),
        ("https://169.254.169.254/latest", "not a public address"),
        ("https://a@example.com/", "without a user"),
        ("example.com", "such as https"),
        ("https://example.com/\0", "printable"),
    ],
)
def test_an_address_that_cannot_be_is_refused_before_anything_is_stored(url: str, said: str, idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    with idle_api.unchanged():
        options = {"model": "iris", "webhook": url}
        for answer in (
            idle_api.http.post("/v1/predict", params=options, content=CSV),
            idle_api.http.post(f"/v1/predict/{job['id']}", params=options),
            idle_api.http.post(f"/v1/predict/{job['id']}", json=options),
            idle_api.http.post("/v1/jobs/predict", json=options),
        ):
            assert said in problem(answer, 422, "invalid-options")["detail"]


# --- keys ------------------------------------------------------------------------------------------------------------


def test_each_tenant_has_its_own_webhooks_and_a_reader_changes_none(own_api: Api) -> None:
    with closing(Database(own_api.settings.database_url)) as database, database.write() as connection:
        made = {
            name: keys.create(connection, name, scope, tenant, 1.0)[1]
            for name, scope, tenant in (
                ("red", Scope.USER, "red"),
                ("reader", Scope.READER, "red"),
                ("blue", Scope.ADMIN, "blue"),
                ("all", Scope.ADMIN, EVERY_TENANT),
            )
        }

    def send(key: str, method: str, path: str, **request: Any) -> Any:
        return own_api.http.request(method, path, headers={"authorization": f"Bearer {made[key]}"}, **request)

    reds = ok(send("red", "POST", "/v1/webhooks", json={"url": URL}), 201)
    sent = ok(send("red", "POST", reds["links"]["test"]), 202)
    assert reds["tenant"] == "red"
    paths = [reds["links"]["self"], reds["links"]["deliveries"], sent["links"]["self"]]
    for path in paths:
        for key in ("red", "reader", "all"):
            ok(send(key, "GET", path))
        problem(send("blue", "GET", path), 404, "webhook-not-found")
    changes = [
        ("PATCH", reds["links"]["self"], {"json": {"enabled": False}}),
        ("POST", f"{reds['links']['self']}/rotate", {}),
        ("POST", reds["links"]["test"], {}),
        ("POST", sent["links"]["redeliver"], {}),
        ("DELETE", reds["links"]["self"], {}),
    ]
    for method, path, request in changes:
        problem(send("reader", method, path, **request), 403, "forbidden")
        problem(send("blue", method, path, **request), 404, "webhook-not-found")
    problem(send("reader", "POST", "/v1/webhooks", json={"url": URL}), 403, "forbidden")
    assert ok(send("blue", "GET", "/v1/webhooks")) == {"webhooks": []}
    assert len(ok(send("all", "GET", "/v1/webhooks"))["webhooks"]) == 1
    entries = ok(send("all", "GET", "/v1/audit"))["entries"]
    assert [(one["key"], one["action"], one["subject"]) for one in entries if one["kind"] == "webhook"] == [
        ("red", "create", reds["id"])
    ]


# --- the client and the command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server(
    start_server: Callable[..., AbstractContextManager[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server in a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    with start_server(folder, BATCHSERVE_WEBHOOK_NETWORKS="127.0.0.0/8", BATCHSERVE_POLL="0.05") as url:
        yield url


@pytest.mark.slow
def test_the_client_manages_webhooks(own_server: str, receiver: Receiver, iris_onnx: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.csv"
    file.write_text(CSV)
    with Client(own_server) as client:
        client.models.add(iris_onnx, name="iris")
        made = client.webhooks.create(receiver.url, ["job.completed"], description="night")
        assert made.secret is not None
        assert made.secret not in repr(made)
        assert client.webhooks.get(made.id) == Webhook(made.data)
        assert [one.id for one in client.webhooks.list()] == [made.id]
        job = client.submit(file, "iris", reuse=False).wait(60)
        (request,) = receiver.wait(1)
        assert Verifier(made.secret).verify(request.body, dict(request.headers))["data"]["id"] == job.id
        until(lambda: [one.state for one in client.webhooks.deliveries(made.id)] == ["delivered"])
        (delivery,) = client.webhooks.deliveries(made.id, state="delivered")
        assert (delivery.id, delivery.event) == (request.id, "job.completed")
        assert [attempt["status"] for attempt in client.webhooks.delivery(made.id, delivery.id).log] == [204]
        client.webhooks.redeliver(made.id, delivery.id)
        client.webhooks.test(made.id)
        receiver.wait(3)
        rotated = client.webhooks.rotate(made.id, overlap=60)
        assert rotated != made.secret
        assert not client.webhooks.change(made.id, enabled=False).enabled
        assert client.webhooks.change(made.id, events=["batch.*"]).events == ["batch.*"]
        client.webhooks.rotate("jobs")
        client.submit(file, "iris", reuse=False, webhook=receiver.url).wait(60)
        receiver.wait(4)
        words = ("predict", file, "--model", "iris", "--no-reuse", "--webhook", receiver.url)
        assert in_this_process(tmp_path, *words, BATCHSERVE_URL=own_server).returncode == 0
        receiver.wait(5)
        client.webhooks.delete(made.id)
        with pytest.raises(WebhookNotFound):
            client.webhooks.get(made.id)
        with pytest.raises(InvalidOptions, match="port 22"):
            client.webhooks.create("https://example.com:22/")


def test_the_asynchronous_client_manages_webhooks(own_server: str) -> None:
    async def manage() -> list[str]:
        async with AsyncClient(own_server) as client:
            made = await client.webhooks.create(URL)
            sent = [(await client.webhooks.test(made.id)).id for _ in range(2)]
            assert [one.id async for one in client.webhooks.deliveries(made.id)] == sent[::-1]
            await client.webhooks.change(made.id, enabled=False)
            await client.webhooks.delete(made.id)
            return [one.id for one in await client.webhooks.list()]

    assert asyncio.run(manage()) == []


def test_commands_manage_webhooks(own_server: str, receiver: Receiver, tmp_path: Path) -> None:
    def run(*words: str, code: int = 0) -> str:
        done = in_this_process(tmp_path, "webhooks", *words, BATCHSERVE_URL=own_server)
        assert done.returncode == code, done.stderr
        return done.stdout

    secret = run("add", receiver.url, "-e", "job.failed", "-e", "batch.*", "--description", "night").strip()
    assert secret.startswith("whsec_")
    webhook_id, address, events, state, description = run("list").strip().split("\t")
    assert (address, events, state, description) == (receiver.url, "job.failed, batch.*", "enabled", "night")
    assert f"url\t{receiver.url}" in run("show", webhook_id)
    delivery_id = run("test", webhook_id).strip()
    assert receiver.wait(1)[0].id == delivery_id
    until(lambda: "\tdelivered\t" in run("deliveries", webhook_id))
    assert run("delivery", webhook_id, delivery_id).split("\t")[3] == "204"
    assert run("redeliver", webhook_id, delivery_id).strip() == delivery_id
    receiver.wait(2)
    assert run("rotate", webhook_id, "--overlap", "2h").startswith("whsec_")
    run("set", webhook_id, "--disable")
    assert orjson.loads(run("list", "--json"))[0]["enabled"] is False
    run("test", webhook_id, code=1)
    run("rm", webhook_id)
    assert run("list") == ""
    run("show", webhook_id, code=1)


# --- the document ----------------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """The names of the fields that are not null; the document leaves out the others."""
    if isinstance(value, dict):
        return {name: shape(child) for name, child in value.items() if child is not None}
    return [shape(value[0])] if isinstance(value, list) else type(value)


def test_the_examples_of_the_document_have_the_shapes_of_answers(site: Api, receiver: Receiver) -> None:
    shown = ok(site.http.get("/openapi.json"))["components"]["schemas"]
    made = create(site, receiver.url)
    job = site.run(CSV, "iris", metadata='{"night": "2026-11-20"}')
    (delivery,) = delivered(site, made["links"]["deliveries"])
    details = ok(site.http.get(delivery["links"]["self"]))
    assert job["id"] == delivery["job"]
    rotated = ok(site.http.post(f"{made['links']['self']}/rotate"))
    for name, answer in {
        "CreatedWebhook": made,
        "WebhookBody": ok(site.http.get(made["links"]["self"])),
        "DeliveryBody": delivery,
        "DeliveryDetails": details,
        "SecretBody": rotated,
    }.items():
        assert shape(shown[name]["example"]) == shape(answer), name
    site.http.delete(made["links"]["self"])
