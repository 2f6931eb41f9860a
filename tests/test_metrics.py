"""What /metrics shows, of servers and of workers."""

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import graphs
import httpx2
import postgres
import pytest
from bench import Bench, opened, rows_of
from commands import FAST, Service, in_this_process
from exposed import SERIES, values_in, values_of
from hand import HandEngine
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from promtool import Promtool
from service import URL, Api, ok, problem, running
from starlette.testclient import TestClient
from waiting import until

from batchserve import keys
from batchserve.access import Scope
from batchserve.app import create_metrics_app
from batchserve.db.connect import Database, Moment
from batchserve.errors import OutOfMemory, ScoringCrashed, ScoringTimeout
from batchserve.jobs import workers
from batchserve.metrics import FAMILIES, Metrics
from batchserve.runtime import Runtime
from batchserve.scoring.checks import check_input
from batchserve.service.counted import Counted
from batchserve.settings import Settings, host_and_port

ROOT = Path(__file__).resolve().parent.parent
HEADER = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
CSV = HEADER + b"5.1,3.5,1.4,0.2\n"
QUOTAS = ("batchserve_quota_used", "batchserve_quota_limit")
OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service with a worker that has scored jobs of every kind."""
    with running(tmp_path_factory.mktemp("worked"), direct_seconds=0, inline_bytes=0, chunk_records=40_000) as api:
        api.register("iris", iris_onnx)
        api.run(CSV + b",,,\n", "iris")
        api.run(HEADER + b"5.1,3.5,1.4,0.2\n" * 70_000, "iris")
        body = ok(api.http.get("/v1/models/iris"))
        assert body["name"] == "iris"
        ok(api.http.post("/v1/models/iris/predict", content=CSV, headers={"content-type": "text/csv"}))
        until(lambda: scraped(api)["batchserve_workers"] == 1)
        yield api


def text_of(api: Api) -> str:
    answer = api.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    return answer.text


def scraped(api: Api) -> dict[str, float]:
    return values_in(text_of(api))


# --- the text --------------------------------------------------------------------------------------------------------


def test_every_series_is_of_a_declared_family_with_its_type_help_and_labels(worked: Api) -> None:
    declared = {family.name: family for family in FAMILIES}
    shown = set()
    for metric in text_string_to_metric_families(text_of(worked)):
        if metric.name.startswith("process_"):
            continue
        family = declared[metric.name + ("_total" if metric.type == "counter" else "")]
        shown.add(family.name)
        assert metric.documentation == family.help
        assert metric.type == ("gauge" if family.kind == "info" else family.kind)
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == set(family.labels), sample
            assert SERIES[sample.name] is family
    assert shown == set(declared)


def test_names_follow_the_rules_of_prometheus() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"batchserve(_[a-z]+)+", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.name.endswith("_seconds") or family.kind != "histogram", family.name
        assert family.help.endswith("."), family.name
        assert list(family.buckets) == sorted(set(family.buckets))


def test_promtool_has_nothing_to_say_about_them(worked: Api, promtool: Promtool) -> None:
    assert promtool.run("check", "metrics", input=text_of(worked)) == ""


def test_the_page_lists_every_family_and_no_other() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    parts = page.partition("## A process")
    for of, text in (("service", parts[0]), ("process", parts[2])):
        listed = re.findall(r"^\| `(batchserve_\w+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE)
        expected = [family for family in FAMILIES if family.of == of]
        assert [(name, kind) for name, kind, _ in listed] == [(family.name, family.kind) for family in expected]
        labels = [tuple(re.findall(r"`(\w+)`", named)) for *_, named in listed]
        assert labels == [family.labels for family in expected]


def test_openmetrics_is_sent_to_those_that_accept_it_and_has_the_same_values(worked: Api) -> None:
    plain = worked.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    answer = worked.http.get("/metrics", headers=OPENMETRICS)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    assert "_created" not in answer.text + plain.text
    families = {family.name: family for family in openmetrics_families(answer.text)}  # type: ignore[no-untyped-call]
    assert families["batchserve_build"].type == "info"
    ended = {sample.labels["outcome"]: sample.value for sample in families["batchserve_jobs_ended"].samples}
    assert ended == {"completed": 2, "failed": 0, "cancelled": 0}
    rows = {sample.labels["outcome"]: sample.value for sample in families["batchserve_rows"].samples}
    assert rows == {"ok": 70_001, "failed": 1}


# --- the whole service -----------------------------------------------------------------------------------------------


def test_jobs_rows_models_and_space_are_counted(worked: Api) -> None:
    found = scraped(worked)
    assert (found["batchserve_jobs{completed}"], found["batchserve_jobs_ended_total{completed}"]) == (2, 2)
    assert (found["batchserve_rows_total{ok}"], found["batchserve_rows_total{failed}"]) == (70_001, 1)
    assert (found["batchserve_models"], found["batchserve_model_versions"]) == (1, 1)
    assert (found["batchserve_workers"], found["batchserve_worker_processes"]) == (1, 1)
    assert found["batchserve_storage_free_bytes"] > 0
    assert found["batchserve_storage_required_bytes"] == worked.settings.free_bytes


@pytest.mark.slow
def test_the_counters_of_jobs_and_rows_survive_deletions_and_restarts(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        job = api.run(CSV, "iris")
        assert api.http.delete(job["links"]["self"]).status_code == 204
        found = scraped(api)
        assert found["batchserve_jobs{completed}"] == 0
        assert (found["batchserve_jobs_ended_total{completed}"], found["batchserve_rows_total{ok}"]) == (1, 1)
    with running(tmp_path) as api:
        api.run(CSV, "iris")
        found = scraped(api)
        assert (found["batchserve_jobs_ended_total{completed}"], found["batchserve_rows_total{ok}"]) == (2, 2)


def test_a_worker_is_alive_for_as_long_as_it_announces_itself(database: Database) -> None:
    def at(seconds: float, clock: str = "boot-1") -> Moment:
        return Moment(1_700_000_000.0 + seconds, 500.0 + seconds, clock)

    def living(now: Moment) -> tuple[int, int]:
        with database.read() as connection:
            found = workers.living(connection, now)
        return found.workers, found.processes

    with database.write() as connection:
        workers.announce(connection, "a", 4, 30.0, at(0))
        workers.announce(connection, "b", 2, 30.0, at(20))
    assert (living(at(29)), living(at(31)), living(at(51))) == ((2, 6), (1, 2), (0, 0))
    assert living(at(1, "boot-2")) == (0, 0)
    with database.write() as connection:
        workers.announce(connection, "a", 8, 30.0, at(60))
        workers.forget_lost(connection, at(60))
    assert living(at(61)) == (1, 8)
    with database.write() as connection:
        workers.forget_lost(connection, at(5000))
        workers.announce(connection, "a", 8, 30.0, at(5000))
        workers.leave(connection, "a")
    assert living(at(5000)) == (0, 0)


# --- a process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    with opened(database_url, tmp_path / "store", HandEngine(), chunk_records=10) as bench:
        yield bench


def counted(bench: Bench) -> dict[str, float]:
    return values_of(bench.runtime.metrics.collect())


def test_chunks_are_timed_by_stage_and_by_model(worked: Api) -> None:
    found = scraped(worked)
    for stage, calls in {"small": 1, "online": 1, "assemble": 1}.items():
        assert found[f"batchserve_stage_duration_seconds_count{{{stage}}}"] == calls
    assert found["batchserve_stage_duration_seconds_count{plan}"] >= 1
    chunks = found["batchserve_stage_duration_seconds_count{score}"]
    assert chunks == found["batchserve_chunk_duration_seconds_count{iris@1}"] > 1
    assert found["batchserve_stage_duration_seconds_sum{score}"] > 0
    assert found["batchserve_queue_wait_seconds_count"] == 2


def test_jobs_that_are_scored_within_their_call_are_timed_and_do_not_wait(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, direct_seconds=5.0) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/predict?model=iris", content=CSV), 202)
        assert job["state"] == "completed"
        found = scraped(api)
    assert found["batchserve_stage_duration_seconds_count{direct}"] == 1
    assert found["batchserve_queue_wait_seconds_count"] == 0
    assert found["batchserve_jobs_ended_total{completed}"] == 1


def test_a_wait_in_the_queue_ends_with_the_first_claim(bench: Bench) -> None:
    busy = bench.register("busy", graphs.busy())
    bench.submit(busy, rows_of(*range(3)))
    hand = bench.by_hand()
    hand.clock.advance(40.0)
    hand.work(*hand.calls())
    found = counted(bench)
    assert found["batchserve_queue_wait_seconds_count"] == 1
    assert found["batchserve_queue_wait_seconds_bucket{15.0}"] == 0
    assert found["batchserve_queue_wait_seconds_bucket{60.0}"] == 1


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ScoringCrashed("the scoring process died"), "crash"),
        (ScoringTimeout("it took too long"), "timeout"),
        (OutOfMemory("it needs more memory"), "memory"),
    ],
    ids=["crash", "timeout", "memory"],
)
def test_a_scoring_process_that_ends_within_a_call_is_counted_with_the_cause(
    bench: Bench, error: Exception, cause: str
) -> None:
    busy = bench.register("busy", graphs.busy())
    bench.submit(busy, rows_of(*range(30)))
    hand = bench.by_hand()
    calls = hand.chunks()
    calls[0].fail(error)
    for call in calls[1:]:
        call.seconds = 0.75
        call.run()
    hand.work()
    found = counted(bench)
    assert found[f"batchserve_scoring_crashes_total{{chunks,{cause}}}"] == 1
    assert sum(value for name, value in found.items() if "crashes_total" in name) == 1
    assert found["batchserve_chunk_duration_seconds_sum{busy@1}"] == 0.75 * (len(calls) - 1)
    assert found["batchserve_stage_duration_seconds_bucket{score,0.5}"] == 0


def test_a_crash_of_an_interactive_process_is_counted() -> None:
    class Dying:
        capacity = 3

        async def run(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:  # noqa: ARG002
            raise ScoringCrashed("the scoring process died")

        def close(self) -> None:
            """There is nothing to end."""

    metrics = Metrics()
    with pytest.raises(ScoringCrashed):
        asyncio.run(Counted(Dying(), metrics).run(check_input, seconds=1.0))
    found = values_of(metrics.collect())
    assert found["batchserve_scoring_crashes_total{interactive,crash}"] == 1
    assert found["batchserve_stage_duration_seconds_count{check}"] == 0


def test_jobs_of_lost_workers_are_counted_by_the_worker_that_finds_them(bench: Bench) -> None:
    busy = bench.register("busy", graphs.busy())
    bench.submit(busy, rows_of(*range(3)))
    lost, finder = bench.by_hand(), bench.by_hand()
    lost.calls()
    finder.calls()
    finder.clock.advance(100.0)
    finder.calls()
    assert counted(bench)["batchserve_jobs_rescued_total"] == 1


def test_labels_have_a_bounded_number_of_values() -> None:
    metrics = Metrics()
    for version in range(1, 151):
        metrics.observe_chunk(f"model@{version}", 0.1)
    for number in range(50):
        metrics.count_request("none", f"WORD-{number}", 501, 0.001, 0, 0)
    found = values_of(metrics.collect())
    chunks = [name for name in found if name.startswith("batchserve_chunk_duration_seconds_count")]
    assert len(chunks) == 101
    assert found["batchserve_chunk_duration_seconds_count{other}"] == 50
    assert found["batchserve_http_requests_total{none,other,5xx}"] == 50
    assert len([name for name in found if name.startswith("batchserve_http_requests_total")]) == 1


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("asked")) as api:
        api.register("iris", iris_onnx)
        yield api


def requests_of(found: dict[str, float]) -> dict[str, float]:
    name = "batchserve_http_requests_total"
    return {series.removeprefix(name)[1:-1]: value for series, value in found.items() if series.startswith(name)}


def more(api: Api, act: Callable[[], object]) -> dict[str, float]:
    """How many more requests were counted afterwards, without those for the metrics."""
    before = requests_of(scraped(api))
    act()
    after = requests_of(scraped(api))
    grown = {labels: value - before.get(labels, 0) for labels, value in after.items()}
    return {labels: value for labels, value in grown.items() if value and not labels.startswith("/metrics,")}


def test_requests_are_counted_by_route_also_those_that_are_answered_without_fastapi(asked: Api) -> None:
    http = asked.http

    def act() -> None:
        job = asked.upload(CSV)
        ok(http.post(f"/v1/predict/{job['id']}", params={"model": "iris"}, headers={"prefer": "wait=30"}))
        for _ in range(3):  # the last ones are cached
            ok(http.get(f"/v1/jobs/{job['id']}"))
        assert http.get(f"/v1/download/{job['id']}").is_success
        ok(http.post("/v1/models/iris/predict", content=CSV, headers={"content-type": "text/csv"}))
        assert http.get(f"/jobs/{job['id']}").is_success
        assert http.get("/static/style.css").is_success
        assert http.head("/livez").is_success

    assert more(asked, act) == {
        "/v1/upload,POST,2xx": 1,
        "/v1/predict/{job_id},POST,2xx": 1,
        "/v1/jobs/{job_id},GET,2xx": 3,
        "/v1/download/{job_id},GET,2xx": 1,
        "/v1/models/{name}/predict,POST,2xx": 1,
        "/jobs/{job_id},GET,2xx": 1,
        "/static/{path},GET,2xx": 1,
        "/livez,HEAD,2xx": 1,
    }


@pytest.mark.parametrize(
    ("method", "path", "headers", "labels"),
    [
        ("GET", "/v1/jobs/none", {}, "/v1/jobs/{job_id},GET,4xx"),
        ("GET", "/nowhere/1/2/3", {}, "none,GET,4xx"),
        ("DELETE", "/v1/jobs", {}, "/v1/jobs,DELETE,4xx"),
        ("BREW", "/v1/jobs", {}, "/v1/jobs,other,5xx"),
        ("GET", "/v1/jobs", {"host": "elsewhere.example"}, "none,GET,4xx"),
        ("POST", "/v1/predict?model=none", {}, "/v1/predict,POST,4xx"),
    ],
)
def test_refused_requests_are_counted(asked: Api, method: str, path: str, headers: dict[str, str], labels: str) -> None:
    assert more(asked, lambda: asked.http.request(method, path, headers=headers)) == {labels: 1}


def test_bodies_are_counted_as_they_were_sent_and_requests_are_timed(asked: Api) -> None:
    upload, download = "{/v1/upload,POST}", "{/v1/download/{job_id},GET}"
    received, sent = f"batchserve_http_request_bytes_total{upload}", f"batchserve_http_response_bytes_total{download}"
    timed = f"batchserve_http_request_duration_seconds_count{upload}"
    job = asked.run(CSV, "iris")
    asked.result(job)
    asked.upload(CSV)
    before = scraped(asked)
    asked.upload(CSV * 3)
    size = len(asked.result(job).content)
    after = scraped(asked)
    assert after[received] - before[received] == 3 * len(CSV)
    assert after[sent] - before[sent] == size
    assert after[timed] - before[timed] == 1
    assert after["batchserve_http_requests_in_progress"] == 1  # this one


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_and_a_worker_show_the_same_of_the_service_and_each_what_it_counts(
    start_server: Callable[..., AbstractContextManager[str]], tmp_path: Path, iris_onnx: Path
) -> None:
    quick = {"BATCHSERVE_LEASE": "2", "BATCHSERVE_HEARTBEAT": "0.3", "BATCHSERVE_POLL": "0.1"}
    with start_server(tmp_path, "--no-worker", **quick) as url:
        address = {**FAST, **quick, "BATCHSERVE_METRICS_ADDRESS": "127.0.0.1:0"}
        worker = Service(tmp_path, "worker", settings=address)
        try:
            metrics = worker.wait_for(r"metrics at (http://\S+)/metrics")[1]
            httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).raise_for_status()
            large = HEADER + b"5.1,3.5,1.4,0.2\n" * 70_000
            predict, wait = f"{url}/v1/predict?model=iris", {"prefer": "wait=60"}
            assert ok(httpx2.post(predict, content=large, headers=wait, timeout=90))["state"] == "completed"
            until(lambda: _values(url)["batchserve_workers"] == 1)
            server, there = _values(url), _values(metrics)
            of_service = {name for name in server if SERIES.get(name.partition("{")[0], FAMILIES[-1]).of == "service"}
            assert {name: server[name] for name in of_service} == {name: there[name] for name in of_service}
            assert server["batchserve_rows_total{ok}"] == 70_000
            assert there["batchserve_chunk_duration_seconds_count{iris@1}"] > 1
            assert there["batchserve_queue_wait_seconds_count"] == 1
            assert server["batchserve_queue_wait_seconds_count"] == 0
            assert server["batchserve_http_requests_total{/v1/predict,POST,2xx}"] == 1
            assert "batchserve_http_requests_total{/v1/predict,POST,2xx}" not in there
            assert ok(httpx2.get(f"{metrics}/livez"))["status"] == "ok"
            assert httpx2.get(f"{metrics}/v1/jobs").status_code == 404
            named = httpx2.get(f"{metrics}/livez", headers={"x-request-id": "probe-1"})
            assert named.headers["x-request-id"] == "probe-1"
            problem(httpx2.get(f"{metrics}/metrics", headers={"host": "elsewhere.example"}), 421, "misdirected-request")

            created = in_this_process(tmp_path, "keys", "create", "scraper", "--scope", "admin", "--json")
            key = json.loads(created.stdout)["key"]
            problem(httpx2.get(f"{metrics}/metrics"), 401, "unauthorized")
            scraper = {"authorization": f"Bearer {key}"}
            assert httpx2.get(f"{metrics}/metrics", headers=scraper).is_success

            worker.end(signal.SIGKILL)
            until(lambda: values_in(httpx2.get(f"{url}/metrics", headers=scraper).text)["batchserve_workers"] == 0)
        finally:
            worker.end()


def _values(url: str) -> dict[str, float]:
    answer = httpx2.get(f"{url}/metrics", timeout=30)
    assert answer.status_code == 200, answer.text
    return values_in(answer.text)


@pytest.mark.slow
def test_a_worker_that_stops_is_not_counted_any_more(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        until(lambda: scraped(api)["batchserve_workers"] == 1)
    with running(tmp_path, worker=False) as api:
        assert scraped(api)["batchserve_workers"] == 0


def test_a_worker_answers_a_scrape_with_its_request_id(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"storage": str(tmp_path), "processes": 1, **postgres.chosen_database(tmp_path)}
    with Runtime.open(Settings(**chosen)) as runtime:
        http = TestClient(create_metrics_app(runtime, "127.0.0.1"), base_url=URL)
        scraped = http.get("/metrics", headers={"x-request-id": "scrape-1"})
        assert (scraped.status_code, scraped.headers["x-request-id"]) == (200, "scrape-1")
        assert values_in(scraped.text)["batchserve_workers"] == 0
        missing = http.get("/v1/jobs", headers={"x-request-id": "scrape-2"})
        assert problem(missing, 404, "not-found")["request_id"] == "scrape-2"


def test_what_is_refused_before_a_route_is_counted(server: str) -> None:
    refused = "batchserve_http_refusals_total{414}"
    before = _values(server).get(refused, 0)
    assert httpx2.get(f"{server}/{'a' * 20_000}").status_code == 414
    assert _values(server)[refused] == before + 1


def test_quotas_of_other_tenants_are_shown_to_administrators_of_all_alone(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"storage": str(tmp_path), "processes": 1, **postgres.chosen_database(tmp_path)}
    with running(tmp_path, worker=False) as api, Runtime.open(Settings(**chosen)) as runtime:
        for tenant in ("red", "blue"):
            ok(api.http.put(f"/v1/quotas/{tenant}", json={"jobs": 3}))
        both = {f'{name}{{quota="jobs",tenant="{tenant}"}}' for name in QUOTAS for tenant in ("red", "blue")}
        red = {series for series in both if "red" in series}
        worker = TestClient(create_metrics_app(runtime, "127.0.0.1"), base_url=URL)

        def shown(headers: dict[str, str]) -> list[set[str]]:
            texts = [http.get("/metrics", headers=headers).text for http in (api.http, worker)]
            return [{line.split(" ")[0] for line in text.splitlines()} & both for text in texts]

        assert shown({}) == [both, both]
        with runtime.database.write() as connection:
            of = {"*": "all", "red": "red"}
            made = {one: keys.create(connection, name, Scope.ADMIN, one, 1.0)[1] for one, name in of.items()}
        for tenant, seen in (("*", both), ("red", red), ("*", both)):
            assert shown({"authorization": f"Bearer {made[tenant]}"}) == [seen, seen]


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", "192.0.2.1:9464"])
def test_a_worker_refuses_an_address_for_metrics_that_others_can_reach(address: str, tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "worker", BATCHSERVE_METRICS_ADDRESS=address)
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["9464", "localhost", "localhost:", "localhost:70000", "http://localhost:80", ":80"]
)
def test_an_address_for_metrics_without_host_and_port_is_refused(address: str, tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "worker", BATCHSERVE_METRICS_ADDRESS=address)
    assert done.returncode == 2
    assert "BATCHSERVE_METRICS_ADDRESS" in done.stderr


def test_an_address_for_metrics_has_a_host_and_a_port() -> None:
    assert host_and_port(Settings(metrics_address="[::1]:9464").metrics_address) == ("::1", 9464)
    assert host_and_port(Settings(metrics_address="localhost:0").metrics_address) == ("localhost", 0)
    assert host_and_port(Settings().metrics_address) is None
