"""The options of predicting, as clients give them: query parameters, a JSON body, or the template of a schedule."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from batchserve.domain import ModelVersion, Options, StoredInput
from batchserve.errors import InvalidOptions
from batchserve.formats import RESULT_FORMATS
from batchserve.settings import Settings, networks_of, seconds_of
from batchserve.submission import Queueing, Submission, default_format
from batchserve.values import (
    MAX_NAMES,
    MAX_REFERENCE,
    Columns,
    Inputs,
    Name,
    Plain,
    TopK,
    comma_list,
    no_truth,
    parsed_json,
)
from batchserve.webhooks.addresses import HookUrl, require_allowed

MAX_METADATA = 16
METADATA_BYTES = 16 * 1024
MAX_COUNT = 2**53
"""The largest number up to which a float represents every integer."""
LONGEST_RETENTION = 100 * 365 * 86400
"""Seconds of `expires_in`: with it, the expiry of any job can be shown."""
RUN_AFTER = datetime(1970, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC)
"""Limits of `run_after`: with any retention, all times of the job can be shown."""


def _seconds(value: Any) -> Any:
    return seconds_of(value) if isinstance(value, str) else value


def _word_or_list(value: Any) -> Any:
    return value if value in ("unused", "all", "none") else comma_list(value)


class PredictOptions(BaseModel):
    """How to predict, as query parameters or as a JSON body."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Plain] = Field(
        max_length=MAX_REFERENCE,
        description="`name` (its newest version) or `name@version`.",
        examples=["iris", "iris@2"],
    )
    format: str | None = Field(
        None,
        description="Format of the result. Default: the input's; jsonl for images.",
        examples=["csv", "parquet"],
    )
    passthrough: Annotated[
        Literal["unused", "all", "none"] | Annotated[list[Name], Field(max_length=MAX_NAMES)],
        BeforeValidator(_word_or_list, json_schema_input_type=Literal["unused", "all", "none"] | str | list[str]),
    ] = Field("unused", description="Input columns copied to the result: those the model does not use, or a list.")
    columns: Columns = None
    key: Name | None = Field(
        None, description="Column that identifies a record: first in the result, and in each row error."
    )
    on_row_error: Literal["continue", "fail"] = Field("continue", description="`fail` ends the job at a failed record.")
    max_errors: float | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        allow_inf_nan=False,
        description="Failed records that end the job: a count, or below 1 a share of all records.",
    )
    top_k: TopK = None
    inputs: Inputs = None
    reuse: bool = Field(True, description="Reuse the result of a completed job with equal input, model and options.")
    priority: int = Field(0, ge=-100, le=100, description="Queued jobs with a higher priority start first.")
    run_after: datetime | None = Field(
        None, description="Do not start before this time (RFC 3339), of the years 1970 to 2999."
    )
    expires_in: Annotated[
        Annotated[float, Field(gt=0, le=LONGEST_RETENTION, allow_inf_nan=False)] | None,
        BeforeValidator(_seconds, json_schema_input_type=str | float | None),
    ] = Field(
        None,
        description="Retention of its bytes after its end, as `7d`, `12h` or seconds; at most that of the server.",
        examples=["7d"],
    )
    metadata: Annotated[
        dict[Annotated[str, Plain], Annotated[str, Plain]],
        BeforeValidator(parsed_json, json_schema_input_type=dict[str, str] | str),
    ] = Field(
        default_factory=dict,
        max_length=MAX_METADATA,
        description="At most 16 pairs of texts, 16 KiB in all, stored with the job.",
    )
    webhook: HookUrl | None = Field(
        None,
        description="Address that the end of the job is sent to, signed by a secret of the tenant.",
        examples=["https://example.com/hook"],
    )

    _numbers = field_validator("max_errors", "top_k", "priority", "expires_in", mode="before")(no_truth)

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None and name not in RESULT_FORMATS:
            raise ValueError(f"expected one of {', '.join(RESULT_FORMATS)}")
        return name

    @field_validator("run_after")
    @classmethod
    def _has_zone(cls, moment: datetime | None) -> datetime | None:
        if moment is not None and moment.tzinfo is None:
            raise ValueError("expected a time with a zone, as in 2026-11-20T02:00:00Z")
        if moment is not None and not RUN_AFTER[0] <= moment < RUN_AFTER[1]:
            raise ValueError("expected a time of the years 1970 to 2999")
        return moment

    @field_validator("metadata")
    @classmethod
    def _bounded(cls, pairs: dict[str, str]) -> dict[str, str]:
        size = sum(len(name.encode()) + len(value.encode()) for name, value in pairs.items())
        if size > METADATA_BYTES:
            raise ValueError(f"expected at most {METADATA_BYTES} bytes in all, got {size}")
        return pairs

    def require_allowed(self, settings: Settings) -> None:
        """Raises InvalidOptions for an address, or a longer retention, than the settings allow."""
        if self.webhook is not None:
            require_allowed(self.webhook, networks_of(settings.webhook_networks))
        most = settings.keep_results
        if self.expires_in is not None and most is not None and self.expires_in > most:
            raise InvalidOptions(
                f"expires_in: this server keeps results for {most:g} s (BATCHSERVE_KEEP_RESULTS): expected at most "
                f"that, got {self.expires_in:g} s"
            )

    def submission(self, tenant: str, job_id: str, inputs: tuple[StoredInput, ...], model: ModelVersion) -> Submission:
        """The submission of a job's inputs with these options."""
        passthrough = self.passthrough
        options = Options(
            format=self.format or default_format(inputs[0].format, model),
            passthrough=tuple(passthrough) if isinstance(passthrough, list) else passthrough,
            columns=tuple(self.columns) if isinstance(self.columns, list) else self.columns,
            key=self.key,
            on_row_error=self.on_row_error,
            max_errors=self.max_errors,
            top_k=self.top_k,
            inputs=self.inputs,
        )
        run_after = self.run_after.timestamp() if self.run_after else None
        queueing = Queueing(self.priority, run_after, self.metadata, self.reuse, self.webhook, self.expires_in)
        return Submission(tenant, job_id, inputs, model, options, queueing)
