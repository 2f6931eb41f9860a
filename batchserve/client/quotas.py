"""The quotas of tenants: what is used of them, and for admin keys of all tenants the limits."""

import builtins
import json
from typing import Any, TypedDict, Unpack

from batchserve.client.data import bytes_content
from batchserve.client.transport import Request, Transport, now, query, segment

__all__ = ["AsyncQuotas", "Limits", "Quotas"]


class Limits(TypedDict, total=False):
    """Limits of a tenant; one that is left out is unlimited."""

    jobs: int
    bytes: int
    rows_per_day: int
    requests_per_second: float


class AsyncQuotas:
    """The quotas of tenants, as `client.quotas`. All but `usage` needs an admin key of all tenants."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def usage(self, tenant: str | None = None) -> dict[str, Any]:
        """What the tenant of the key uses, and its limits: `jobs`, `bytes` and `rows_per_day`, each with `used` and
        `limit`, and `requests_per_second`. `tenant`: another one, for an admin key of all tenants."""
        request = Request(method="GET", path="/v1/usage", params=query({"tenant": tenant}))
        return dict(await self._transport.json(request))

    async def list(self) -> "builtins.list[dict[str, Any]]":
        """All quotas, each with its `tenant`; `*` is for those that have none of their own."""
        page = await self._transport.json(Request(method="GET", path="/v1/quotas"))
        return list(page["quotas"])

    async def get(self, tenant: str) -> dict[str, Any]:
        """The quota of exactly this tenant."""
        return dict(await self._transport.json(Request(method="GET", path=_path(tenant))))

    async def set(self, tenant: str, **limits: Unpack[Limits]) -> dict[str, Any]:
        """Replaces all limits of a tenant."""
        content = bytes_content(json.dumps(limits).encode(), "application/json")
        return dict(await self._transport.json(Request(method="PUT", path=_path(tenant), content=content)))

    async def remove(self, tenant: str) -> None:
        """Removes the limits of a tenant, which has those of `*` from then on, if there are any."""
        await self._transport.json(Request(method="DELETE", path=_path(tenant)))


class Quotas:
    """The quotas of tenants, as `client.quotas`. All but `usage` needs an admin key of all tenants."""

    def __init__(self, twin: AsyncQuotas) -> None:
        self._twin = twin

    def usage(self, tenant: str | None = None) -> dict[str, Any]:
        """What the tenant of the key uses, and its limits: `jobs`, `bytes` and `rows_per_day`, each with `used` and
        `limit`, and `requests_per_second`. `tenant`: another one, for an admin key of all tenants."""
        return now(self._twin.usage(tenant))

    def list(self) -> "builtins.list[dict[str, Any]]":
        """All quotas, each with its `tenant`; `*` is for those that have none of their own."""
        return now(self._twin.list())

    def get(self, tenant: str) -> dict[str, Any]:
        """The quota of exactly this tenant."""
        return now(self._twin.get(tenant))

    def set(self, tenant: str, **limits: Unpack[Limits]) -> dict[str, Any]:
        """Replaces all limits of a tenant."""
        return now(self._twin.set(tenant, **limits))

    def remove(self, tenant: str) -> None:
        """Removes the limits of a tenant, which has those of `*` from then on, if there are any."""
        now(self._twin.remove(tenant))


def _path(tenant: str) -> str:
    return f"/v1/quotas/{segment(tenant)}"
