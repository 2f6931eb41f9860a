"""/v1/quotas: the limits of tenants, set by administrators of all tenants; /v1/usage: what a tenant uses."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from sqlalchemy import Connection

from batchserve.access import EVERY_TENANT, Quota
from batchserve.api import examples
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import json_object
from batchserve.api.deps import PROBLEMS, ServiceDep, parsed
from batchserve.api.schemas.quotas import NewQuota, QuotaBody, QuotaList, UsageBody, quota_body, usage_body
from batchserve.errors import Forbidden
from batchserve.quotas import account, limits
from batchserve.values import Plain

router = APIRouter(tags=["quotas"])

Tenant = Annotated[str, Path(max_length=64, description="`*`: each tenant that has no quota of its own.")]
_BODY = {
    "required": True,
    "content": {"application/json": {"schema": NewQuota.model_json_schema(), "example": examples.NEW_QUOTA}},
}


async def require_operator(caller: CallerDep) -> None:
    """Raises Forbidden."""
    if not caller.administers(EVERY_TENANT):
        raise Forbidden("quotas are set with an admin key of all tenants: batchserve keys create NAME --tenant '*'")


OPERATOR: list[Any] = [Depends(require_operator)]
"""Dependencies of a route for administrators of all tenants."""


@router.head("/v1/quotas", include_in_schema=False, dependencies=OPERATOR)
@router.get(
    "/v1/quotas", response_model=QuotaList, responses=PROBLEMS, operation_id="list_quotas",
    summary="List the quotas of all tenants", dependencies=OPERATOR,
)  # fmt: skip
async def list_quotas(service: ServiceDep) -> Response:
    found = await service.runtime.database.fetch_one(limits.list_all)
    body = QuotaList(quotas=[quota_body(quota) for quota in found])
    return Response(body.model_dump_json(), media_type="application/json")


@router.head("/v1/quotas/{tenant}", include_in_schema=False, dependencies=OPERATOR)
@router.get(
    "/v1/quotas/{tenant}", response_model=QuotaBody, responses=PROBLEMS, operation_id="get_quota",
    summary="Show the quota of a tenant", dependencies=OPERATOR,
)  # fmt: skip
async def get_quota(tenant: Tenant, service: ServiceDep) -> Response:
    """404 where the tenant has none of its own; that of `*` may limit it."""
    quota = await service.runtime.database.fetch_one(lambda connection: limits.find(connection, tenant))
    return Response(quota_body(quota).model_dump_json(), media_type="application/json")


@router.put(
    "/v1/quotas/{tenant}", response_model=QuotaBody, responses=PROBLEMS, operation_id="set_quota",
    summary="Set the quota of a tenant", dependencies=OPERATOR, openapi_extra={"requestBody": _BODY},
)  # fmt: skip
async def set_quota(tenant: Tenant, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Replaces all limits of the tenant; one that is left out is unlimited. It is in force in all processes within a
    second. What is stored or queued already stays, also beyond a new limit."""
    quota = parsed(NewQuota, await json_object(request, service.runtime.settings)).of(tenant)
    database = service.runtime.database

    def put(connection: Connection) -> Quota:
        limits.set_limits(connection, quota, database.moment(connection).wall, caller)
        return quota

    body = quota_body(await database.commit(put, alone=True))
    service.limits.forget()
    return Response(body.model_dump_json(), media_type="application/json")


@router.delete(
    "/v1/quotas/{tenant}", status_code=204, responses=PROBLEMS, operation_id="delete_quota",
    summary="Remove the quota of a tenant", dependencies=OPERATOR,
)  # fmt: skip
async def delete_quota(tenant: Tenant, service: ServiceDep, caller: CallerDep) -> Response:
    """From then on the tenant has the limits of `*`, if there are any."""
    database = service.runtime.database

    def remove(connection: Connection) -> None:
        limits.remove(connection, tenant, database.moment(connection).wall, caller)

    await database.commit(remove, alone=True)
    service.limits.forget()
    return Response(status_code=204)


@router.head("/v1/usage", include_in_schema=False)
@router.get(
    "/v1/usage", response_model=UsageBody, responses=PROBLEMS, operation_id="get_usage",
    summary="Show what a tenant uses, and its limits",
)  # fmt: skip
async def get_usage(
    service: ServiceDep,
    caller: CallerDep,
    tenant: Annotated[
        Annotated[str, Plain] | None,
        Query(description="Another tenant, for an admin key of all tenants.", max_length=64, examples=["sales"]),
    ] = None,
) -> Response:
    """Of the tenant of the key."""
    if tenant is not None and tenant != caller.home and not caller.administers(EVERY_TENANT):
        raise Forbidden("the usage of another tenant needs an admin key of all tenants")
    database, whose = service.runtime.database, tenant or caller.home

    def read() -> UsageBody:
        with database.read() as connection:
            return usage_body(account.usage_of(connection, whose, database.moment(connection).wall))

    body = await service.calls.read(caller.tenant, read)
    return Response(body.model_dump_json(), media_type="application/json")
