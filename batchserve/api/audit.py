"""/v1/audit: who cancelled, retried, deleted or registered what."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from batchserve import audit
from batchserve.api.auth import ADMIN, CallerDep
from batchserve.api.deps import PROBLEMS, ServiceDep
from batchserve.api.schemas.audit import AuditBody, AuditList, audit_body

router = APIRouter(tags=["audit"])


@router.head("/v1/audit", include_in_schema=False, dependencies=ADMIN)
@router.get(
    "/v1/audit", response_model=AuditList, responses=PROBLEMS, operation_id="list_audit",
    summary="List the audit log, newest first", dependencies=ADMIN,
)  # fmt: skip
async def list_audit(
    service: ServiceDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[int | None, Query(description="`next` of the page before.", ge=1, lt=2**31)] = None,
) -> Response:
    """Entries about jobs and keys of the tenant, and about models, which all tenants share."""

    def read() -> AuditList:
        with service.runtime.database.read() as connection:
            found = audit.list_page(connection, caller.tenant, after=after, limit=limit + 1)
        page: list[AuditBody] = [audit_body(entry) for entry in found[:limit]]
        return AuditList(entries=page, next=page[-1].id if len(found) > limit else None)

    body = await service.calls.read(caller.tenant, read)
    return Response(body.model_dump_json(), media_type="application/json")
