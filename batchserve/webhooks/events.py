"""The events of webhooks, and their bodies: small, with links instead of results."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from batchserve.errors import presentable

__all__ = ["FAMILIES", "TEST", "TYPES", "body_of", "body_of_test", "wanted"]

_ENDS = ("completed", "failed", "cancelled", "expired")
_JOB, _BATCH = "job", "batch"
FAMILIES = (f"{_JOB}.*", f"{_BATCH}.*")
"""What an endpoint may ask for besides single types."""
TYPES = tuple(f"{family}.{end}" for family in (_JOB, _BATCH) for end in _ENDS)
"""The types of events about jobs. Those of batches are the same ends in the form of OpenAI's API."""
TEST = "webhook.test"
"""The type of an event that was asked for."""
_LONGEST_MESSAGE = 1000


def wanted(filters: object, state: str) -> list[str]:
    """The types of events that an endpoint with these filters gets for a job that has ended in this state."""
    if not isinstance(filters, Sequence):
        return []
    return [
        f"{family}.{state}" for family in (_JOB, _BATCH) if f"{family}.{state}" in filters or f"{family}.*" in filters
    ]


def body_of(message_id: str, kind: str, job: Mapping[str, Any], state: str, at: float) -> str:
    """The body of an event about a job that has ended. `job`: the columns of its row, of which some may be damaged."""
    if kind.startswith(f"{_BATCH}."):
        event = {"id": f"evt_{message_id}", "object": "event", "created_at": int(at), "type": kind}
        return _json({**event, "data": {"id": job["id"]}})
    error = job["error"] if isinstance(job["error"], dict) else {}
    data = {
        "id": job["id"],
        "tenant": job["tenant"],
        "state": state,
        "model": f"{job['model_name']}@{job['model_version']}" if job["model_name"] is not None else None,
        "rows": {
            "total": job["rows_planned"] if job["planned"] else None,
            "ok": job["rows_ok"],
            "failed": job["rows_failed"],
        },
        "error": {"code": error.get("code"), "message": _shortened(error.get("message"))} if error else None,
        "reused_from": job["reused_from"],
        "metadata": job["metadata"],
        "links": {
            "self": f"/v1/jobs/{job['id']}",
            "result": f"/v1/download/{job['id']}",
            "errors": f"/v1/download/{job['id']}/errors",
        },
    }
    return _json({"type": kind, "timestamp": _time(at), "data": data})


def body_of_test(endpoint_id: str, tenant: str, at: float) -> str:
    return _json({"type": TEST, "timestamp": _time(at), "data": {"webhook": endpoint_id, "tenant": tenant}})


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def _shortened(message: object) -> str | None:
    return None if message is None else str(message)[:_LONGEST_MESSAGE]


def _json(event: dict[str, Any]) -> str:
    return orjson.dumps(presentable(event)).decode()
