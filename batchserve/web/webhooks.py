"""The webhooks of a tenant: created, changed, tried, and what was sent to them."""

from typing import Any

from fastapi import Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve.api import webhooks as routes
from batchserve.api.auth import caller_of
from batchserve.api.deps import parsed, service_of
from batchserve.api.schemas.webhooks import (
    ChangedWebhook,
    CreatedWebhook,
    DeliveryDetails,
    NewWebhook,
    Rotation,
    SecretBody,
    WebhookBody,
    webhook_body,
)
from batchserve.errors import InvalidOptions
from batchserve.web.forms import read_fields
from batchserve.web.pages import page
from batchserve.webhooks import deliveries, endpoints
from batchserve.webhooks.events import FAMILIES, TYPES
from batchserve.webhooks.terms import JOBS, Delivery, DeliveryState

__all__ = ["ROUTES"]

_DELIVERIES = 50


async def show_all(request: Request) -> Response:
    return await _list(request)


async def create(request: Request) -> Response:
    """The only page on which the secret is shown."""
    service, caller, fields = service_of(request), caller_of(request), await read_fields(request)
    given = {name: fields.first(name).strip() for name in ("url", "description")}
    new = parsed(NewWebhook, {**given, "events": fields.all("event")})

    def work(connection: Connection) -> CreatedWebhook:
        now = service.runtime.database.moment(connection).wall
        return routes.create(service, connection, caller, new, now)

    made = await service.runtime.database.commit(work)
    return await _list(request, secret=made.secret, of=made.url)


async def show(request: Request) -> Response:
    return await _one(request)


async def change(request: Request) -> Response:
    service, caller, fields = service_of(request), caller_of(request), await read_fields(request)
    given: dict[str, Any] = {
        name: fields.first(name).strip() for name in ("url", "description", "enabled") if fields.all(name)
    }
    if "url" in given or fields.all("event"):  # a list of which nothing is selected is not in the form
        given["events"] = fields.all("event")
    asked = parsed(ChangedWebhook, given)
    webhook_id = _id(request)

    def work(connection: Connection) -> WebhookBody:
        now = service.runtime.database.moment(connection).wall
        return routes.change(service, connection, caller, webhook_id, asked, now)

    await service.runtime.database.commit(work)
    return RedirectResponse(f"/webhooks/{webhook_id}", 303)


async def rotate(request: Request) -> Response:
    """The only page on which the new secret is shown."""
    service, caller, webhook_id = service_of(request), caller_of(request), _id(request)
    overlap = parsed(Rotation, {}).overlap

    def work(connection: Connection) -> SecretBody:
        return routes.rotate(connection, caller, webhook_id, overlap, service.runtime.database.moment(connection).wall)

    made = await service.runtime.database.commit(work)
    if webhook_id == JOBS:
        return await _list(request, secret=made.secret, of="the addresses on jobs")
    return await _one(request, secret=made.secret)


async def delete(request: Request) -> Response:
    await run_in_threadpool(routes.delete, service_of(request), caller_of(request), _id(request))
    return RedirectResponse("/webhooks", 303)


async def test(request: Request) -> Response:
    database, caller, webhook_id = service_of(request).runtime.database, caller_of(request), _id(request)

    def work(connection: Connection) -> Delivery:
        return deliveries.add_test(connection, webhook_id, caller.tenant, database.moment(connection).wall)

    sent = await database.commit(work)
    return RedirectResponse(f"/webhooks/{webhook_id}/deliveries/{sent.id}", 303)


async def show_delivery(request: Request) -> Response:
    service, caller, webhook_id = service_of(request), caller_of(request), _id(request)
    delivery_id = str(request.path_params["delivery_id"])

    def read(connection: Connection) -> DeliveryDetails:
        return routes.details(service, connection, caller, webhook_id, delivery_id)

    found = await service.runtime.database.fetch(read)
    return page(request, "delivery.html", delivery=found, webhook_id=webhook_id)


async def redeliver(request: Request) -> Response:
    database, caller, webhook_id = service_of(request).runtime.database, caller_of(request), _id(request)
    delivery_id = str(request.path_params["delivery_id"])

    def work(connection: Connection) -> Delivery:
        return deliveries.send_again(connection, webhook_id, delivery_id, caller.tenant)

    await database.commit(work)
    return RedirectResponse(f"/webhooks/{webhook_id}/deliveries/{delivery_id}", 303)


async def _list(request: Request, secret: str = "", of: str = "") -> Response:
    caller, database = caller_of(request), service_of(request).runtime.database
    found = await database.fetch(lambda connection: endpoints.list_all(connection, caller.tenant))
    shown = [webhook_body(endpoint) for endpoint in found]
    return page(
        request, "webhooks.html", webhooks=shown, types=[*FAMILIES, *TYPES], default=FAMILIES[0], secret=secret, of=of
    )


async def _one(request: Request, secret: str = "") -> Response:
    """`state`: only deliveries in it. `after`: the last delivery of the page before."""
    service, caller, webhook_id = service_of(request), caller_of(request), _id(request)
    state, after = request.query_params.get("state", ""), request.query_params.get("after") or None
    if state and state not in list(DeliveryState):
        raise InvalidOptions(f"state: expected {', '.join(DeliveryState)}, got {state[:100]!r}")
    if after is not None and not (after.isascii() and after.isprintable() and len(after) <= 64):
        raise InvalidOptions(f"after: expected the ID of a delivery, got {after[:100]!r}")
    wanted = DeliveryState(state) if state else None

    def read() -> tuple[WebhookBody | None, list[Delivery]]:
        with service.runtime.database.read() as connection:
            own = None if webhook_id == JOBS else endpoints.get(connection, webhook_id, caller.tenant)
        found, _ = routes.page_of(service, caller, webhook_id, wanted, after, _DELIVERIES)
        return None if own is None else webhook_body(own), found

    own, found = await service.calls.read(caller.tenant, read)
    following = found[_DELIVERIES - 1].id if len(found) > _DELIVERIES else None
    return page(
        request, "webhook.html", webhook=own, webhook_id=webhook_id, deliveries=found[:_DELIVERIES], state=state,
        states=list(DeliveryState), following=following, secret=secret, types=[*FAMILIES, *TYPES],
    )  # fmt: skip


def _id(request: Request) -> str:
    return str(request.path_params["webhook_id"])


ROUTES = [
    Route("/webhooks", show_all),
    Route("/webhooks", create, methods=["POST"]),
    Route("/webhooks/{webhook_id}", show),
    Route("/webhooks/{webhook_id}", change, methods=["POST"]),
    Route("/webhooks/{webhook_id}/rotate", rotate, methods=["POST"]),
    Route("/webhooks/{webhook_id}/delete", delete, methods=["POST"]),
    Route("/webhooks/{webhook_id}/test", test, methods=["POST"]),
    Route("/webhooks/{webhook_id}/deliveries/{delivery_id}", show_delivery),
    Route("/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver", redeliver, methods=["POST"]),
]
