"""Bodies about webhooks."""

from datetime import datetime
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from batchserve.api import examples
from batchserve.api.schemas.times import time_of, time_or_none
from batchserve.values import Plain, no_truth
from batchserve.webhooks.addresses import HookUrl
from batchserve.webhooks.endpoints import LONGEST_OVERLAP
from batchserve.webhooks.events import FAMILIES, TYPES
from batchserve.webhooks.terms import JOBS, LONGEST_DESCRIPTION, Attempt, Delivery, DeliveryState, Endpoint


def _known(name: str) -> str:
    if name not in FAMILIES and name not in TYPES:
        raise ValueError(f"expected one of {', '.join((*FAMILIES, *TYPES))}")
    return name


_Events = Annotated[
    list[Annotated[str, AfterValidator(_known)]], Field(min_length=1, max_length=len(FAMILIES) + len(TYPES))
]
_Description = Annotated[str, Plain, Field(max_length=LONGEST_DESCRIPTION)]


class NewWebhook(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": examples.NEW_WEBHOOK})

    url: HookUrl = Field(description="Where to send events; https, unless the settings allow its network.")
    events: _Events = Field(
        default_factory=lambda: [FAMILIES[0]],
        description="Types of events such as `job.failed`, or all of a family: `job.*`, `batch.*`.",
    )
    description: _Description = Field("", description="For people.")


class ChangedWebhook(BaseModel):
    """What is not given stays as it is."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"enabled": False}})

    url: HookUrl | None = None
    events: _Events | None = None
    description: _Description | None = None
    enabled: bool | None = Field(None, description="False: it gets no events, and what was on its way is given up.")


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"overlap": 86400}})

    overlap: float = Field(
        86400.0,
        ge=0,
        le=LONGEST_OVERLAP,
        allow_inf_nan=False,
        description="Seconds for which the secret before it is valid, too: a day by default, at most seven.",
    )

    _numbers = field_validator("overlap", mode="before")(no_truth)


class WebhookBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.WEBHOOK})

    id: str
    tenant: str
    url: str
    events: list[str]
    description: str
    enabled: bool
    reason: str | None = Field(description="`gone`: it was disabled because it answered 410.")
    failing_since: datetime | None = Field(description="The first attempt that failed since the last success.")
    created_at: datetime
    links: dict[str, str]


class CreatedWebhook(WebhookBody):
    model_config = ConfigDict(json_schema_extra={"example": examples.CREATED_WEBHOOK})

    secret: str = Field(description="By which requests are signed. It is shown only here.")


class WebhookList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"webhooks": [examples.WEBHOOK]}})

    webhooks: list[WebhookBody]


class SecretBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.SECRET})

    secret: str = Field(description="The new secret. It is shown only here.")
    earlier_until: datetime | None = Field(description="Until then requests are signed by the earlier one as well.")


class AttemptBody(BaseModel):
    number: int
    at: datetime
    seconds: float
    status: int | None = Field(description="Of the response; null: there was none.")
    response: str = Field(description="The beginning of the response, at most 1 KiB.")
    error: str | None = Field(description="Why there was no response, or what is wrong with it.")


class DeliveryBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.DELIVERY})

    id: str = Field(description="The `webhook-id` of all its requests.")
    event: str
    job: str | None
    url: str | None = Field(description="The address on the job; null for the webhook's.")
    state: DeliveryState
    attempts: int
    next_attempt_at: datetime | None
    created_at: datetime
    ended_at: datetime | None
    links: dict[str, str]


class DeliveryList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"deliveries": [examples.DELIVERY], "next": None}})

    deliveries: list[DeliveryBody]
    next: str | None = Field(description="Value of `after` for the next page; null on the last one.")


class DeliveryDetails(DeliveryBody):
    """A delivery with what was sent and what came back."""

    model_config = ConfigDict(json_schema_extra={"example": examples.DELIVERY_DETAILS})

    body: dict[str, Any] = Field(description="The event as it is sent.")
    log: list[AttemptBody]


def webhook_body(endpoint: Endpoint) -> WebhookBody:
    return WebhookBody(**_facts(endpoint))


def created_webhook(endpoint: Endpoint, secret: str) -> CreatedWebhook:
    return CreatedWebhook(**_facts(endpoint), secret=secret)


def _facts(endpoint: Endpoint) -> dict[str, Any]:
    self_ = f"/v1/webhooks/{endpoint.id}"
    return {
        "id": endpoint.id,
        "tenant": endpoint.tenant,
        "url": endpoint.url,
        "events": endpoint.events,
        "description": endpoint.description,
        "enabled": endpoint.enabled,
        "reason": endpoint.reason,
        "failing_since": time_or_none(endpoint.failing_since),
        "created_at": time_of(endpoint.created_at),
        "links": {"self": self_, "deliveries": f"{self_}/deliveries", "test": f"{self_}/test"},
    }


def delivery_body(delivery: Delivery, next_attempt_at: float | None) -> DeliveryBody:
    return DeliveryBody(**_delivery_facts(delivery, next_attempt_at))


def delivery_details(delivery: Delivery, next_attempt_at: float | None, attempts: list[Attempt]) -> DeliveryDetails:
    log = [
        AttemptBody(
            number=attempt.number,
            at=time_of(attempt.at),
            seconds=attempt.seconds,
            status=attempt.status,
            response=attempt.response,
            error=attempt.error,
        )
        for attempt in attempts
    ]
    facts = _delivery_facts(delivery, next_attempt_at)
    return DeliveryDetails(**facts, body=orjson.loads(delivery.body), log=log)


def _delivery_facts(delivery: Delivery, next_attempt_at: float | None) -> dict[str, Any]:
    self_ = f"/v1/webhooks/{delivery.endpoint_id or JOBS}/deliveries/{delivery.id}"
    return {
        "id": delivery.id,
        "event": delivery.event,
        "job": delivery.job_id,
        "url": delivery.url,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "next_attempt_at": time_or_none(next_attempt_at),
        "created_at": time_of(delivery.created_at),
        "ended_at": time_or_none(delivery.ended_at),
        "links": {"self": self_, "redeliver": f"{self_}/redeliver"},
    }
