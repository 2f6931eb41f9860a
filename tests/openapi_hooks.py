"""Information for schemathesis besides the OpenAPI document: how NDJSON is written, and IDs of existing jobs.

Loaded by its command (SCHEMATHESIS_HOOKS), not by pytest. OPENAPI_JOBS: the IDs of finished jobs.
"""

import json
import os
import zlib
from typing import Any

import schemathesis
from schemathesis.transport.serialization import Binary

JOBS = os.environ["OPENAPI_JOBS"].split(",")
CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


@schemathesis.serializer("application/x-ndjson")
def ndjson(_: schemathesis.SerializationContext, value: Any) -> bytes:
    if isinstance(value, Binary):
        return value.data
    if isinstance(value, bytes | str):
        return value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
    lines = value if isinstance(value, list) else [value]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: dict[str, Any] | None) -> Any:
    """Two of three generated names are replaced by existing ones; otherwise most requests would end with a 404."""
    choice = zlib.crc32(repr(path_parameters).encode(errors="surrogatepass"))
    if path_parameters is not None and "tenant" in path_parameters:  # a quota of others would refuse what follows
        return path_parameters | {"tenant": "nobody"}
    deletes = context.operation is not None and context.operation.method.upper() in ("PUT", "DELETE")
    if path_parameters is None or deletes or choice % 3 == 0:
        return path_parameters
    there = {"job_id": JOBS[choice % len(JOBS)], "schedule_id": "nightly", "name": "iris", "version": "1"}
    there |= {"webhook_id": "jobs"}
    return {name: there.get(name, value) for name, value in path_parameters.items()}


@schemathesis.hook
def map_query(_: schemathesis.HookContext, query: dict[str, Any] | None) -> Any:
    """Limits waits, which would otherwise take most of the time."""
    if query is None or not isinstance(query.get("wait"), int | float) or isinstance(query["wait"], bool):
        return query
    return query | {"wait": min(query["wait"], 0.2)}


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: Any) -> Any:
    """Every second input is one that the model takes; otherwise no job would get beyond its upload."""
    named = context.operation is not None and context.operation.definition.raw.get("operationId")
    if (
        named in ("upload", "upload_and_predict", "predict")
        and zlib.crc32(repr(case.query).encode(errors="replace")) % 2
    ):
        if named != "predict":
            case.media_type, case.body = "text/csv", CSV
            case.headers["content-type"] = "text/csv"
        case.query = {"model": "iris"}
    return case
