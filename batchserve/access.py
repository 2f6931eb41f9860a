"""Tenants, and the keys and callers that act for them."""

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_TENANT = "default"
"""The tenant of all jobs where there are no keys."""
EVERY_TENANT = "*"
"""The tenant of an admin key that sees the jobs of all tenants."""


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

    @property
    def may_change(self) -> bool:
        """Whether it may do more than read."""
        return self.scope is not Scope.READER

    @property
    def home(self) -> str:
        """The tenant of what it creates."""
        return DEFAULT_TENANT if self.tenant == EVERY_TENANT else self.tenant
