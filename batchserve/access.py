"""Tenants and their quotas, the keys and callers that act for them, and the log of what these did."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

DEFAULT_TENANT = "default"
"""The tenant of all jobs where there are no keys."""
EVERY_TENANT = "*"
"""The tenant of an admin key that sees the jobs of all tenants."""
NO_KEY = "-"
"""Replaces the name of a key where none is needed."""


class Scope(StrEnum):
    """What an API key is for."""

    ADMIN = "admin"
    """As `user`; also registers and removes models and reads the metrics."""
    USER = "user"
    """Runs jobs and online predictions."""
    READER = "reader"
    """Sees the jobs and results of its tenant, and the models; checks samples against them. Changes nothing."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key. Its text is not stored, only its first characters, `prefix`. Times: seconds since the epoch."""

    id: int
    name: str
    tenant: str
    scope: Scope
    prefix: str
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated origin of a request: its tenant and scope."""

    tenant: str = DEFAULT_TENANT
    scope: Scope = Scope.ADMIN
    key: str = NO_KEY
    """The name of its API key."""

    @property
    def may_change(self) -> bool:
        """Whether it may do more than read."""
        return self.scope is not Scope.READER

    def administers(self, tenant: str) -> bool:
        """Whether it may create and revoke the keys of a tenant: of its own, and of each where it is of all tenants or
        there are no keys."""
        return self.scope is Scope.ADMIN and (self.key == NO_KEY or self.tenant in (tenant, EVERY_TENANT))

    @property
    def home(self) -> str:
        """The tenant of what it creates."""
        return DEFAULT_TENANT if self.tenant == EVERY_TENANT else self.tenant


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of a tenant; None: unlimited."""

    tenant: str
    """`EVERY_TENANT`: of each tenant that has none of its own."""
    jobs: int | None = None
    """Jobs that are queued or running."""
    bytes: int | None = None
    """Bytes of inputs and results that are stored."""
    rows_per_day: int | None = None
    """Rows planned or scored in a day (UTC)."""
    requests_per_second: float | None = None
    """In each server process."""


Kind = Literal["job", "model", "key", "schedule", "webhook", "quota"]
"""Of what an entry of the audit log is about."""


class Action(StrEnum):
    """What the audit log records."""

    CANCEL = "cancel"
    RETRY = "retry"
    DELETE = "delete"
    REGISTER = "register"
    CREATE = "create"
    REVOKE = "revoke"
    CHANGE = "change"
    PAUSE = "pause"
    RESUME = "resume"
    RUN = "run"
    ROTATE = "rotate"
    SET = "set"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """That something was done, and by whom."""

    id: int
    at: float
    """Seconds since the epoch."""
    tenant: str
    """The tenant that it concerns; `EVERY_TENANT` for what all share."""
    key: str
    """The name of the API key of the request, or `NO_KEY`."""
    action: Action
    kind: Kind
    subject: str
    """The ID of the job or webhook, `name@version` of the model, the name of the key or schedule, or the tenant of the
    quota."""
