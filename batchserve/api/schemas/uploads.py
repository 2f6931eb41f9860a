"""Bodies about direct uploads."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from batchserve.api import examples
from batchserve.api.schemas.times import time_of
from batchserve.domain import DirectUpload
from batchserve.values import no_truth


class NewUpload(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"bytes": 1048576}})

    bytes: Annotated[int, Field(ge=1, lt=2**63, description="Length of the input.")]

    _numbers = field_validator("bytes", mode="before")(no_truth)


class SentUpload(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"sha256": examples.DIGEST}})

    sha256: str | None = Field(
        None, pattern="^[0-9a-fA-F]{64}$", description="SHA-256 of the input in hex, with which it is compared."
    )


class UploadBody(BaseModel):
    """Where the bytes of an input are to be sent: `part_bytes` of them, the last time fewer, to each of the URLs."""

    model_config = ConfigDict(json_schema_extra={"example": examples.UPLOAD})

    id: str = Field(description="Also of the job, which exists when the upload is completed.")
    bytes: int
    part_bytes: int
    urls: list[str]
    expires_at: datetime = Field(description="Until then the URLs are valid, and the upload may be completed.")
    links: dict[str, str]


def upload_body(upload: DirectUpload, part_bytes: int, urls: Sequence[str]) -> UploadBody:
    self_ = f"/v1/uploads/{upload.id}"
    return UploadBody(
        id=upload.id,
        bytes=upload.bytes,
        part_bytes=part_bytes,
        urls=list(urls),
        expires_at=time_of(upload.expires_at),
        links={"self": self_, "complete": f"{self_}/complete"},
    )
