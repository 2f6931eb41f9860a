"""What the documentation shows: answers of a real service, to the data and model of `make demo` or to iris."""

from typing import Any

DIGEST = "c35a1b4e21b0e4f505a858842c44b819c365dfeee0611494181952ae53485081"
_ID = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"
_REFERENCE = {"name": "iris", "version": 1, "digest": DIGEST}
_FLOWER = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}
_ANSWER = {
    "prediction": "setosa",
    "probability_setosa": 0.9847032,
    "probability_versicolor": 0.015296762,
    "probability_virginica": 6.203781e-8,
}

PROBLEM: dict[str, Any] = {
    "type": "/problems/schema-mismatch",
    "code": "schema-mismatch",
    "title": "Schema mismatch",
    "status": 422,
    "detail": "column 'petal width (cm)': expected float32, got 'wide' in record 0",
    "instance": "/v1/predict",
    "errors": [
        {
            "row": 0,
            "column": "petal width (cm)",
            "value": "'wide'",
            "expected": "float32",
            "message": "expected float32, got 'wide' in record 0",
        }
    ],
    "request_id": "01a1f7d8-94a0-7f31-8f4d-51c7a0c5b7e2",
}

QUEUED: dict[str, Any] = {
    "queued": 1,
    "completed": 0,
    "refused": [
        {
            "id": "01a1f7d8-94b1-7c60-9ab7-51e2a0d2f4c8",
            "problem": {"code": "schema-mismatch", "detail": PROBLEM["detail"]},
        }
    ],
    "jobs": [_ID],
}

JOB_REQUEST: dict[str, Any] = {
    "input": {"urls": ["file:///data/in/2026-11-*.parquet"]},
    "model": "iris",
    "output": {"url": "file:///data/out/{date}/{stem}.parquet"},
}

INPUTS: dict[str, Any] = {
    "inputs": [
        {
            "number": 0,
            "url": "file:///data/in/2026-11-01.parquet",
            "filename": "2026-11-01.parquet",
            "format": "parquet",
            "bytes": 4211,
            "sha256": None,
            "version": "4211-1793606400000000000-1311",
            "output": "file:///data/out/2026-11-30/2026-11-01.parquet",
        }
    ],
    "next": None,
}

JOB: dict[str, Any] = {
    "id": _ID,
    "tenant": "default",
    "state": "completed",
    "reason": None,
    "model": _REFERENCE,
    "input": {
        "bytes": 2470,
        "sha256": "9e9a173037b493d682c174f608f9bbeb86787eb5484c3d917f50a0fefa2231f8",
        "url": None,
        "query": None,
        "connection": None,
        "files": 1,
        "media_type": "text/csv",
        "format": "csv",
        "filename": "flowers.csv",
        "rows": 150,
    },
    "options": {
        "format": "csv",
        "passthrough": "unused",
        "columns": None,
        "key": None,
        "on_row_error": "continue",
        "max_errors": None,
        "top_k": None,
        "inputs": None,
        "input_file": False,
        "priority": 0,
        "run_after": None,
        "webhook": None,
        "expires_in": None,
    },
    "attempt": 1,
    "attempts": [
        {
            "number": 1,
            "worker": "host-1-30654",
            "started_at": "2026-11-20T07:25:28.662261Z",
            "finished_at": "2026-11-20T07:25:28.835744Z",
            "outcome": "completed",
            "error": None,
        }
    ],
    "cancel_requested": False,
    "rows": {"total": 150, "ok": 149, "failed": 1},
    "chunks": {"total": 1, "done": 1},
    "progress": 1.0,
    "rows_per_s": 864.6,
    "eta_s": None,
    "queue_position": None,
    "result": {
        "bytes": 6676,
        "sha256": "5ed5db16e70d8e3ab35e147e04eb99edc274700edfd5922223ea89837fe1ac4d",
        "media_type": "text/csv",
        "format": "csv",
        "rows": 150,
    },
    "reused_from": None,
    "error": None,
    "notes": [],
    "created_at": "2026-11-20T07:25:28.649046Z",
    "queued_at": "2026-11-20T07:25:28.649046Z",
    "started_at": "2026-11-20T07:25:28.662261Z",
    "finished_at": "2026-11-20T07:25:28.835744Z",
    "expires_at": None,
    "request_id": "01a1f7d8-94a1-7c02-b0a1-4d3a6c0f6a55",
    "metadata": {"night": "2026-11-20"},
    "links": {
        "self": f"/v1/jobs/{_ID}",
        "input": f"/v1/download/{_ID}/input",
        "inputs": f"/v1/jobs/{_ID}/inputs",
        "result": f"/v1/download/{_ID}",
        "errors": f"/v1/download/{_ID}/errors",
        "events": f"/v1/jobs/{_ID}/events",
        "cancel": f"/v1/jobs/{_ID}/cancel",
    },
}
JOBS: dict[str, Any] = {"jobs": [JOB], "next": _ID, "total": None}

MODEL: dict[str, Any] = {
    "name": "iris",
    "version": 1,
    "digest": DIGEST,
    "bytes": 2012,
    "task": "classification",
    "columns": [{"name": name, "dtype": "float32", "nullable": False} for name in _FLOWER],
    "inputs": [{"name": "input", "dtype": "float32", "shape": [None, 4], "columns": list(_FLOWER)}],
    "outputs": [
        {"name": "label", "dtype": "string", "shape": [None]},
        {"name": "probabilities", "dtype": "float32", "shape": [None, 3]},
    ],
    "result_columns": {name: "String" if name == "prediction" else "Float32" for name in _ANSWER},
    "labels": ["setosa", "versicolor", "virginica"],
    "mode": "rows",
    "batch": 4096,
    "threads": 1,
    "provider": "cpu",
    "records_per_second": 21_700_000.0,
    "notes": [],
    "changes": None,
    "sample": [_FLOWER],
    "metadata": {"batchserve.task": "classification", "producer": "skl2onnx 1.20.0"},
    "created_at": "2026-11-20T07:25:28.574978Z",
    "links": {
        "self": "/v1/models/iris/versions/1",
        "versions": "/v1/models/iris/versions",
        "predict": "/v1/models/iris/predict",
        "validate": "/v1/models/iris/validate",
    },
}
MODELS: dict[str, Any] = {"models": [MODEL], "next": None}

UPLOAD: dict[str, Any] = {
    "id": _ID,
    "bytes": 1048576,
    "part_bytes": 1048576,
    "urls": [f"https://bucket.s3.amazonaws.com/prefix/uploads/{_ID}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-..."],
    "expires_at": "2026-11-20T13:25:04.506121Z",
    "links": {"self": f"/v1/uploads/{_ID}", "complete": f"/v1/uploads/{_ID}/complete"},
}

ONLINE: dict[str, Any] = {
    "prediction": [{**_FLOWER, **_ANSWER}],
    "errors": [],
    "model": _REFERENCE,
    "inference_ms": 0.021,
}
VALIDATION: dict[str, Any] = {
    "valid": False,
    "errors": [
        {
            "record": 1,
            "column": "petal length (cm)",
            "code": "missing-value",
            "message": "no value for 'petal length (cm)', and the model needs one",
        }
    ],
    "model": _REFERENCE,
}

SCHEDULE_REQUEST: dict[str, Any] = {
    "name": "nightly",
    "cron": "0 2 * * *",
    "time_zone": "Europe/Zurich",
    "request": {
        "input": {"urls": ["file:///data/in/{date-1d}/*.parquet"]},
        "model": "iris",
        "output": {"url": "file:///data/out/{date-1d}/{stem}.parquet"},
    },
    "catch_up": "last",
    "overlap": "skip",
}
TICK: dict[str, Any] = {
    "id": 41,
    "at": "2026-11-20T02:00:00+01:00",
    "kind": "due",
    "state": "queued",
    "jobs": [{"id": _ID, "state": "completed"}],
    "jobs_total": 1,
    "job_states": {"completed": 1},
    "error": None,
    "attempt": 1,
    "created_at": "2026-11-20T01:00:00.004000Z",
    "ended_at": "2026-11-20T01:00:00.318000Z",
}
TICKS: dict[str, Any] = {"ticks": [TICK], "next": None}
_SCHEDULE_LINK = "/v1/schedules/01a1f7d8-94c8-7d31-8b0f-4f1c0a6f3e21"
SCHEDULE: dict[str, Any] = {
    "id": _SCHEDULE_LINK.rpartition("/")[2],
    "tenant": "default",
    "action": "job",
    "catch_up_limit": 100,
    **SCHEDULE_REQUEST,
    "meaning": "At 02:00 every day",
    "paused": False,
    "next": [f"2026-11-{day}T02:00:00+01:00" for day in range(21, 26)],
    "last": TICK,
    "created_at": "2026-11-01T09:12:40.551000Z",
    "changed_at": "2026-11-01T09:12:40.551000Z",
    "paused_at": None,
    "links": {"self": _SCHEDULE_LINK}
    | {name: f"{_SCHEDULE_LINK}/{name}" for name in ("ticks", "run", "pause", "resume")},
}
SCHEDULES: dict[str, Any] = {"schedules": [SCHEDULE], "next": None}

AUDIT: dict[str, Any] = {
    "entries": [
        {
            "id": 17,
            "at": "2026-11-20T08:15:30.120000Z",
            "tenant": "sales",
            "key": "night",
            "action": "delete",
            "kind": "job",
            "subject": _ID,
        }
    ],
    "next": 17,
}
_HOOK = "01a1f7d9-03c7-7f60-b4de-6a2f1e8c9d10"
_MESSAGE = "01a1f7da-1b7e-7a52-9c1d-3f0c2a917e64"
SECRET: dict[str, Any] = {
    "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwNl1Cb2iN0aE=",
    "earlier_until": "2026-11-21T07:25:28.835744Z",
}
NEW_WEBHOOK: dict[str, Any] = {
    "url": "https://example.com/hook",
    "events": ["job.completed", "job.failed"],
    "description": "the night run",
}
WEBHOOK: dict[str, Any] = {
    "id": _HOOK,
    "tenant": "default",
    **NEW_WEBHOOK,
    "enabled": True,
    "reason": None,
    "failing_since": None,
    "created_at": "2026-11-20T07:25:28.649046Z",
    "links": {
        "self": f"/v1/webhooks/{_HOOK}",
        "deliveries": f"/v1/webhooks/{_HOOK}/deliveries",
        "test": f"/v1/webhooks/{_HOOK}/test",
    },
}
CREATED_WEBHOOK: dict[str, Any] = {**WEBHOOK, "secret": SECRET["secret"]}
DELIVERY: dict[str, Any] = {
    "id": _MESSAGE,
    "event": "job.completed",
    "job": _ID,
    "url": None,
    "state": "delivered",
    "attempts": 1,
    "next_attempt_at": None,
    "created_at": "2026-11-20T07:25:28.835744Z",
    "ended_at": "2026-11-20T07:25:29.120385Z",
    "links": {
        "self": f"/v1/webhooks/{_HOOK}/deliveries/{_MESSAGE}",
        "redeliver": f"/v1/webhooks/{_HOOK}/deliveries/{_MESSAGE}/redeliver",
    },
}
DELIVERY_DETAILS: dict[str, Any] = {
    **DELIVERY,
    "body": {
        "type": "job.completed",
        "timestamp": "2026-11-20T07:25:28.835744Z",
        "data": {
            "id": _ID,
            "tenant": "default",
            "state": "completed",
            "model": "iris@1",
            "rows": {"total": 150, "ok": 149, "failed": 1},
            "error": None,
            "reused_from": None,
            "metadata": {"night": "2026-11-20"},
            "links": {
                "self": f"/v1/jobs/{_ID}",
                "result": f"/v1/download/{_ID}",
                "errors": f"/v1/download/{_ID}/errors",
            },
        },
    },
    "log": [
        {
            "number": 1,
            "at": "2026-11-20T07:25:28.982117Z",
            "seconds": 0.138,
            "status": 204,
            "response": "",
            "error": None,
        }
    ],
}
NEW_QUOTA: dict[str, Any] = {
    "jobs": 100,
    "bytes": 50_000_000_000,
    "rows_per_day": 10_000_000,
    "requests_per_second": 20.0,
}
QUOTA: dict[str, Any] = {**NEW_QUOTA, "tenant": "sales"}
USAGE: dict[str, Any] = {
    "tenant": "sales",
    "jobs": {"used": 3, "limit": 100},
    "bytes": {"used": 1_204_332, "limit": 50_000_000_000},
    "rows_per_day": {"used": 15_150, "limit": 10_000_000, "resets_at": "2026-11-21T00:00:00Z"},
    "requests_per_second": 20.0,
}
HEALTH: dict[str, Any] = {"status": "ok", "version": "0.1.0"}
READINESS: dict[str, Any] = {**HEALTH, "checks": {"database": "ok", "storage": "ok"}, "unreadable_rows": 0}
UNREADINESS: dict[str, Any] = {
    "status": "unavailable",
    "version": "0.1.0",
    "checks": {"database": "the database does not respond; try again in a moment", "storage": "ok"},
}
METRICS = '# HELP batchserve_jobs Jobs by state.\n# TYPE batchserve_jobs gauge\nbatchserve_jobs{state="queued"} 0.0\n'
EVENTS = (
    f'event: state\nid: running-1-8-0p\ndata: {{"id": "{_ID}", "state": "running", "progress": 0.0}}\n\n'
    f'event: progress\nid: running-1-8-5p\ndata: {{"id": "{_ID}", "state": "running", "progress": 0.62}}\n\n'
)
ERRORS = '{"record":17,"column":"petal width (cm)","code":"wrong-type","message":"expected float32, got \'wide\'"}\n'
ERRORS_CSV = "record,key,column,code,message\n17,,petal width (cm),wrong-type,\"expected float32, got 'wide'\"\n"
