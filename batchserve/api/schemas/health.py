"""Bodies about the health of a process."""

from pydantic import BaseModel, ConfigDict, Field

from batchserve.api import examples


class HealthBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.HEALTH})

    status: str
    version: str = Field(description="The running release.")


class ReadinessBody(HealthBody):
    """`status`: `ok`, or `unavailable` when a check fails."""

    model_config = ConfigDict(json_schema_extra={"example": examples.READINESS})

    checks: dict[str, str] = Field(description="Of each part: `ok`, or what is wrong.")
    unreadable_rows: int | None = Field(None, description="Damaged rows; absent while the database does not respond.")
