"""What a job was made of: digests, versions and options, by which its result can be made again."""

from typing import Any

from batchserve import __version__
from batchserve.api.schemas.jobs import JobBody
from batchserve.domain import Job
from batchserve.storage.locations import is_external

__all__ = ["manifest_of"]


def manifest_of(job: Job, body: JobBody) -> dict[str, Any]:
    """As JSON has it."""
    shown = body.model_dump(mode="json")
    inputs = [
        {"filename": each.filename, "format": each.format, "bytes": each.bytes, "sha256": each.sha256}
        | ({"url": each.key, "version": each.version} if is_external(each.key) else {})
        for each in job.inputs
    ]
    model = None
    if job.model is not None:
        model = {"name": job.model.name, "version": job.model.version, "sha256": job.model.digest}
    return {
        "job": body.id,
        "state": shown["state"],
        "batchserve": __version__,
        "model": model,
        "inputs": inputs,
        "inputs_total": job.inputs_total,
        "options": shown["options"],
        "rows": shown["rows"],
        "result": shown["result"],
        "reused_from": body.reused_from,
        "created_at": shown["created_at"],
        "finished_at": shown["finished_at"],
        "notes": body.notes,
        "metadata": body.metadata,
    }
