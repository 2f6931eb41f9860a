"""What tenants use of their quotas, and for administrators of all tenants the form to set these."""

from typing import Any

from fastapi import Request, Response
from sqlalchemy import Connection
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve.access import EVERY_TENANT, Quota
from batchserve.api.auth import caller_of, require_admin
from batchserve.api.deps import parsed, service_of
from batchserve.api.quotas import require_operator
from batchserve.api.schemas.quotas import NewQuota
from batchserve.quotas import account, limits
from batchserve.quotas.account import Usage
from batchserve.web.forms import read_fields
from batchserve.web.pages import page

__all__ = ["ROUTES"]


async def show(request: Request) -> Response:
    """Of the tenant of the key; of all that have a quota for an administrator of all."""
    caller, service = caller_of(request), service_of(request)
    await require_admin(caller)
    database, is_operator = service.runtime.database, caller.administers(EVERY_TENANT)

    def read() -> tuple[list[Usage], Quota | None]:
        with database.read() as connection:
            now = database.moment(connection).wall
            if not is_operator:
                return [account.usage_of(connection, caller.home, now)], None
            return account.usages(connection, now), limits.find_for(connection, EVERY_TENANT)

    usages, of_all = await service.calls.read(caller.tenant, read)
    return page(
        request, "quotas.html", usages=usages, of_all=of_all, is_operator=is_operator, every_tenant=EVERY_TENANT
    )


async def change(request: Request) -> Response:
    """Sets the limits of a tenant, or removes them."""
    caller, service = caller_of(request), service_of(request)
    await require_operator(caller)
    fields, database = await read_fields(request), service.runtime.database
    tenant = fields.first("tenant").strip()
    given: dict[str, Any] = {name: value for name in limits.LIMITS if (value := fields.first(name).strip())}

    def write(connection: Connection) -> None:
        now = database.moment(connection).wall
        if fields.first("action") == "remove":
            limits.remove(connection, tenant, now, caller)
        else:
            limits.set_limits(connection, parsed(NewQuota, given).of(tenant), now, caller)

    await database.commit(write, alone=True)
    service.limits.forget()
    return RedirectResponse("/system/quotas", 303)


ROUTES = [Route("/system/quotas", show), Route("/system/quotas", change, methods=["POST"])]
