"""/v1/webhooks: where the ends of jobs are sent to, what was sent, and what came back.

With `jobs` in the place of an ID, a path is about the addresses on a tenant's jobs: their secret and their deliveries.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency
from batchserve.access import Caller
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import json_object
from batchserve.api.deps import PROBLEMS, IdempotencyKey, ServiceDep, bare_key, parsed, replayed
from batchserve.api.schemas.times import time_or_none
from batchserve.api.schemas.webhooks import (
    ChangedWebhook,
    CreatedWebhook,
    DeliveryBody,
    DeliveryDetails,
    DeliveryList,
    NewWebhook,
    Rotation,
    SecretBody,
    WebhookBody,
    WebhookList,
    created_webhook,
    delivery_body,
    delivery_details,
    webhook_body,
)
from batchserve.db.connect import Moment
from batchserve.idempotency import KeyedRequest
from batchserve.service import Service
from batchserve.settings import networks_of
from batchserve.values import Cursor
from batchserve.webhooks import deliveries, endpoints
from batchserve.webhooks.addresses import require_allowed
from batchserve.webhooks.terms import JOBS, Delivery, DeliveryState

router = APIRouter(tags=["webhooks"])

T = TypeVar("T")
WebhookId = Annotated[str, Path(max_length=64)]
DeliveryId = Annotated[str, Path(max_length=64)]


def _json_body(kind: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": kind.model_json_schema()}}}
    }


@router.head("/v1/webhooks", include_in_schema=False)
@router.get(
    "/v1/webhooks", response_model=WebhookList, responses=PROBLEMS, operation_id="list_webhooks",
    summary="List the webhooks, the oldest first",
)  # fmt: skip
async def list_webhooks(service: ServiceDep, caller: CallerDep) -> Response:
    found = await service.runtime.database.fetch(lambda connection: endpoints.list_all(connection, caller.tenant))
    return _answer(WebhookList(webhooks=[webhook_body(endpoint) for endpoint in found]))


@router.post(
    "/v1/webhooks", status_code=201, response_model=CreatedWebhook, responses=PROBLEMS, operation_id="create_webhook",
    summary="Create a webhook", openapi_extra=_json_body(NewWebhook),
)  # fmt: skip
async def create_webhook(
    request: Request, service: ServiceDep, caller: CallerDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """The response is the only one that shows its secret. The address is checked now by its form, and before each
    attempt by what its name resolves to."""
    new = parsed(NewWebhook, await json_object(request, service.runtime.settings))
    keyed = _keyed(caller, idempotency_key, "create-webhook", new.model_dump_json())

    def work(connection: Connection, now: float) -> BaseModel:
        return create(service, connection, caller, new, now)

    return await _once(service, keyed, work, 201)


def create(service: Service, connection: Connection, caller: Caller, new: NewWebhook, now: float) -> CreatedWebhook:
    """Raises InvalidOptions, and Conflict when there are too many."""
    require_allowed(new.url, networks_of(service.runtime.settings.webhook_networks))
    made = endpoints.create(connection, caller.home, new.url, new.events, new.description, now, caller)
    return created_webhook(*made)


@router.head("/v1/webhooks/{webhook_id}", include_in_schema=False)
@router.get(
    "/v1/webhooks/{webhook_id}", response_model=WebhookBody, responses=PROBLEMS, operation_id="get_webhook",
    summary="Show a webhook",
)  # fmt: skip
async def get_webhook(webhook_id: WebhookId, service: ServiceDep, caller: CallerDep) -> Response:
    database = service.runtime.database
    return _answer(webhook_body(await database.fetch(lambda c: endpoints.get(c, webhook_id, caller.tenant))))


@router.patch(
    "/v1/webhooks/{webhook_id}", response_model=WebhookBody, responses=PROBLEMS, operation_id="change_webhook",
    summary="Change, disable or enable a webhook", openapi_extra=_json_body(ChangedWebhook),
)  # fmt: skip
async def change_webhook(webhook_id: WebhookId, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """While it is disabled it gets no events, and what was on its way to it is given up. Its secret stays."""
    asked = parsed(ChangedWebhook, await json_object(request, service.runtime.settings))
    return _answer(
        await _written(service, lambda connection, now: change(service, connection, caller, webhook_id, asked, now))
    )


def change(
    service: Service, connection: Connection, caller: Caller, webhook_id: str, asked: ChangedWebhook, now: float
) -> WebhookBody:
    """Raises WebhookNotFound, and InvalidOptions."""
    values = asked.model_dump(exclude_none=True)
    if asked.url is not None:
        require_allowed(asked.url, networks_of(service.runtime.settings.webhook_networks))
    return webhook_body(endpoints.change(connection, webhook_id, caller.tenant, values, now, caller))


@router.delete(
    "/v1/webhooks/{webhook_id}", status_code=204, responses=PROBLEMS, operation_id="delete_webhook",
    summary="Remove a webhook with its deliveries",
)  # fmt: skip
async def delete_webhook(webhook_id: WebhookId, service: ServiceDep, caller: CallerDep) -> Response:
    await run_in_threadpool(delete, service, caller, webhook_id)
    return Response(status_code=204)


def delete(service: Service, caller: Caller, webhook_id: str) -> None:
    """Raises WebhookNotFound."""
    database = service.runtime.database

    def work(connection: Connection) -> None:
        now = database.moment(connection).wall
        endpoints.delete_endpoint(connection, webhook_id, caller.tenant, now, caller)

    database.write_freeing(work)


@router.post(
    "/v1/webhooks/{webhook_id}/rotate", response_model=SecretBody, responses=PROBLEMS, operation_id="rotate_webhook",
    summary="Replace the secret of a webhook", openapi_extra=_json_body(Rotation, required=False),
)  # fmt: skip
async def rotate_webhook(
    webhook_id: WebhookId,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """For a while, requests have a signature of each secret. With `jobs` for the ID, it is the secret for the addresses
    on the jobs of the tenant, which must have one before a job may have an address."""
    overlap = parsed(Rotation, await json_object(request, service.runtime.settings)).overlap
    keyed = _keyed(caller, idempotency_key, "rotate-webhook", webhook_id, str(overlap))

    def work(connection: Connection, now: float) -> BaseModel:
        return rotate(connection, caller, webhook_id, overlap, now)

    return await _once(service, keyed, work, 200)


def rotate(connection: Connection, caller: Caller, webhook_id: str, overlap: float, now: float) -> SecretBody:
    """Raises WebhookNotFound."""
    tenant = caller.home if webhook_id == JOBS else caller.tenant
    secret, until = endpoints.rotate(connection, webhook_id, tenant, overlap, now, caller)
    return SecretBody(secret=secret, earlier_until=time_or_none(until))


@router.post(
    "/v1/webhooks/{webhook_id}/test", status_code=202, response_model=DeliveryBody, responses=PROBLEMS,
    operation_id="test_webhook", summary="Send a test event",
)  # fmt: skip
async def test_webhook(webhook_id: WebhookId, service: ServiceDep, caller: CallerDep) -> Response:
    """A `webhook.test` event, whatever the webhook asks for. Its delivery shows what came back."""

    def work(connection: Connection, now: float) -> DeliveryBody:
        return delivery_body(deliveries.add_test(connection, webhook_id, caller.tenant, now), now)

    return _accepted(await _written(service, work))


# --- deliveries ------------------------------------------------------------------------------------------------------


@router.head("/v1/webhooks/{webhook_id}/deliveries", include_in_schema=False)
@router.get(
    "/v1/webhooks/{webhook_id}/deliveries", response_model=DeliveryList, responses=PROBLEMS,
    operation_id="list_deliveries", summary="List the deliveries of a webhook, newest first",
)  # fmt: skip
async def list_deliveries(
    webhook_id: WebhookId,
    service: ServiceDep,
    caller: CallerDep,
    state: Annotated[DeliveryState | None, Query(examples=["given-up"])] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[Cursor | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """With `jobs` for the ID, those to the addresses on jobs."""

    def read() -> DeliveryList:
        found, now = page_of(service, caller, webhook_id, state, after, limit)
        page = [delivery_body(delivery, _next_attempt(delivery, now)) for delivery in found[:limit]]
        return DeliveryList(deliveries=page, next=page[-1].id if len(found) > limit else None)

    return _answer(await service.calls.read(caller.tenant, read))


def page_of(
    service: Service, caller: Caller, webhook_id: str, state: DeliveryState | None, after: str | None, limit: int
) -> tuple[list[Delivery], Moment]:
    """The deliveries of a page and, if there is one, the first of the next. Raises WebhookNotFound."""
    database = service.runtime.database
    with database.read() as connection:
        if webhook_id != JOBS:
            endpoints.get(connection, webhook_id, caller.tenant)
        found = deliveries.list_page(connection, webhook_id, caller.tenant, state=state, after=after, limit=limit + 1)
        return found, database.moment(connection)


@router.head("/v1/webhooks/{webhook_id}/deliveries/{delivery_id}", include_in_schema=False)
@router.get(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}", response_model=DeliveryDetails, responses=PROBLEMS,
    operation_id="get_delivery", summary="Show a delivery, what was sent and what came back",
)  # fmt: skip
async def get_delivery(
    webhook_id: WebhookId, delivery_id: DeliveryId, service: ServiceDep, caller: CallerDep
) -> Response:
    def read(connection: Connection) -> DeliveryDetails:
        return details(service, connection, caller, webhook_id, delivery_id)

    return _answer(await service.runtime.database.fetch(read))


def details(
    service: Service, connection: Connection, caller: Caller, webhook_id: str, delivery_id: str
) -> DeliveryDetails:
    """Raises WebhookNotFound."""
    found = deliveries.get(connection, webhook_id, delivery_id, caller.tenant)
    attempts = deliveries.attempts_of(connection, found.id)
    return delivery_details(found, _next_attempt(found, service.runtime.database.moment(connection)), attempts)


@router.post(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=202, response_model=DeliveryBody,
    responses=PROBLEMS, operation_id="redeliver", summary="Send a delivery again",
)  # fmt: skip
async def redeliver(webhook_id: WebhookId, delivery_id: DeliveryId, service: ServiceDep, caller: CallerDep) -> Response:
    """Under the same `webhook-id`, with as many attempts as at first."""

    def work(connection: Connection, now: float) -> DeliveryBody:
        return delivery_body(deliveries.send_again(connection, webhook_id, delivery_id, caller.tenant), now)

    return _accepted(await _written(service, work))


# --- shared ----------------------------------------------------------------------------------------------------------


def _keyed(caller: Caller, key: str | None, *content: str) -> KeyedRequest:
    return KeyedRequest(caller.tenant, bare_key(key), idempotency.fingerprint(*content))


async def _once(
    service: Service, keyed: KeyedRequest, work: Callable[[Connection, float], BaseModel], status: int
) -> Response:
    """The response to a request that is not repeated under its idempotency key."""

    def write(connection: Connection, now: float) -> str:
        body = work(connection, now).model_dump_json()
        keyed.remember(connection, None, status, now, body)
        return body

    with service.only_one(keyed.tenant, keyed.key):
        if (answer := await replayed(service, keyed)) is not None:
            return answer
        text = await _written(service, write)
    return Response(text, status, {"cache-control": "no-store"}, media_type="application/json")


async def _written(service: Service, work: Callable[[Connection, float], T]) -> T:
    database = service.runtime.database
    return await database.commit(lambda connection: work(connection, database.moment(connection).wall))


def _next_attempt(delivery: Delivery, now: Moment) -> float | None:
    wait = deliveries.wait_of(delivery, now)
    return None if wait is None else now.wall + wait


def _accepted(body: DeliveryBody) -> Response:
    return Response(body.model_dump_json(), 202, {"location": body.links["self"]}, media_type="application/json")


def _answer(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
