"""OpenAPI links: the operations that can follow a response.

They are derived from the document: a response with a job leads to each operation with `{job_id}` in its path, one with
a model to each with `{name}`.
"""

import re
from typing import Any

_KNOWN: dict[str, dict[str, str]] = {
    "#/components/schemas/JobBody": {"job_id": "id"},
    "#/components/schemas/JobList": {"job_id": "jobs/0/id"},
    "#/components/schemas/UploadBody": {"upload_id": "id"},
    "#/components/schemas/ScheduleBody": {"schedule_id": "id"},
    "#/components/schemas/ScheduleList": {"schedule_id": "schedules/0/id"},
    "#/components/schemas/ModelBody": {"name": "name", "version": "version"},
    "#/components/schemas/CreatedWebhook": {"webhook_id": "id"},
    "#/components/schemas/WebhookBody": {"webhook_id": "id"},
}
"""The path parameters in the body of a response, and their place in it."""
_PARAMETER = re.compile(r"\{(\w+)\}")


def add_links(document: dict[str, Any]) -> None:
    """Adds its links to each response with a known body."""
    operations = [
        (frozenset(_PARAMETER.findall(path)), operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method != "put"  # registration follows no operation
    ]
    for methods in document["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                for known in _known(response):
                    response["links"] = {
                        target["operationId"]: _link(target, parameters, known)
                        for parameters, target in operations
                        if parameters and parameters <= known.keys()
                    }


def _known(response: dict[str, Any]) -> list[dict[str, str]]:
    """The schemas of a response body, which may have alternatives."""
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    kinds = [schema, *schema.get("anyOf", ())]
    return [_KNOWN[kind["$ref"]] for kind in kinds if kind.get("$ref") in _KNOWN]


def _link(operation: dict[str, Any], parameters: frozenset[str], known: dict[str, str]) -> dict[str, Any]:
    return {
        "operationId": operation["operationId"],
        "description": operation["summary"],
        "parameters": {name: f"$response.body#/{known[name]}" for name in sorted(parameters)},
    }
