"""Traces, as a receiver of OTLP over HTTP gets them."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import FAST, Service
from service import Api, ok, running
from structlog.testing import capture_logs
from waiting import until

from batchserve import tracing
from batchserve.correlation import parsed_traceparent
from batchserve.db.connect import Database
from batchserve.jobs import queries

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra [otel] is not installed")

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
UPLOADING, PREDICTING = "a" * 32, "b" * 32
"""Traces of clients."""
CALLER = "c" * 16
"""The span of a client."""


def traceparent(trace: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{CALLER}-{flags}"}


@dataclass
class Receiver:
    """A receiver on a free port of this host."""

    url: str
    spans: list[Any] = field(default_factory=list)
    services: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.paths.add(path)
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {one.value.string_value for one in sent.resource.attributes if one.key == "service.name"}
            self.spans += [span for scope in sent.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def only(self, name: str) -> Any:
        (span,) = self.named(name)
        return span


def facts(span: Any) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.take(self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def traced(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """The receiver of this process. It has all spans at the end of a service."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return receiver


def quick(receiver: Receiver) -> dict[str, str]:
    """Settings of processes that export soon."""
    return {**FAST, "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_is_a_span_in_the_trace_of_its_caller(traced: Receiver, tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        headers = {**traceparent(UPLOADING), "x-request-id": "night"}
        assert api.http.get("/v1/jobs/none", headers=headers).status_code == 404
        assert api.http.get("/livez").is_success
    span = traced.only("GET /v1/jobs/{job_id}")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (UPLOADING, CALLER)
    assert span.kind == span.SPAN_KIND_SERVER
    assert facts(span) == {
        "http.request.method": "GET", "http.route": "/v1/jobs/{job_id}", "http.response.status_code": 404,
        "url.path": "/v1/jobs/none", "client.address": "testclient", "batchserve.request_id": "night",
        "batchserve.tenant": "default",
    }  # fmt: skip
    assert span.status.code != span.status.STATUS_CODE_ERROR
    assert len(traced.spans) == 1  # none for a probe
    assert (traced.services, traced.paths) == ({"batchserve"}, {"/v1/traces"})


def test_a_server_error_is_one_of_the_span(traced: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("batchserve.api.job_list.read_slice", fail)
    with running(tmp_path, worker=False) as api, capture_logs():
        assert api.http.get("/v1/jobs").status_code == 500
    span = traced.only("GET /v1/jobs")
    assert (span.status.code, span.status.message) == (span.status.STATUS_CODE_ERROR, "status 500")
    assert span.parent_span_id == b""


def test_a_caller_that_does_not_sample_is_followed(traced: Receiver, tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        assert api.http.get("/v1/jobs", headers=traceparent(UPLOADING, flags="00")).is_success
        assert api.http.get("/v1/models", headers=traceparent(UPLOADING)).is_success
    assert [span.name for span in traced.spans] == ["GET /v1/models"]


VALID = f"00-{UPLOADING}-{CALLER}-01"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (VALID, VALID),
        (f"01{VALID[2:]}", VALID),
        (f"cc{VALID[2:]}-what-comes-later", VALID),
        (f"{VALID}-more", None),
        (f"cc{VALID[2:]}.more", None),
        (f"ff{VALID[2:]}", None),
        (VALID.upper(), None),
        (VALID.replace("a", "0"), None),
        (VALID.replace("c", "0"), None),
        (VALID[:-1], None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_is_read_as_the_recommendation_says(given: str | None, expected: str | None) -> None:
    assert parsed_traceparent(given) == expected


# --- jobs ------------------------------------------------------------------------------------------------------------


def submitted(http: httpx2.Client, content: str, **query: str) -> str:
    """The ID of a job that is uploaded in one trace and predicted in another."""
    uploaded = ok(http.post("/v1/upload", content=content, headers=traceparent(UPLOADING)), 201)
    query = {"model": "iris", "reuse": "false", **query}
    headers = {**traceparent(PREDICTING), "x-request-id": "night"}
    ok(http.post(f"/v1/predict/{uploaded['id']}", params=query, headers=headers), 202)
    return str(uploaded["id"])


def ids(span: Any) -> tuple[str, str]:
    return span.trace_id.hex(), span.span_id.hex()


@pytest.mark.slow
def test_the_job_of_a_worker_is_linked_to_upload_and_predict_of_a_server(
    receiver: Receiver, tmp_path: Path, iris_onnx: Path
) -> None:
    """Each is a process of its own. The job has many chunks."""
    header, row, _ = CSV.split("\n")
    server = Service(tmp_path, "serve", "--no-worker", "--port", "0", settings=quick(receiver))
    try:
        server.url = server.wait_for(r" at (http://\S+) ")[1]
        with httpx2.Client(base_url=server.url, timeout=30) as http:
            http.put("/v1/models/iris", content=iris_onnx.read_bytes()).raise_for_status()
            job_id = submitted(http, f"{header}\n" + f"{row}\n" * 100_000)
            worker = Service(tmp_path, "worker", settings=quick(receiver) | {"OTEL_SERVICE_NAME": "night-worker"})
            try:
                until(lambda: http.get(f"/v1/jobs/{job_id}").json()["state"] == "completed")
                until(lambda: bool(receiver.named("job")))
            finally:
                worker.end(15)
    finally:
        server.end(15)

    job, upload, predict = (receiver.only(name) for name in ("job", "POST /v1/upload", "POST /v1/predict/{job_id}"))
    assert (upload.trace_id.hex(), predict.trace_id.hex()) == (UPLOADING, PREDICTING)
    assert ids(job)[0] == PREDICTING
    assert job.parent_span_id == predict.span_id
    assert [ids(link) for link in job.links] == [ids(upload), ids(predict)]
    assert job.kind == job.SPAN_KIND_CONSUMER
    told = facts(job)
    chunks = told.pop("batchserve.rows")
    assert told == {
        "batchserve.job_id": job_id, "batchserve.attempt": 1, "batchserve.model": "iris@1",
        "batchserve.request_id": "night", "batchserve.outcome": "completed", "batchserve.rows_failed": 0,
    }  # fmt: skip
    assert chunks == 100_000
    scored = sorted(receiver.named("chunk"), key=lambda span: int(str(facts(span)["batchserve.first_record"])))
    assert len(scored) > 1
    assert sum(int(str(facts(span)["batchserve.records"])) for span in scored) == 100_000
    for span in (*receiver.named("plan"), *scored, receiver.only("assemble")):
        assert (span.trace_id, span.parent_span_id) == (job.trace_id, job.span_id)
        assert facts(span)["batchserve.job_id"] == job_id
        assert job.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    assert receiver.services == {"batchserve", "night-worker"}


@pytest.fixture
def by_worker(traced: Receiver, tmp_path: Path, iris_onnx: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a job by the worker of a service in this process."""
    assert traced.spans == []
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)

        def run(content: str, **query: str) -> dict[str, Any]:
            return api.finished(submitted(api.http, content, priority="-1", **query))  # not within the call

        yield run


def test_a_small_job_has_one_stage(by_worker: Callable[..., dict[str, Any]], traced: Receiver) -> None:
    job = by_worker(CSV)
    assert job["state"] == "completed"
    until(lambda: bool(traced.named("job")))
    (stage,) = traced.named("plan, chunk and assemble")
    assert stage.parent_span_id == traced.only("job").span_id


def test_a_job_that_fails_has_its_error_in_the_span(by_worker: Callable[..., dict[str, Any]], traced: Receiver) -> None:
    job = by_worker(f"{CSV}5.1,tall,1.4,0.2\n", on_row_error="fail")
    assert job["state"] == "failed"
    until(lambda: bool(traced.named("job")))
    span = traced.only("job")
    assert facts(span)["batchserve.outcome"] == "failed"
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert span.status.message.startswith(job["error"]["code"])


@pytest.mark.slow
def test_a_server_without_a_receiver_passes_the_trace_of_its_caller_on(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        job_id = submitted(api.http, CSV)
        assert stored(api, job_id) == (f"00-{UPLOADING}-{CALLER}-01", f"00-{PREDICTING}-{CALLER}-01")
        plain = api.http.post("/v1/predict?model=iris", content=CSV, headers={"traceparent": "nonsense"})
        assert stored(api, ok(plain, 202)["id"]) == (None, None)


def stored(api: Api, job_id: str) -> tuple[str | None, str | None]:
    with closing(Database(api.settings.database_url)) as database, database.read() as connection:
        job = queries.get(connection, job_id)
    return job.upload_traceparent, job.traceparent


# --- when it is off --------------------------------------------------------------------------------------------------


OFF: list[dict[str, str]] = [
    {},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
    {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1"},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
]


@pytest.mark.slow
def test_no_sdk_of_opentelemetry_is_imported_unless_a_receiver_is_named(tmp_path: Path) -> None:
    code = (
        "import json, os, sys\nfrom batchserve import tracing\nfrom batchserve.app import create_app\n"
        "import batchserve.worker\ncreate_app()\n"
        "for environment in json.loads(sys.argv[1]):\n"
        "    os.environ.update(environment)\n"
        "    with tracing.exporting():\n        assert tracing.begin('x') is None, environment\n"
        "    for name in environment:\n        del os.environ[name]\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", code, json.dumps(OFF)]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_a_receiver_without_the_extra_is_a_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with capture_logs() as lines, tracing.exporting():
        assert not tracing.is_on()
    (line,) = lines
    assert (line["action"], line["log_level"]) == ("tracing_off", "warning")
    assert line["reason"] == "the extra [otel] is not installed"


def test_another_protocol_is_a_warning(traced: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with capture_logs() as lines, tracing.exporting():
        assert not tracing.is_on()
    assert [line["reason"] for line in lines] == ["expected the OTLP protocol http/protobuf, got 'grpc'"]
    assert traced.spans == []


def test_spans_end_with_the_block_that_exports_them(traced: Receiver) -> None:
    with tracing.exporting():
        assert tracing.is_on()
        span = tracing.begin("first", parent="nonsense", links=("nonsense", None), batchserve__job_id="1", other=None)
        assert span is not None
        span.end(error="why", batchserve__rows=7)
    assert tracing.begin("second") is None
    found = traced.only("first")
    assert facts(found) == {"batchserve.job_id": "1", "batchserve.rows": 7}
    assert (found.status.message, list(found.links), found.parent_span_id) == ("why", [], b"")
