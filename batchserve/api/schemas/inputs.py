"""Bodies about the inputs of a job."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from batchserve.api import examples
from batchserve.domain import Job, StoredInput
from batchserve.storage.locations import is_external


class InputEntry(BaseModel):
    """One input of a job."""

    number: int = Field(description="Counted from 0.")
    url: str | None = Field(description="Where it is read in place; null for one that was uploaded.")
    filename: str | None
    format: str
    bytes: int | None
    sha256: str | None
    version: str | None = Field(description="Of one that is read in place, when the job was queued.")
    output: str | None = Field(description="The address of its own result, if it has one.")


class InputList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.INPUTS})

    inputs: list[InputEntry]
    next: int | None = Field(description="Value of `after` for the next page; null on the last one.")


def input_list(job: Job, found: Sequence[tuple[int, StoredInput]], limit: int) -> InputList:
    """`found`: with their numbers; one more than the limit where there is a next page."""
    shown = found[:limit]
    return InputList(
        inputs=[_entry(job, number, stored) for number, stored in shown],
        next=shown[-1][0] if len(found) > limit else None,
    )


def _entry(job: Job, number: int, stored: StoredInput) -> InputEntry:
    target = job.options.target if job.options is not None else None
    own = target.urls([stored])[0] if target is not None and target.is_per_input else None
    return InputEntry(
        number=number,
        url=stored.key if is_external(stored.key) else None,
        filename=stored.filename,
        format=stored.format,
        bytes=stored.bytes,
        sha256=stored.sha256,
        version=stored.version,
        output=own,
    )
