"""The terms of webhooks as frozen dataclasses, and how their rows are read."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

import orjson
from pydantic import AfterValidator, Field, Strict

from batchserve import rows

__all__ = [
    "GONE", "JOBS", "LONGEST_DESCRIPTION", "LONGEST_URL", "Attempt", "Delivery", "DeliveryState", "Endpoint", "Secret",
    "read_attempt", "read_delivery", "read_endpoint", "read_secret",
]  # fmt: skip

JOBS: Final = "jobs"
"""In the place of the ID of an endpoint: the addresses of a tenant's jobs."""
GONE: Final = "gone"
"""The reason of an endpoint that was disabled because it answered 410."""
LONGEST_URL, LONGEST_DESCRIPTION = 2048, 255


class DeliveryState(StrEnum):
    PENDING = "pending"
    """It is to be tried, now or later."""
    DELIVERED = "delivered"
    GIVEN_UP = "given-up"
    """No attempt has succeeded, and none will follow by itself."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where events of a tenant are sent to. Times: seconds since the epoch."""

    id: str
    tenant: str
    url: str
    events: list[str]
    """Types, or families of types such as `job.*`."""
    description: str
    enabled: bool
    created_at: float
    reason: str | None = None
    """Why it was disabled, if not by a request."""
    failing_since: float | None = None
    """When the first of the attempts failed that have failed since the last success."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret of an endpoint, or of the addresses of a tenant's jobs."""

    tenant: str
    endpoint_id: str | None
    secret: str
    created_at: float
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to one endpoint or address. `id` identifies the message in all attempts."""

    id: str
    tenant: str
    endpoint_id: str | None
    job_id: str | None
    event: str
    url: str | None
    """The address on the job; None: that of the endpoint."""
    body: str
    state: DeliveryState
    attempts: int
    attempts_before: int
    """Attempts before it was last sent again by a request."""
    due_at: float
    due_clock: str
    created_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a delivery."""

    delivery_id: str
    number: int
    at: float
    seconds: float
    status: int | None
    """Of the response; None: there was none."""
    response: str
    """Its beginning."""
    error: str | None
    """Why there was no response, or what is wrong with it."""


def _json_object(text: str) -> str:
    if not isinstance(orjson.loads(text), dict):
        raise ValueError("expected a JSON object")
    return text


_STEADY = Annotated[float, Field(ge=0, allow_inf_nan=False)]

read_endpoint = rows.reader(Endpoint, "webhook {id!r}", {})
read_secret = rows.reader(Secret, "webhook secret {id!r}", {})
read_delivery = rows.reader(
    Delivery,
    "webhook delivery {id!r}",
    {
        "state": Annotated[DeliveryState, Strict(False)],
        "due_at": _STEADY,
        "body": Annotated[str, AfterValidator(_json_object)],
    },
)
read_attempt = rows.reader(Attempt, "attempt {number!r} of webhook delivery {delivery_id!r}", {})
