"""Bodies about the audit log."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from batchserve.access import AuditEntry
from batchserve.api import examples
from batchserve.api.schemas.times import time_of


class AuditBody(BaseModel):
    id: int
    at: datetime
    tenant: str = Field(description="The tenant of the job, key, schedule, webhook or quota; `*` for what all share.")
    key: str = Field(description="The name of the API key that did it; `-` for a command, and where there are no keys.")
    action: str = Field(
        description="`cancel`, `retry`, `delete`, `register`, `create`, `revoke`, `change`, `rotate`, `pause`, "
        "`set`, `resume` or `run`."
    )
    kind: str = Field(
        description="What it was done to: a `job`, a `model`, a `key`, a `schedule`, a `webhook` or a `quota`."
    )
    subject: str = Field(
        description="The ID of the job or webhook, `name@version` of the model, the name of the key or schedule, or a "
        "tenant."
    )


class AuditList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.AUDIT})

    entries: list[AuditBody]
    next: int | None = Field(description="Value of `after` for the next page; null on the last one.")


def audit_body(entry: AuditEntry) -> AuditBody:
    return AuditBody(
        id=entry.id,
        at=time_of(entry.at),
        tenant=entry.tenant,
        key=entry.key,
        action=entry.action,
        kind=entry.kind,
        subject=entry.subject,
    )
