"""Bodies about quotas, and what tenants use of them."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, field_validator

from batchserve.access import Quota
from batchserve.api import examples
from batchserve.api.schemas.times import time_of
from batchserve.quotas.account import Usage
from batchserve.values import no_truth

MOST = 2**53


class NewQuota(BaseModel):
    """The limits of a tenant; null is unlimited."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": examples.NEW_QUOTA})

    jobs: int | None = Field(None, ge=0, le=MOST, description="Jobs that are queued or running at a time (429).")
    bytes: int | None = Field(None, ge=0, le=MOST, description="Bytes of inputs and results that are stored (507).")
    rows_per_day: int | None = Field(None, ge=0, le=MOST, description="Rows that jobs have in a day, in UTC (429).")
    requests_per_second: float | None = Field(
        None, ge=0.01, le=MOST, allow_inf_nan=False, description="Requests to each server process (429)."
    )

    _numbers = field_validator("*", mode="before")(no_truth)

    def of(self, tenant: str) -> Quota:
        return Quota(tenant, self.jobs, self.bytes, self.rows_per_day, self.requests_per_second)


class QuotaBody(NewQuota):
    model_config = ConfigDict(json_schema_extra={"example": examples.QUOTA})

    tenant: str = Field(description="`*`: for each tenant that has no quota of its own.")


class QuotaList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"quotas": [examples.QUOTA]}})

    quotas: list[QuotaBody]


class Used(BaseModel):
    used: int
    limit: int | None = Field(description="Null: unlimited.")


class RowsUsed(Used):
    resets_at: datetime = Field(description="The next midnight in UTC.")


class UsageBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.USAGE})

    tenant: str
    jobs: Used = Field(description="Jobs that are queued or running.")
    bytes: Used = Field(description="Bytes of inputs and results that are stored.")
    rows_per_day: RowsUsed = Field(description="Rows of this day.")
    requests_per_second: float | None = Field(description="The limit in each server process; null: unlimited.")


def quota_body(quota: Quota) -> QuotaBody:
    return QuotaBody(
        tenant=quota.tenant,
        jobs=quota.jobs,
        bytes=quota.bytes,
        rows_per_day=quota.rows_per_day,
        requests_per_second=quota.requests_per_second,
    )


def usage_body(usage: Usage) -> UsageBody:
    quota = usage.quota or Quota(usage.tenant)
    return UsageBody(
        tenant=usage.tenant,
        jobs=Used(used=usage.jobs, limit=quota.jobs),
        bytes=Used(used=usage.bytes, limit=quota.bytes),
        rows_per_day=RowsUsed(used=usage.rows, limit=quota.rows_per_day, resets_at=time_of(usage.day_ends)),
        requests_per_second=quota.requests_per_second,
    )
