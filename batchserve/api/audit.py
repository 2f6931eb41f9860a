"""/v1/audit: who cancelled, retried, deleted or registered what."""

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BeforeValidator

from batchserve import audit
from batchserve.access import Action, Kind
from batchserve.api.auth import ADMIN, CallerDep
from batchserve.api.deps import PROBLEMS, ServiceDep
from batchserve.api.schemas.audit import AuditBody, AuditList, audit_body
from batchserve.api.schemas.filters import comma_separated, moment_query, moments
from batchserve.audit import AuditFilter
from batchserve.values import Plain

router = APIRouter(tags=["audit"])

Actions = Annotated[
    list[Action] | None,
    BeforeValidator(comma_separated),
    Query(description="Any of these, repeated or with commas.", examples=[["delete"]]),
]


async def audit_filter(
    action: Actions = None,
    kind: Annotated[Kind | None, Query(description="What it was done to.")] = None,
    subject: Annotated[
        Annotated[str, Plain] | None,
        Query(description="The ID of a job, `name@version` of a model, or the name of a key.", max_length=256),
    ] = None,
    key: Annotated[Annotated[str, Plain] | None, Query(description="The name of an API key.", max_length=128)] = None,
) -> AuditFilter:
    """All of the filter but its times."""
    return AuditFilter(tuple(action or ()), kind, subject, key)


@router.head("/v1/audit", include_in_schema=False, dependencies=ADMIN)
@router.get(
    "/v1/audit", response_model=AuditList, responses=PROBLEMS, operation_id="list_audit",
    summary="List the audit log, newest first", dependencies=ADMIN,
)  # fmt: skip
async def list_audit(
    service: ServiceDep,
    caller: CallerDep,
    wanted: Annotated[AuditFilter, Depends(audit_filter)],
    since: Annotated[str | None, moment_query("Done at this time or later.")] = None,
    until: Annotated[str | None, moment_query("Done before this time.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[int | None, Query(description="`next` of the page before.", ge=1, lt=2**31)] = None,
) -> Response:
    """Entries about jobs and keys of the tenant, and about models, which all tenants share."""
    times = {name: text for name, text in (("since", since), ("until", until)) if text is not None}

    def read() -> AuditList:
        database = service.runtime.database
        with database.read() as connection:
            dated = replace(wanted, **moments(times, database.moment(connection).wall))
            found = audit.list_page(connection, caller.tenant, dated, after=after, limit=limit + 1)
        page: list[AuditBody] = [audit_body(entry) for entry in found[:limit]]
        return AuditList(entries=page, next=page[-1].id if len(found) > limit else None)

    body = await service.calls.read(caller.tenant, read)
    return Response(body.model_dump_json(), media_type="application/json")
