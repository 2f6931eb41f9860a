"""An error as a body."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from batchserve.api import examples


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(json_schema_extra={"example": examples.PROBLEM})

    type: str
    code: str = Field(description="Stable: for programs to decide by.")
    title: str
    status: int
    detail: str = Field(description="The problem, the expected and the received value.")
    instance: str = Field("", description="Path of the request; absent if it was refused before the path was read.")
    errors: list[dict[str, Any]] = Field(
        default_factory=list, description="Single errors: any of row, column, value, expected, message."
    )
    request_id: str = Field("", description="The ID of the request, as in the header X-Request-ID.")
